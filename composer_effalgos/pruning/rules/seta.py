"""SeTa: a window of loss groups that slides from easy to hard."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from composer_effalgos.plan import SampleRows
from composer_effalgos.pruning.rules.rule import Epoch, Kept, PruningRule
from composer_effalgos.utils.checks import check_number, check_whole
from composer_effalgos.utils.errors import InputError


@dataclass
class SetaRule(PruningRule):
    """Draws a random fraction ``1 - prune_ratio`` of the samples, and keeps a window of adjacent groups of similar loss.

    The groups come from one-dimensional k-means. The window moves by one group per epoch, from easy to hard, and then wraps around. The
    last ``1 - delta`` of the run trains on a random fraction. Zhou et al., "Scale Efficient Training for Large Datasets", CVPR 2025, arXiv
    2503.13385; the defaults are its lossless setting for CIFAR, together with ``prune_ratio=0.1``.

    Args:
        groups: Number of groups.
        window: Fraction of the groups that an epoch trains on, in (0, 1].
    """

    groups: int = 5
    window: float = 0.9

    def __post_init__(self) -> None:
        check_whole('rule.groups', self.groups, least=1)
        check_number('rule.window', self.window, above=0, most=1)
        if round(self.groups * self.window) < 1:
            raise InputError(f'rule.window: expected at least one of {self.groups} groups, got {self.window}')
        self.uses_ratio = round(self.groups * self.window) == self.groups

    def keep(self, table: SampleRows, epoch: Epoch) -> Kept:
        share = self._share(table, epoch)
        size = round(self.groups * self.window)
        first = epoch.number % (self.groups - size + 1)
        group = loss_groups(table.scores[share], self.groups)
        return share[(group >= first) & (group < first + size)], None

    def keep_at_end(self, table: SampleRows, epoch: Epoch) -> Kept:
        return self._share(table, epoch), None

    @staticmethod
    def _share(table: SampleRows, epoch: Epoch) -> Tensor:
        return epoch.draw(len(table), max(1, int(len(table) * (1 - epoch.prune_ratio)))).sort().values


def loss_groups(losses: Tensor, groups: int) -> Tensor:
    """Groups numbers by one-dimensional k-means: Lloyd's algorithm on sorted values, initialised with quantiles.

    Args:
        losses: Float ``[n]``; inf counts as the largest finite one.
        groups: Number of groups. If all numbers are equal, the groups have equal sizes.

    Returns:
        Group of each number, int64 ``[n]``, 0 for the lowest.
    """
    values = losses.double().numpy()
    finite = values[np.isfinite(values)]
    values = np.minimum(values, finite.max() if len(finite) else 0.0)
    if values.min() == values.max():
        return torch.arange(len(values)) * groups // len(values)
    ordered = np.sort(values)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centres = np.quantile(ordered, (np.arange(groups) + 0.5) / groups)
    stops, before = np.empty(0, np.int64), None
    while before is None or not np.array_equal(stops, before):
        before, stops = stops, np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        edges = np.concatenate([[0], stops, [len(ordered)]])
        counts = np.diff(edges)
        centres = np.sort(np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), centres))
    return torch.from_numpy(np.searchsorted((centres[1:] + centres[:-1]) / 2, values, side='right'))
