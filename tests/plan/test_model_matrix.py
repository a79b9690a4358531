"""Kinds of model in one table: InfoBatch leaves each one's own loss as it is, and weighs its samples, or refuses in one line."""

import copy
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer.core import Callback
from composer.loss import binary_cross_entropy_with_logits
from composer.models import ComposerClassifier, ComposerModel, HuggingFaceModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from composer_effalgos import InfoBatch, InputError
from composer_effalgos.plan import EpochPlanner, WeightedLoss

transformers = pytest.importorskip('transformers')
F = nn.functional
SAMPLES, BATCH, WORDS, LENGTH = 24, 8, 17, 6


# ---------------------------------------------------------------------- data


class Rows(Dataset):
    """A dict of tensors, sample by sample."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


INPUTS = torch.randn(SAMPLES, 8, generator=generator())
CLASSES = torch.arange(SAMPLES) % 3
SOFT = torch.rand(SAMPLES, 3, generator=generator()).softmax(dim=1)
HOT = (SOFT > 0.3).float()
IMAGES = torch.randn(SAMPLES, 3, 8, 8, generator=generator())
TOKENS = torch.randint(2, WORDS, (SAMPLES, LENGTH), generator=generator())
REAL = torch.arange(LENGTH) < 3 + torch.arange(SAMPLES)[:, None] % 4  # sentences of 3 to 6 tokens
MASK = REAL.long()
LABELS = TOKENS.masked_fill(~REAL, -100)


def pixels(ignored: int) -> Tensor:
    labels = (IMAGES[:, 0] > 0).long() + (IMAGES[:, 1] > 0).long()
    labels[::3, :2] = ignored
    return labels


def language(**columns: Tensor) -> Rows:
    return Rows(input_ids=TOKENS, attention_mask=MASK, **columns)


# ---------------------------------------------------------------------- models of one's own


def net(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, outputs))


def classifier(loss_fn: Any = None, module: nn.Module | None = None) -> ComposerClassifier:
    return ComposerClassifier(module or net(), num_classes=3, **({} if loss_fn is None else {'loss_fn': loss_fn}))


class Own(ComposerModel):
    """A model of one's own; ``loss`` is a function of the logits and the targets."""

    def __init__(self, function: Callable[..., Any], outputs: Callable[[Tensor], Any] = lambda logits: logits) -> None:
        super().__init__()
        self.net, self.function, self.outputs = net(), function, outputs

    def forward(self, batch: Any) -> Any:
        return self.outputs(self.net(batch[0]))

    def loss(self, outputs: Any, batch: Any) -> Any:
        return self.function(outputs, batch[1])


class OwnWithReduction(Own):
    def loss(self, outputs: Any, batch: Any, reduction: str = 'mean') -> Any:
        return self.function(outputs, batch[1], reduction=reduction)


class IgnoresReduction(Own):
    """With the signature of Composer's own abstract method."""

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(outputs, batch[1])


class PassesOn(Own):
    """To a module that takes no reduction."""

    def loss(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        return nn.CrossEntropyLoss()(outputs, batch[1], *args, **kwargs)


class Decayed(Own):
    """Returns its weight decay as a loss of its own."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        return self.function(outputs, batch[1]), decay(self, batch)


class DecayedWithReduction(Own):
    def loss(self, outputs: Any, batch: Any, reduction: str = 'mean') -> Any:
        return self.function(outputs, batch[1], reduction=reduction), decay(self, batch)


def decay(model: ComposerModel, batch: Any) -> Tensor:
    return 1e-3 * sum(parameter.square().sum() for parameter in model.parameters())


class Router(OwnWithReduction):
    """Has a term for the whole batch beside the outputs."""

    def loss(self, outputs: Any, batch: Any, reduction: str = 'mean') -> Any:
        loss = super().loss(outputs, batch, reduction)
        return loss if reduction == 'none' else loss + gate_loss(self, batch)


def gate_loss(model: ComposerModel, batch: Any) -> Tensor:
    return model.net[0](batch[0]).softmax(dim=1).mean(dim=0).square().sum()


class LossInForward(ComposerModel):
    """Returns its loss with its outputs, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, batch: Any) -> dict[str, Tensor]:
        logits = self.net(batch[0])
        return {'loss': F.cross_entropy(logits, batch[1]), 'logits': logits}

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return outputs['loss']


class Temperature(Own):
    """Has a parameter in its loss."""

    def __init__(self) -> None:
        super().__init__(F.cross_entropy)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs * self.scale, batch[1])


class Uncertain(Temperature):
    """Learns the factor of its loss."""

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1]) * (-self.scale).exp() + self.scale


class Pops(Own):
    """Takes the labels out of its batch, as nobody but the loss reads them."""

    def forward(self, batch: Any) -> Tensor:
        return super().forward((batch['inputs'],))

    def loss(self, outputs: Any, batch: Any) -> Any:
        return self.function(outputs, batch.pop('labels'))


class PopsWithReduction(Pops):
    def loss(self, outputs: Any, batch: Any, reduction: str = 'mean') -> Any:
        return self.function(outputs, batch.pop('labels'), reduction=reduction)


class Counts(Own):
    """Its loss grows with each call, slowly enough to pass for the same."""

    calls = 0

    def loss(self, outputs: Any, batch: Any) -> Any:
        self.calls += 1
        return super().loss(outputs, batch) * (1 + 1e-5 * self.calls)


class CountsElsewhere(Own):
    """Keeps its count, and its draws of noise, in objects and containers."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.seen = {'calls': Counter(), 'losses': deque(maxlen=3), 'batches': [set()]}
        self.state = SimpleNamespace(calls=[0], sums=np.zeros(2))
        self.generator = torch.Generator().manual_seed(0)

    def loss(self, outputs: Any, batch: Any) -> Any:
        self.seen['calls']['loss'] += 1
        self.seen['losses'].append(self.seen['calls']['loss'])
        self.seen['batches'][0].add(self.state.calls[0])
        self.state.calls[0] += 1
        self.state.sums += 1
        counts = [
            self.seen['calls']['loss'],
            sum(self.seen['losses']),
            len(self.seen['batches'][0]),
            *self.state.calls,
            self.state.sums.sum(),
        ]
        return super().loss(outputs, batch) * (1 + 1e-6 * float(sum(counts)) + 1e-6 * torch.rand((), generator=self.generator))


class CountsWithReduction(Own):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self.register_buffer('calls', torch.zeros(()))

    def loss(self, outputs: Any, batch: Any, reduction: str = 'mean') -> Any:
        self.calls += 1
        return self.function(outputs, batch[1], reduction=reduction) * (1 + 1e-5 * self.calls)


class Averages(Own):
    """Keeps a moving average of its outputs, and takes it from them."""

    centre = torch.zeros(3)

    def loss(self, outputs: Any, batch: Any) -> Any:
        self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(dim=0)
        return super().loss(outputs - self.centre, batch)


class Contrastive(ComposerModel):
    """Each sample's loss depends on all the others."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch[0])

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


def twice(logits: Tensor, targets: Tensor, reduction: str = 'mean') -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits, targets, reduction=reduction), F.cross_entropy(2 * logits, targets, reduction=reduction)


def variances(logits: Tensor, targets: Tensor) -> Tensor:
    return F.gaussian_nll_loss(logits, targets, logits.detach().exp() + 0.1 * logits.square(), full=True)


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, targets, reduction='none')
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def some_numbers(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over the numbers that are known, by hand."""
    known = (targets > 0.2).float()
    return ((logits - targets).abs() * known).sum() / known.sum()


def hard_ones(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, targets, reduction='none')
    return (losses * (losses > losses.median())).sum() / 4


def hard_ones_alone(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, targets, reduction='none')
    return losses[losses > losses.median()].mean()


def hardest(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction='none').topk(4).values.mean()


def hard_or_none(logits: Tensor, targets: Tensor, reduction: str = 'mean') -> Tensor:
    losses = F.cross_entropy(logits, targets, reduction='none')
    losses = losses * (losses > losses.median())
    return losses if reduction == 'none' else losses.mean()


def named(logits: Tensor, targets: Tensor, reduction: str = 'mean') -> dict[str, Tensor]:
    return dict(zip('ab', twice(logits, targets, reduction), strict=True))


def totalled(logits: Tensor, targets: Tensor, reduction: str = 'mean') -> dict[str, Tensor]:
    losses = named(logits, targets, reduction)
    return {**losses, 'total': losses['a'] + 0.5 * losses['b']}


# ---------------------------------------------------------------------- Hugging Face


BERT = {'vocab_size': WORDS, 'hidden_size': 8, 'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 8,
        'max_position_embeddings': LENGTH, 'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}  # fmt: skip


def bert(head: str, **options: Any) -> HuggingFaceModel:
    return HuggingFaceModel(getattr(transformers, head)(transformers.BertConfig(**BERT, **options)))


def gpt2(wrapper: type = HuggingFaceModel, **options: Any) -> HuggingFaceModel:
    config = transformers.GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0,
                                     attn_pdrop=0, use_cache=False)  # fmt: skip
    return wrapper(transformers.GPT2LMHeadModel(config), **options)


def t5() -> HuggingFaceModel:
    config = transformers.T5Config(vocab_size=WORDS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0,
                                   decoder_start_token_id=0)  # fmt: skip
    return HuggingFaceModel(transformers.T5ForConditionalGeneration(config))


def mixtral(coefficient: float) -> HuggingFaceModel:
    config = transformers.MixtralConfig(vocab_size=WORDS, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                                        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True,
                                        router_aux_loss_coef=coefficient, max_position_embeddings=LENGTH, use_cache=False)  # fmt: skip
    return HuggingFaceModel(transformers.MixtralForCausalLM(config))


def electra() -> HuggingFaceModel:
    return HuggingFaceModel(transformers.ElectraForPreTraining(transformers.ElectraConfig(**BERT, embedding_size=8)))


def segformer() -> HuggingFaceModel:
    config = transformers.SegformerConfig(num_encoder_blocks=1, depths=[1], sr_ratios=[1], hidden_sizes=[8], num_attention_heads=[1],
                                          patch_sizes=[3], strides=[2], mlp_ratios=[1], decoder_hidden_size=8, num_labels=3,
                                          hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0,
                                          drop_path_rate=0.0)  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config)
    model.decode_head.batch_norm = nn.Identity()  # a sample alone has no batch to be normalised with
    return HuggingFaceModel(model)


class OwnLanguageModel(transformers.PreTrainedModel):
    """Outside transformers' registry, so Composer does not know that its loss shifts the labels."""

    config_class = transformers.GPT2Config

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.embedding(input_ids).tanh())
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def own_language_model() -> HuggingFaceModel:
    return HuggingFaceModel(OwnLanguageModel(transformers.GPT2Config()))


class Smoothed(HuggingFaceModel):
    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return F.cross_entropy(outputs['logits'][:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten(), label_smoothing=0.1)


class ZLoss(HuggingFaceModel):
    def loss(self, outputs: Any, batch: Any) -> Tensor:
        return super().loss(outputs, batch) + 1e-4 * outputs['logits'].logsumexp(dim=-1).square().mean()


class Focal(HuggingFaceModel):
    def loss(self, outputs: Any, batch: Any) -> Tensor:
        losses = F.cross_entropy(outputs['logits'].flatten(0, 1), batch['labels'].flatten(), reduction='none')
        return ((1 - (-losses).exp()) ** 2 * losses).mean()


class Masked(HuggingFaceModel):
    """Averages over the tokens by hand."""

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        losses = F.cross_entropy(outputs['logits'].flatten(0, 1), batch['input_ids'].flatten(), reduction='none')
        mask = batch['attention_mask'].flatten()
        return (losses * mask).sum() / mask.sum()


def by_tokens(batch: Any) -> Tensor:
    return (batch['labels'] != -100).flatten(1).sum(dim=1).float()


def by_shifted_tokens(batch: Any) -> Tensor:
    return (batch['labels'][:, 1:] != -100).sum(dim=1).float()


def by_mask(batch: Any) -> Tensor:
    return batch['attention_mask'].sum(dim=1).float()


def whole(batch: Any) -> Tensor:
    """Of a sum, which is divided by no count."""
    return torch.ones(len(batch[1]))


def evenly(batch: Any) -> Tensor:
    return torch.ones(len(batch['labels'] if isinstance(batch, dict) else batch[1]))


# ---------------------------------------------------------------------- the table


@dataclass
class Kind:
    """A kind of model: how to make it, its data, and how much each sample counts in the mean over a batch."""

    model: Callable[[], ComposerModel]
    data: Dataset
    counts: Callable[[Any], Tensor] = evenly
    refused: str | None = None  # what is said
    batch_term: Callable[[ComposerModel, Any], Tensor] | None = None  # what the loss has for the whole batch


VECTORS, CLASS_WEIGHTS = TensorDataset(INPUTS, CLASSES), torch.tensor([0.5, 1.0, 3.0])
SENTENCES, SOME_IGNORED = language(labels=LABELS), CLASSES.masked_fill(torch.arange(SAMPLES) % 5 == 0, -100)


FEW = CLASSES.masked_fill(torch.arange(SAMPLES) % (2 * BATCH) > 2, -1)  # every second batch has no label


def labelled_only(logits: Tensor, targets: Tensor) -> Tensor:
    rows = targets >= 0
    return F.cross_entropy(logits[rows], targets[rows]) if rows.any() else 0 * logits.sum()


def halves(logits: Tensor) -> tuple[Tensor, Tensor]:
    return logits[:, :2], logits[:, 2:]


def two_outputs(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """Of which one is a loss of torch whose node shows its samples, and the other is not."""
    return F.cross_entropy(outputs[0], targets.clamp(max=1)) + (outputs[1].sigmoid() - 0.3).abs().mean()


def with_source(outputs: tuple[Tensor, Tensor], targets: Tensor, reduction: str = 'mean') -> Tensor:
    losses = F.cross_entropy(outputs[1], targets, reduction='none') + 0.5 * outputs[0].square().mean(dim=1)
    return losses if reduction == 'none' else losses.mean()


def router_loss(model: ComposerModel, batch: Any) -> Tensor:
    return model.config.router_aux_loss_coef * model(batch)['aux_loss']


KINDS = {
    'classifier': Kind(classifier, VECTORS),
    'class weights': Kind(lambda: classifier(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)), VECTORS, lambda b: CLASS_WEIGHTS[b[1]]),
    'ignored labels': Kind(lambda: classifier(nn.CrossEntropyLoss()), TensorDataset(INPUTS, SOME_IGNORED), lambda b: (b[1] >= 0).float()),
    'label smoothing': Kind(lambda: classifier(nn.CrossEntropyLoss(label_smoothing=0.1)), VECTORS),
    'function': Kind(lambda: classifier(lambda logits, targets: F.cross_entropy(logits, targets)), VECTORS),
    'multi-label': Kind(lambda: classifier(binary_cross_entropy_with_logits), TensorDataset(INPUTS, HOT)),
    'sum': Kind(lambda: classifier(nn.CrossEntropyLoss(reduction='sum')), VECTORS, lambda b: torch.full((len(b[1]),), 1.0)),
    'regression': Kind(lambda: classifier(F.mse_loss), TensorDataset(INPUTS, SOFT)),
    'Huber without reduction': Kind(lambda: Own(F.huber_loss), TensorDataset(INPUTS, SOFT)),
    'segmentation': Kind(lambda: classifier(F.cross_entropy, nn.Conv2d(3, 3, 1)), TensorDataset(IMAGES, pixels(-100)),
                         lambda b: (b[1] >= 0).flatten(1).sum(dim=1).float()),
    'soft labels': Kind(classifier, TensorDataset(INPUTS, SOFT)),
    'reduction': Kind(lambda: OwnWithReduction(F.cross_entropy), VECTORS),
    'no reduction': Kind(lambda: Own(F.cross_entropy), VECTORS),
    'nothing to read': Kind(lambda: Own(lambda o, t: (o - F.one_hot(t, 3)).norm()), VECTORS, refused="takes no reduction='none'"),
    'reduction ignored': Kind(lambda: IgnoresReduction(F.cross_entropy), VECTORS),
    'reduction ignored, by hand': Kind(lambda: IgnoresReduction(focal), VECTORS),
    'reduction passed on': Kind(lambda: PassesOn(F.cross_entropy), VECTORS),
    'weight decay': Kind(lambda: Decayed(F.cross_entropy), VECTORS, batch_term=decay),
    'weight decay and reduction': Kind(lambda: DecayedWithReduction(F.cross_entropy), VECTORS, batch_term=decay),
    'soft labels without reduction': Kind(lambda: Own(F.cross_entropy), TensorDataset(INPUTS, SOFT)),
    'soft labels by hand': Kind(lambda: Own(lambda o, t: -(t * o.log_softmax(dim=1)).sum(dim=1).mean()), TensorDataset(INPUTS, SOFT)),
    'weighted targets': Kind(lambda: Own(lambda o, t: ((o - t) ** 2 * CLASS_WEIGHTS).mean()), TensorDataset(INPUTS, SOFT)),
    'L1': Kind(lambda: Own(F.l1_loss), TensorDataset(INPUTS, SOFT)),
    'L1 by hand': Kind(lambda: Own(lambda o, t: torch.mean((o - t).abs())), TensorDataset(INPUTS, SOFT)),
    'L1 of some numbers': Kind(lambda: Own(some_numbers), TensorDataset(INPUTS, SOFT), lambda b: (b[1] > 0.2).sum(dim=1).float()),
    'Gaussian': Kind(lambda: Own(variances), TensorDataset(INPUTS, SOFT)),
    'KL': Kind(lambda: Own(lambda o, t: F.kl_div(o.log_softmax(dim=1), t, reduction='batchmean')), TensorDataset(INPUTS, SOFT)),
    'Poisson': Kind(lambda: Own(F.poisson_nll_loss), TensorDataset(INPUTS, SOFT)),
    'own focal': Kind(lambda: Own(focal), VECTORS),
    'sum without reduction': Kind(lambda: Own(lambda o, t: F.cross_entropy(o, t, reduction='sum')), VECTORS, whole),
    'sum over a constant': Kind(lambda: Own(lambda o, t: F.cross_entropy(o, t, reduction='sum') / BATCH), VECTORS, whole),
    'sum over the batch': Kind(lambda: Own(lambda o, t: F.l1_loss(o, t, reduction='sum') / len(o)), TensorDataset(INPUTS, SOFT)),
    'hard ones by a mask': Kind(lambda: Own(hard_ones), VECTORS, refused='depend on the rest of the batch'),
    'hard ones by index': Kind(lambda: Own(hard_ones_alone), VECTORS, refused='depend on the rest of the batch'),
    'hardest': Kind(lambda: Own(hardest), VECTORS, refused='a mean over 4 rows of 8 samples'),
    'hard ones with reduction': Kind(lambda: OwnWithReduction(hard_or_none), VECTORS, refused='depend on the rest of the batch'),
    'one by one': Kind(lambda: Own(lambda o, t: sum(F.cross_entropy(o[i], t[i]) for i in range(len(t))) / len(t)), VECTORS,
                       refused='it computes the loss of one sample at a time'),
    'one by one, stacked': Kind(lambda: Own(lambda o, t: torch.stack([F.cross_entropy(o[i], t[i]) for i in range(len(t))]).mean()),
                                VECTORS),
    'takes its labels away': Kind(lambda: Pops(F.cross_entropy), Rows(inputs=INPUTS, labels=CLASSES)),
    'takes its labels away, reduction': Kind(lambda: PopsWithReduction(F.cross_entropy), Rows(inputs=INPUTS, labels=CLASSES)),
    'counts its calls': Kind(lambda: Counts(F.cross_entropy), VECTORS),
    'counts its calls, reduction': Kind(lambda: CountsWithReduction(F.cross_entropy), VECTORS),
    'counts its calls elsewhere': Kind(lambda: CountsElsewhere(F.cross_entropy), VECTORS),
    'counts no sample in some batches': Kind(lambda: Own(labelled_only), TensorDataset(INPUTS, FEW)),
    'two outputs, two losses': Kind(lambda: Own(two_outputs, halves), VECTORS),
    'two outputs, one loss in reduction': Kind(
        lambda: OwnWithReduction(lambda o, t, reduction='mean': {'a': F.cross_entropy(o[0], t.clamp(max=1), reduction=reduction),
                                                                 'b': o[1].sigmoid().mean()}, halves),
        VECTORS, refused='do not depend on all outputs on which the loss depends'),
    'two outputs, one for the whole batch': Kind(
        lambda: Own(lambda o, t: F.cross_entropy(o[0], t.clamp(max=1)) + o[1].std(), halves), VECTORS, refused='reads another output'),
    'an output and its source': Kind(lambda: Own(with_source, lambda logits: (logits, logits.tanh())), VECTORS),
    'an output and its source, reduction': Kind(
        lambda: OwnWithReduction(with_source, lambda logits: (logits, logits.tanh())), VECTORS),
    'moving average': Kind(lambda: Averages(F.cross_entropy), VECTORS, refused='a different value each time it is computed'),
    'noise': Kind(lambda: Own(lambda o, t: F.cross_entropy(o + torch.randn_like(o), t)), VECTORS,
                  refused='a different value each time it is computed'),
    'root of a mean': Kind(lambda: Own(lambda o, t: F.mse_loss(o, t).sqrt()), TensorDataset(INPUTS, SOFT),
                           refused='more than a weighted mean'),
    'learned factor': Kind(Uncertain, VECTORS, refused='more than a weighted mean'),
    'tuple of losses': Kind(lambda: OwnWithReduction(twice), VECTORS),
    'tuple without reduction': Kind(lambda: Own(lambda o, t: twice(o, t)), VECTORS),
    'dict of losses': Kind(lambda: OwnWithReduction(named), VECTORS),
    'dict with total': Kind(lambda: OwnWithReduction(totalled), VECTORS),
    'dict outputs': Kind(lambda: OwnWithReduction(lambda o, t, reduction='mean': F.cross_entropy(o['x'], t, reduction=reduction),
                                                  lambda logits: {'x': logits}), VECTORS),
    'dict outputs, another loss': Kind(
        lambda: OwnWithReduction(lambda o, t, reduction='mean': F.cross_entropy(
            o['x'], t, reduction=reduction, label_smoothing=0.1 * (reduction == 'mean')), lambda logits: {'x': logits}),
        VECTORS, refused='another gradient at the outputs'),
    'term beside the outputs': Kind(lambda: Router(F.cross_entropy), VECTORS, batch_term=gate_loss),
    'term in the outputs': Kind(lambda: Own(lambda o, t: F.cross_entropy(o, t) + 0.01 * o.square().mean()), VECTORS),
    'root in the outputs': Kind(lambda: Own(lambda o, t: F.cross_entropy(o, t) + 0.01 * o.norm()), VECTORS,
                                refused='a further term in it reads the outputs'),
    'loss in forward': Kind(LossInForward, VECTORS),
    'parameter in the loss': Kind(Temperature, VECTORS),
    'contrastive': Kind(Contrastive, VECTORS, refused='outputs of other samples'),
    'GPT-2': Kind(gpt2, SENTENCES, by_shifted_tokens),
    'GPT-2, shift_labels': Kind(lambda: gpt2(shift_labels=True), SENTENCES, by_shifted_tokens),
    'GPT-2 with tuples': Kind(lambda: tuples(gpt2()), SENTENCES, by_shifted_tokens),
    'own language model': Kind(own_language_model, SENTENCES, by_shifted_tokens),
    'smoothed': Kind(lambda: gpt2(Smoothed), SENTENCES, by_shifted_tokens),
    'z-loss': Kind(lambda: gpt2(ZLoss), language(labels=TOKENS)),
    'focal': Kind(lambda: gpt2(Focal), SENTENCES),
    'masked by hand': Kind(lambda: gpt2(Masked), SENTENCES, by_mask),
    'T5': Kind(t5, SENTENCES, by_tokens),
    'Mixtral 0.001': Kind(lambda: mixtral(0.001), SENTENCES, by_shifted_tokens, batch_term=router_loss),
    'Mixtral 0.02': Kind(lambda: mixtral(0.02), SENTENCES, by_shifted_tokens, batch_term=router_loss),
    'BERT masked': Kind(lambda: bert('BertForMaskedLM'), SENTENCES, by_tokens),
    'BERT pre-training': Kind(lambda: bert('BertForPreTraining'), language(labels=TOKENS, next_sentence_label=CLASSES % 2)),
    'BERT tokens': Kind(lambda: bert('BertForTokenClassification', num_labels=WORDS), SENTENCES, by_tokens),
    'BERT classes': Kind(lambda: bert('BertForSequenceClassification', num_labels=3), language(labels=CLASSES)),
    'BERT several labels': Kind(lambda: bert('BertForSequenceClassification', num_labels=3), language(labels=HOT)),
    'BERT regression': Kind(lambda: bert('BertForSequenceClassification', num_labels=1), language(labels=SOFT[:, 0].contiguous())),
    'Electra': Kind(electra, language(labels=(TOKENS > 8).long()), by_mask),
    'Segformer': Kind(segformer, Rows(pixel_values=IMAGES, labels=pixels(255)),
                      lambda b: (b['labels'] != 255).flatten(1).sum(dim=1).float()),
}  # fmt: skip


def tuples(model: HuggingFaceModel) -> HuggingFaceModel:
    model.config.return_dict = False
    return model


# ---------------------------------------------------------------------- the tests


def fit(make_trainer, kind: Kind, algorithms: list, duration: str, callbacks: list = (), **settings: Any):
    torch.manual_seed(0)
    model = kind.model()
    loader = DataLoader(kind.data, batch_size=BATCH)
    trainer = make_trainer(algorithms, model=model, train_loader=loader, lr=0.05, max_duration=duration, callbacks=callbacks, **settings)
    trainer.fit()
    return trainer


@pytest.mark.parametrize('name', KINDS)
def test_without_weights_it_is_plain_composer_bit_by_bit(name, make_trainer, weights_of):
    kind = KINDS[name]
    if kind.refused is not None:
        message = rf'^{type(kind.model()).__name__}\.loss: .*{kind.refused}.*; pass InfoBatch\(per_sample_loss='
        with pytest.raises(InputError, match=message) as said:
            fit(make_trainer, kind, [InfoBatch(prune_ratio=0)], '2ep')
        assert '\n' not in str(said.value)
        return
    plain, ours = (fit(make_trainer, kind, algorithms, '2ep') for algorithms in ([], [InfoBatch(prune_ratio=0)]))
    assert torch.equal(weights_of(plain), weights_of(ours))
    assert torch.isfinite(ours.state.algorithms[0].scores).all()


def total(loss: Any) -> Tensor:
    """As Composer's trainer has it."""
    losses = [loss['total']] if isinstance(loss, dict) and 'total' in loss else loss.values() if isinstance(loss, dict) else loss
    return loss.mean() if isinstance(loss, Tensor) else sum(each.mean() for each in losses)


def sample_of(batch: Any, index: int) -> Any:
    if isinstance(batch, dict):
        return {name: value[index : index + 1] for name, value in batch.items()}
    return [value[index : index + 1] for value in batch]


def reference(kind: Kind, model: ComposerModel, batch: Any, weights: Tensor) -> Tensor:
    """``sum(w_i c_i l_i) / M`` with each sample alone in the model, and what the loss has for the whole batch."""
    counts = kind.counts(batch)
    divisor = 1 if kind.counts is whole or getattr(getattr(model, '_loss_fn', None), 'reduction', 'mean') == 'sum' else counts.sum()
    loss = torch.zeros(())
    for index, (weight, count) in enumerate(zip(weights, counts, strict=True)):
        if count > 0:
            alone = sample_of(batch, index)
            term = 0 if kind.batch_term is None else kind.batch_term(model, alone)
            loss = loss + weight * count * (total(model.loss(model(alone), copy.copy(alone))) - term) / divisor
    return loss if kind.batch_term is None else loss + kind.batch_term(model, batch)


class Compare(Callback):
    """Holds the gradients and losses of weighted batches against the reference."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.compared = kind, 0

    def before_forward(self, state, logger):
        loss = EpochPlanner.of(state).loss
        self.weights = None if loss._weights is None else loss._weights[loss._window]
        self.twin = None
        if self.weights is not None:
            self.batch = copy.copy(state.batch)  # the loss may pop from it
            torch.manual_seed(0)
            self.twin = self.kind.model()  # never compiled
            self.twin.load_state_dict({name.replace('_orig_mod.', ''): value for name, value in state.model.state_dict().items()})

    def after_backward(self, state, logger):
        if self.twin is None or self.compared == 2:
            return
        self.twin.zero_grad()
        expected = reference(self.kind, self.twin, self.batch, self.weights)
        expected.backward()
        assert total(state.loss).item() == pytest.approx(expected.item(), rel=1e-5)
        for ours, theirs in zip(state.model.parameters(), self.twin.parameters(), strict=True):
            if theirs.grad is not None:
                assert (ours.grad - theirs.grad).norm() <= 1e-5 * (1 + theirs.grad.norm())
        self.compared += not torch.equal(self.weights, torch.ones_like(self.weights))


@pytest.mark.parametrize('name', [name for name, kind in KINDS.items() if kind.refused is None and not name.startswith('counts')])
def test_weighted_gradients_are_those_of_a_straight_loop(name, make_trainer):
    compare = Compare(KINDS[name])
    trainer = fit(make_trainer, KINDS[name], [InfoBatch(delta=1.0)], '3ep', [compare])
    assert trainer.state.algorithms[0].samples_saved > 0
    assert compare.compared == 2


@pytest.mark.parametrize('name', ['own language model', 'loss in forward'])
def test_a_compiled_model_hides_its_loss_and_gets_a_correction(name, make_trainer, weights_of):
    compiled = {'compile_config': {'backend': 'aot_eager'}}
    plain, ours = (fit(make_trainer, KINDS[name], algorithms, '2ep', **compiled) for algorithms in ([], [InfoBatch(prune_ratio=0)]))
    assert torch.equal(weights_of(plain), weights_of(ours))
    compare = Compare(KINDS[name])
    fit(make_trainer, KINDS[name], [InfoBatch(delta=1.0)], '3ep', [compare], **compiled)
    assert compare.compared == 2


@pytest.mark.parametrize(
    'name',
    ['classifier', 'label smoothing', 'segmentation', 'loss in forward', 'GPT-2', 'own language model', 'smoothed', 'T5', 'masked by hand',
     'BERT pre-training', 'BERT several labels', 'BERT regression', 'Electra'],
)  # fmt: skip
def test_a_samples_loss_is_that_of_the_sample_alone(name):
    """Outside a training step too, and with its gradient, as a selection by gradients needs it."""
    kind = KINDS[name]
    torch.manual_seed(0)
    model = kind.model()
    batch = next(iter(DataLoader(kind.data, batch_size=BATCH)))
    ours = WeightedLoss(model).per_sample(model(batch), batch)
    assert ours.shape == (BATCH,)
    for index in range(BATCH):
        alone = sample_of(batch, index)
        theirs = model.loss(model(alone), alone)
        scale = kind.counts(batch)[index] / batch[1][0].numel() if name == 'segmentation' else 1  # ignored pixels count as 0
        assert ours[index].item() == pytest.approx(theirs.item() * float(scale), rel=1e-5)
        gradients = [
            torch.autograd.grad(loss, list(model.parameters())[-1], retain_graph=True)[0] for loss in (ours[index], theirs * scale)
        ]
        assert torch.allclose(*gradients, atol=1e-6)


def test_the_loss_of_routers_is_one_of_the_batch():
    """Also where their logits have a row per sample; the hidden states that they were computed from are outputs too."""

    class Switch(HuggingFaceModel):
        def forward(self, batch: Any) -> Any:
            return self.model(**batch, output_router_logits=True)

    config = transformers.SwitchTransformersConfig(
        vocab_size=WORDS, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=2, dropout_rate=0.0,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Switch(transformers.SwitchTransformersForConditionalGeneration(config))
    words = torch.randint(1, WORDS, (BATCH, LENGTH))
    batch = {'input_ids': words, 'attention_mask': torch.ones_like(words), 'labels': words}
    outputs = model(batch)
    weighted, seen = WeightedLoss(model), []
    weighted.subscribers.append(lambda losses, *_: seen.append(losses))
    weighted.begin_fit()
    weighted.start_batch(slice(0, BATCH))
    weighted.start_microbatch()
    assert weighted(outputs, batch) is outputs['loss']
    (losses,) = seen
    expected = F.cross_entropy(outputs['logits'].transpose(1, 2), words, reduction='none').mean(dim=1)
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert outputs['loss'] > expected.mean()
