"""The selection problem passed to a solver."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from composer_effalgos.subset_selection.gradients import LastLayerGradients

Selection = tuple[Tensor, Tensor]
"""Row positions in the problem, int64 ``[k]`` in selection order, and weights, float32 ``[k]``."""


@dataclass(frozen=True)
class Problem:
    """Select ``budget`` rows of ``gradients``.

    Attributes:
        gradients (LastLayerGradients): the candidates, N rows.
        budget (int): 1 to N. Solvers may return a few more or fewer; ``select_subset`` trims or fills the result.
        labels (Tensor | None): int64 ``[N]``, on the device of the gradients; float32 targets for a regression strategy.
        reference (LastLayerGradients): validation gradients, or the candidates themselves without a validation set.
        reference_labels (Tensor | None): labels of the rows of ``reference``, as ``labels``.
        reference_scale (float): factor for sums over ``reference``; not 1 for a class without validation samples.
        batch_size (int | None): if set, whole batches of this many consecutive rows are selected (``PerBatch``).
        options (Any): the strategy's options, an instance of its dataclass.
        generator (torch.Generator): on the CPU; the only source of randomness.
        scores (Tensor | None): float ``[N]``, for strategies that rank or sample by external scores.
    """

    gradients: LastLayerGradients
    budget: int
    labels: Tensor | None
    reference: LastLayerGradients
    reference_labels: Tensor | None
    batch_size: int | None
    options: Any
    generator: torch.Generator
    scores: Tensor | None = None
    reference_scale: float = 1.0

    @property
    def item_size(self) -> int:
        """Rows per item: an item is a batch (the last may be shorter) or one sample."""
        return self.batch_size or 1

    @property
    def items(self) -> int:
        """Number of items to select from."""
        return -(-len(self.gradients) // self.item_size)

    @property
    def item_budget(self) -> int:
        """Number of items to select: enough for ``budget`` rows if all items are full."""
        return -(-self.budget // self.item_size)

    def item_means(self, values: Tensor) -> Tensor:
        """Averages per-row values over each item, ``[N]`` to ``[items]``."""
        if self.batch_size is None:
            return values
        item = torch.arange(len(values), device=values.device) // self.batch_size
        return values.new_zeros(self.items).index_add_(0, item, values) / torch.bincount(item)

    def rows_of(self, items: Tensor, weights: Tensor) -> Selection:
        """Expands items to their rows; each row gets the weight of its item."""
        if self.batch_size is None:
            return items, weights
        rows = items[:, None] * self.batch_size + torch.arange(self.batch_size, device=items.device)
        inside = rows < len(self.gradients)
        return rows[inside], weights[:, None].expand_as(rows)[inside]

    def part(self, rows: Tensor) -> 'Problem':
        """Returns the problem restricted to some of the rows; the budget is capped at their number."""
        labels = None if self.labels is None else self.labels[rows]
        scores = None if self.scores is None else self.scores[rows]
        return replace(self, gradients=self.gradients.take(rows), labels=labels, scores=scores, budget=min(self.budget, len(rows)))


Solver = Callable[[Problem], Selection]


def by_label(labels: Tensor | None, n: int, device: torch.device) -> list[Tensor]:
    """Returns the rows of each label that occurs, in ascending label order; without labels, all n rows as one part."""
    if labels is None:
        return [torch.arange(n, device=device)]
    return [(labels == label).nonzero()[:, 0] for label in labels.unique()]


def seed_of(generator: torch.Generator) -> int:
    """Draws a seed for another library's generator."""
    return int(torch.randint(2**31, (), generator=generator))


def softmax_targets(error: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Recovers logits (up to a constant per row) and classes from the error of a cross-entropy with hard labels.

    That error is ``softmax(logits) - onehot(label)``; without labels, the class is its only negative entry.

    Args:
        error (Tensor): float ``[N, C]``.
        labels (Tensor | None): int64 ``[N]``.

    Returns:
        tuple[Tensor, Tensor] | None: logits, float ``[N, C]``, and classes, int64 ``[N]``; ``None`` if the error does not have that form.
    """
    labels = error.argmin(dim=1) if labels is None else labels
    if int(labels.max()) >= error.shape[1]:
        return None
    probability = error + one_hot(labels, error.shape[1])
    if probability.min() < -1e-5 or (probability.sum(dim=1) - 1).abs().max() > 1e-4:
        return None
    return probability.clamp(min=1e-12).log(), labels
