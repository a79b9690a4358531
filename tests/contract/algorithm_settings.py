"""Our algorithms in one table, as Composer's ``tests/algorithms/algorithm_settings.py`` has its own: a new algorithm is one row."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Algorithm
from composer.models import ComposerClassifier, ComposerModel
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from composer_effalgos import ESLM, AdaBatch, InfoBatch, LinUpper, Pruning, SubsetSelection
from composer_effalgos.adabatch import LossPlateau, NoiseScale, NormTest
from composer_effalgos.pruning import RULES

VOCABULARY, LENGTH = 12, 6


class Sequences(Dataset):
    """Token sequences that count up, as mappings; a quarter of the steps are random."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        odd = torch.rand(samples, LENGTH, generator=generator) < 0.25
        steps = torch.where(odd, torch.randint(VOCABULARY, odd.shape, generator=generator), 1)
        self.tokens = (torch.arange(samples)[:, None] + steps.cumsum(dim=1)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {'input_ids': self.tokens[index], 'labels': self.tokens[index]}


class TokenModel(ComposerModel):
    """Says the next token from the last; the loss shifts the labels, as Hugging Face's does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.ReLU(), nn.Linear(8, VOCABULARY))

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch['input_ids'])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten())


def classes(samples: int) -> tuple[Dataset, ComposerModel]:
    """So many samples of 8 numbers in 3 classes, not quite separable, and a network."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 8, generator=generator)
    labels = (inputs[:, 0] > 0).long() + (inputs[:, 1] + 0.3 * inputs[:, 2] > 0).long()
    return TensorDataset(inputs, labels), ComposerClassifier(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), num_classes=3)


def tokens(samples: int) -> tuple[Dataset, ComposerModel]:
    """So many token sequences, and a model that says the next token."""
    return Sequences(samples), TokenModel()


@dataclass(frozen=True)
class Setting:
    """A row of the table.

    Attributes:
        algorithms: Makes the algorithms of a run on so many samples, of which nothing is shared with another run.
        problem: Makes a data set of so many samples and a model; call it with the random state that the model is to have.
        measures_ranks: Whether what it does depends on how samples lie on ranks, so that two ranks need not train as one.
    """

    algorithms: Callable[[int], list[Algorithm]]
    problem: Callable[[int], tuple[Dataset, ComposerModel]] = classes
    measures_ranks: bool = False


def adabatch(**arguments: Any) -> Setting:
    return Setting(lambda samples: [AdaBatch(**arguments)])


def subset(strategy: str, fraction: float = 0.5, select_every: str = '2ep', **options: Any) -> Setting:
    return Setting(lambda samples: [SubsetSelection(strategy, fraction, select_every, **options)])


RULE_OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    'ies': lambda samples: {'threshold': 0.02, 'window': 1},
    'pdd': lambda samples: {'threshold': 0.5},
    'rho': lambda samples: {'irreducible': torch.zeros(samples)},
}


def with_rule(name: str, samples: int) -> list[Algorithm]:
    options = RULE_OPTIONS[name](samples) if name in RULE_OPTIONS else {}
    return [Pruning({'name': name, **options}, delta=1.0)]


SETTINGS: dict[str, Setting] = {
    'infobatch': Setting(lambda samples: [InfoBatch(delta=1.0)]),
    'infobatch by class, moving average, bands': Setting(
        lambda samples: [InfoBatch(delta=1.0, score='ema', bands=[(0.3, 0.8), (0.6, 0.4)], class_balanced=True)]
    ),
    'infobatch_sharded': Setting(lambda samples: [InfoBatch(delta=1.0, shard=True)]),
    'infobatch_sharded by bands, moving average': Setting(
        lambda samples: [InfoBatch(delta=1.0, shard=True, score='ema', bands=[(0.3, 0.8), (0.6, 0.4)])]
    ),
    'rule random, sharded, adabatch': Setting(
        lambda samples: [Pruning('random', delta=1.0, shard=True), AdaBatch(schedule='0:16 20ba:32 3ep:24', lr='linear', global_sizes=True)]
    ),
    'infobatch of token sequences': Setting(lambda samples: [InfoBatch(delta=1.0)], problem=tokens),
    **{f'rule {name}': Setting(functools.partial(with_rule, name)) for name in RULES},
    'adabatch': adabatch(growth_factor=2, interval='2ep', lr_factor=0.75),
    'adabatch at milestones': adabatch(growth_factor=1.5, milestones=['7ba', '3ep'], lr='sqrt', max_batch_size=40),
    'adabatch by schedule': adabatch(schedule='0:16 20ba:32 3ep:24', lr='linear', global_sizes=True),
    'adabatch by ramp': adabatch(schedule={'start': 8, 'stop': 32, 'increment': 8, 'over': '300sp'}, global_sizes=True),
    'adabatch on a plateau': Setting(lambda samples: [AdaBatch(policy=LossPlateau(patience=0, threshold=0.2))]),
    'adabatch by noise scale': Setting(
        lambda samples: [AdaBatch(policy=NoiseScale(0.2, '5ba', measure_every=2), max_batch_size=32)], measures_ranks=True
    ),
    'adabatch by norm test': Setting(
        lambda samples: [AdaBatch(policy=NormTest(0.6, '5ba', measure_every=2), max_batch_size=32)], measures_ranks=True
    ),
    # a limit is per rank, so that two ranks may grow further than one
    'seesaw': Setting(lambda samples: [AdaBatch(policy='seesaw', max_batch_size=32)], measures_ranks=True),
    # of each kind of strategy one: gradients and their matching, kernels, ranks, uncertainty, points, draws, scores of the run
    'glister': subset('glister', val_share=0.1),
    'gradmatch': subset('gradmatch'),
    # the batches that it chooses among are those of a rank
    'gradmatch by batch': Setting(
        lambda samples: [SubsetSelection('gradmatch', 0.5, '2ep', selection_type='PerBatch')], measures_ranks=True
    ),
    'craig': subset('craig'),
    'facility-location': subset('facility-location'),
    'el2n': subset('el2n', kappa=0.3),
    'margin': subset('margin'),
    'k-center': subset('k-center'),
    'adaptive-random': subset('adaptive-random', select_every='1ep', val_share=0.1),
    'forgetting': subset('forgetting', select_every='1ep', kappa=0.5),
    'milo': subset('milo', select_every='1ep', kappa=0.25),
    'lin_upper': Setting(lambda samples: [LinUpper(burn_in='0.2dur', global_batch=True)]),
    'eslm': Setting(lambda samples: [ESLM(0.3, global_batch=True)], problem=tokens),
    'all': Setting(
        lambda samples: [
            SubsetSelection('gradmatch', 0.8, '2ep'),
            AdaBatch(2, '2ep', lr_factor=0.75),
            InfoBatch(delta=1.0),
        ]
    ),
}
