"""RCAP: each class gets a quota based on its loss, filled with samples drawn by their losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from composer_effalgos.plan import SampleRows
from composer_effalgos.pruning.rules.rule import Epoch, Kept, PruningRule, num_kept
from composer_effalgos.utils.checks import check_number


@dataclass
class RcapRule(PruningRule):
    """Divides the fraction ``1 - prune_ratio`` over the classes, and prefers high losses within each class.

    The quota of a class with ``n`` samples is proportional to ``sqrt(n * L)``, where ``L`` is the mean of its losses, clipped to
    ``[0, clip]``. Within a class, samples are drawn without replacement with probabilities ``softmax(loss / beta)``. Hassan et al., "RCAP:
    Robust, Class-Aware, Probabilistic Dynamic Dataset Pruning", UAI 2025, arXiv 2606.11761.

    Args:
        beta: Temperature, greater than 0; the authors try 1/3, 1/2, 1, 2 and 3.
        clip: Upper limit for losses; ``None`` for ``log C`` with ``C`` classes, the loss of a uniform prediction.
    """

    beta: float = 1.0
    clip: float | None = None

    needs_labels = True

    def __post_init__(self) -> None:
        check_number('rule.beta', self.beta, above=0)
        if self.clip is not None:
            check_number('rule.clip', self.clip, above=0)

    def keep(self, table: SampleRows, epoch: Epoch) -> Kept:
        assert epoch.labels is not None, 'needs_labels'
        _, classes, sizes = epoch.labels.unique(return_inverse=True, return_counts=True)
        losses = table.scores.double().clamp(0, math.log(max(2, len(sizes))) if self.clip is None else self.clip)
        means = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, classes, losses) / sizes
        counts = class_counts(sizes, means, num_kept(len(table), epoch.prune_ratio))
        # Gumbel top-k trick: the largest of loss / beta + Gumbel noise are a softmax sample without replacement
        noise = -torch.empty(len(table), dtype=torch.float64).exponential_(generator=epoch.generator).log()
        order = (losses / self.beta + noise).argsort(descending=True)
        order = order[classes[order].argsort(stable=True)]  # by class, and within it by key
        rank = torch.arange(len(table)) - (sizes.cumsum(0) - sizes)[classes[order]]
        return order[rank < counts[classes[order]]].sort().values, None


def class_counts(sizes: Tensor, losses: Tensor, count: int) -> Tensor:
    """Divides ``count`` samples over classes in proportion to ``sqrt(size * loss)``; excess over a class's size goes to others.

    Args:
        sizes: Samples of each class, int64 ``[C]``.
        losses: Mean loss of each class, float64 ``[C]``, non-negative.
        count: Number of samples to divide, at most all of them.

    Returns:
        Int64 ``[C]``, each rounded up, so the sum may exceed ``count`` by up to ``C - 1``.
    """
    shares = (sizes * losses.clamp(min=1e-12)).sqrt()
    full = torch.zeros(len(sizes), dtype=torch.bool)
    while True:
        left = count - int(sizes[full].sum())
        wanted = torch.where(full, sizes, shares / shares[~full].sum() * left)
        over = (wanted > sizes) & ~full
        if not bool(over.any()):
            return (wanted - 1e-9).ceil().long()  # 1e-9: rounding errors of the division
        full |= over
