"""Trains every row of the table on the ranks there are, and notes what each epoch trained on; run by a test through the launcher."""

import sys
from pathlib import Path
from typing import Any

import torch
from algorithm_settings import SETTINGS  # beside this script
from composer import Trainer
from composer.core import Callback
from composer.optim import LinearScheduler
from composer.utils import dist
from torch.utils.data import DataLoader

from composer_effalgos import Pruning
from composer_effalgos.plan import EpochPlanner

SAMPLES, BATCH = 96, 16


class Epochs(Callback):
    """What each epoch trains on: this rank's samples in their order, their weights, the number of batches and the learning rates."""

    def __init__(self) -> None:
        self.orders, self.weights, self.batches, self.lrs = [], [], [], []

    def batch_start(self, state, logger):
        self.lrs.append(state.optimizers[0].param_groups[0]['lr'])

    def epoch_end(self, state, logger):
        loader = EpochPlanner.of(state).loader
        weights = loader.plan.rank_weights(loader.rank, loader.world_size)
        self.orders.append(loader.rank_order.tolist())
        self.weights.append([1.0] * len(loader.rank_order) if weights is None else weights.tolist())
        self.batches.append(len(loader))


def all_scores(algorithm: Pruning) -> torch.Tensor:
    """The score of each sample, in the order of the samples; of sharded ones each rank knows its own alone."""
    if not algorithm.shard:
        return algorithm.scores
    parts = dist.all_gather_object(algorithm.scores)
    whole = torch.empty(sum(map(len, parts)))
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def train(row: str) -> dict[str, Any]:
    """What one row came to, on this rank."""
    torch.manual_seed(0)
    dataset, model = SETTINGS[row].problem(SAMPLES)
    algorithms, epochs = SETTINGS[row].algorithms(SAMPLES), Epochs()
    sampler = dist.get_sampler(dataset, shuffle=True)
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(dataset, batch_size=BATCH // dist.get_world_size(), sampler=sampler),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        schedulers=LinearScheduler(),
        max_duration='6ep',
        algorithms=algorithms,
        callbacks=[epochs],
        device='cpu',
        seed=1,
        progress_bar=False,
    )
    trainer.fit()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    scores = [all_scores(algorithm) for algorithm in algorithms if isinstance(algorithm, Pruning) and algorithm.rule.history]
    trainer.close()
    return {**vars(epochs), 'model': weights, 'scores': scores}


def main() -> None:
    torch.set_num_threads(1)
    dist.initialize_dist('cpu')
    everyone = dist.all_gather_object({row: train(row) for row in SETTINGS})
    if dist.get_global_rank() == 0:
        torch.save(everyone, Path(sys.argv[1]) / 'ranks.pt')


if __name__ == '__main__':
    main()
