"""Upper confidence bound: keeps samples whose loss is or may be high."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from composer_effalgos.plan import SampleRows
from composer_effalgos.pruning.rules.rule import Epoch, Kept, PruningRule, highest, num_kept
from composer_effalgos.utils.checks import check_number, check_whole


@dataclass
class UcbRule(PruningRule):
    """Keeps the samples with the highest ``mean + confidence * sqrt(variance)`` of their losses.

    Mean and variance are exponential moving averages over the last ``history`` losses. From the oldest on,
    ``v = (1 - alpha) v + alpha (L - m)^2`` and then ``m = (1 - alpha) m + alpha L``. Raju et al., "Accelerating Deep Learning with Dynamic
    Data Pruning", 2021, arXiv 2111.12621.

    Args:
        confidence: Factor of the standard deviation, non-negative.
        alpha: Weight of the newest loss, in (0, 1].
        history: Number of losses kept per sample.
    """

    confidence: float = 1.0
    alpha: float = 0.8
    history: int = 5

    def __post_init__(self) -> None:
        check_number('rule.confidence', self.confidence, least=0)
        check_number('rule.alpha', self.alpha, above=0, most=1)
        check_whole('rule.history', self.history, least=1, most=1000)

    def keep(self, table: SampleRows, epoch: Epoch) -> Kept:
        mean = table.scores.clone()  # correct for samples with one loss
        variance = torch.zeros_like(mean)
        for age in range(self.history - 1, -1, -1):
            losses, there, oldest = table.history[age], table.trained > age, table.trained == age + 1
            start = losses if age == self.history - 1 else torch.where(oldest, losses, mean)
            variance = torch.where(there, (1 - self.alpha) * variance + self.alpha * (losses - start) ** 2, variance)
            mean = torch.where(there, (1 - self.alpha) * start + self.alpha * losses, mean)
        bound = torch.nan_to_num(mean + self.confidence * variance.sqrt(), nan=torch.inf)
        return highest(bound, num_kept(len(table), epoch.prune_ratio)), None
