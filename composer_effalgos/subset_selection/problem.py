"""One selection problem, as every solver takes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from composer_effalgos.subset_selection.gradients import LastLayerGradients

__all__ = ['Problem', 'Selection', 'Solver', 'seed_of', 'softmax_targets']

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
        options (Mapping[str, Any]): the strategy's options, all present and checked.
        generator (torch.Generator): on the CPU; the only source of randomness.
    """

    gradients: LastLayerGradients
    budget: int
    labels: Tensor | None
    reference: LastLayerGradients
    reference_labels: Tensor | None
    batch_size: int | None
    options: Mapping[str, Any]
    generator: torch.Generator

    @property
    def batches(self) -> list[Tensor]:
        """Rows of each batch, the last one maybe shorter; ``PerBatch`` only."""
        assert self.batch_size is not None
        return list(torch.arange(len(self.gradients)).split(self.batch_size))

    @property
    def batch_budget(self) -> int:
        """Batches to pick, so that they hold at least ``budget`` rows if all are full."""
        assert self.batch_size is not None
        return -(-self.budget // self.batch_size)


Solver = Callable[[Problem], Selection]


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
    probability = error.scatter_add(1, labels[:, None], torch.ones_like(error[:, :1]))
    if probability.min() < -1e-5 or (probability.sum(dim=1) - 1).abs().max() > 1e-4:
        return None
    return probability.clamp(min=1e-12).log(), labels
