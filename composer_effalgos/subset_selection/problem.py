"""One selection problem, as every solver takes it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from composer_effalgos.subset_selection.gradients import LastLayerGradients

__all__ = ['Problem', 'Selection', 'Solver', 'by_label', 'seed_of', 'softmax_targets']

Selection = tuple[Tensor, Tensor]
"""Positions in the problem's rows, int64 ``[k]`` in the order of selection, and weights, float32 ``[k]``."""


@dataclass(frozen=True)
class Problem:
    """Pick ``budget`` of the rows of ``gradients``.

    Attributes:
        gradients (LastLayerGradients): the candidates, N rows.
        budget (int): 1 to N. Solvers may return a few more or less; ``select_subset`` evens it out.
        labels (Tensor | None): int64 ``[N]``, on the device of the gradients.
        reference (LastLayerGradients): validation gradients, or the candidates themselves where there are none.
        reference_labels (Tensor | None): int64, one a row of ``reference``.
        batch_size (int | None): if set, whole batches of this many successive rows are picked (``PerBatch``).
        options (Any): the strategy's options, an instance of its dataclass.
        generator (torch.Generator): on the CPU; the only source of randomness.
        scores (Tensor | None): float ``[N]``, for strategies that rank or draw by a number from outside.
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

    @property
    def item_size(self) -> int:
        """Rows that are picked together: a batch, of which the last may be shorter, or one sample."""
        return self.batch_size or 1

    @property
    def items(self) -> int:
        """Batches, or samples, to pick from."""
        return -(-len(self.gradients) // self.item_size)

    @property
    def item_budget(self) -> int:
        """Items to pick, so that they hold at least ``budget`` rows if all are full."""
        return -(-self.budget // self.item_size)

    def item_means(self, values: Tensor) -> Tensor:
        """Mean of a number per row over each item, ``[N]`` to ``[items]``."""
        if self.batch_size is None:
            return values
        item = torch.arange(len(values), device=values.device) // self.batch_size
        return values.new_zeros(self.items).index_add_(0, item, values) / torch.bincount(item)

    def rows_of(self, items: Tensor, weights: Tensor) -> Selection:
        """The rows that make up some items, each with its item's weight."""
        if self.batch_size is None:
            return items, weights
        rows = items[:, None] * self.batch_size + torch.arange(self.batch_size, device=items.device)
        inside = rows < len(self.gradients)
        return rows[inside], weights[:, None].expand_as(rows)[inside]

    def part(self, rows: Tensor) -> 'Problem':
        """The same problem over some of the rows."""
        labels = None if self.labels is None else self.labels[rows]
        scores = None if self.scores is None else self.scores[rows]
        return replace(self, gradients=self.gradients.take(rows), labels=labels, scores=scores, budget=min(self.budget, len(rows)))


Solver = Callable[[Problem], Selection]


def by_label(labels: Tensor | None, n: int, device: torch.device) -> list[Tensor]:
    """Rows of each label that occurs, smallest label first; one part of all n rows without labels."""
    if labels is None:
        return [torch.arange(n, device=device)]
    return [(labels == label).nonzero()[:, 0] for label in labels.unique()]


def seed_of(generator: torch.Generator) -> int:
    """A seed for another library's generator, drawn from ours."""
    return int(torch.randint(2**31, (), generator=generator))


def softmax_targets(error: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Logits (up to a constant a row) and classes behind the error of a cross-entropy with hard labels.

    That error is ``softmax(logits) - onehot(label)``; without labels, the class is where it is negative.

    Args:
        error (Tensor): float ``[N, C]``.
        labels (Tensor | None): int64 ``[N]``.

    Returns:
        tuple[Tensor, Tensor] | None: logits, float ``[N, C]``, and classes, int64 ``[N]``; ``None`` if the error is not of that form.
    """
    labels = error.argmin(dim=1) if labels is None else labels
    if int(labels.max()) >= error.shape[1]:
        return None
    probability = error + one_hot(labels, error.shape[1])
    if probability.min() < -1e-5 or (probability.sum(dim=1) - 1).abs().max() > 1e-4:
        return None
    return probability.clamp(min=1e-12).log(), labels
