"""The InfoBatch rule: drops below-mean samples at random, and increases the weight of those that are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from composer_effalgos.plan import PerSampleLoss, SampleRows, Shard, per_sample_mean
from composer_effalgos.pruning.prune import checked_bands, prune, prune_part
from composer_effalgos.pruning.rules.rule import Epoch, Kept, PruningRule, Step
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError


@dataclass
class InfoBatchRule(PruningRule):
    """Qin et al., ICLR 2024, arXiv 2303.04947, equations 3 and 5; see :func:`~composer_effalgos.pruning.prune.prune`.

    Args:
        score_by: ``'loss'``, the last loss; ``'ema'``, a moving average of the losses; or a function ``(outputs, batch) -> [B, ...]``.
        score_decay: Weight of the old average with ``'ema'``, in [0, 1).
        bands: Quantile thresholds instead of the mean, as for ``prune``.
        class_balanced: Whether each class has its own mean (or quantiles).
    """

    score_by: Literal['loss', 'ema'] | PerSampleLoss = 'loss'
    score_decay: float = 0.9
    bands: Sequence[tuple[float, float]] | None = None
    class_balanced: bool = False

    takes_unscored = True  # prune() keeps them

    def __post_init__(self) -> None:
        check_number('score_decay', self.score_decay, least=0, below=1)
        if self.score_by not in ('loss', 'ema') and not callable(self.score_by):
            raise InputError(f"score: expected 'loss', 'ema' or callable(outputs, batch) -> [B], got {self.score_by!r}")
        self.bands = None if self.bands is None else checked_bands(self.bands)
        self.decay = self.score_decay if self.score_by == 'ema' else 0.0
        self.uses_ratio, self.needs_labels = self.bands is None, self.class_balanced

    def score(self, step: Step) -> Tensor:
        if not callable(self.score_by):
            return step.losses
        return per_sample_mean(self.score_by(step.outputs, step.batch)).float()

    def keep(self, table: SampleRows, epoch: Epoch) -> Kept:
        scores = _with_nan(table)
        labels = epoch.labels if self.class_balanced else None
        return prune(scores, epoch.prune_ratio, epoch.generator, bands=self.bands, labels=labels)

    def keep_part(self, table: SampleRows, epoch: Epoch, shard: Shard) -> Kept:
        return prune_part(_with_nan(table), epoch.prune_ratio, epoch.draw_seed(), shard, bands=self.bands)


def _with_nan(table: SampleRows) -> Tensor:
    return table.scores if bool(table.scored.all()) else torch.where(table.scored, table.scores, math.nan)
