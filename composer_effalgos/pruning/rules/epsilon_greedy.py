"""Epsilon-greedy: keeps the samples with the highest losses, and some others at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from composer_effalgos.plan import SampleRows
from composer_effalgos.pruning.rules.rule import Epoch, Kept, PruningRule, highest, num_kept
from composer_effalgos.utils.checks import check_number


@dataclass
class EpsilonGreedyRule(PruningRule):
    """Keeps a fraction ``1 - prune_ratio``: ``epsilon`` of it at random, the rest by the highest moving average of the loss.

    Raju et al., "Accelerating Deep Learning with Dynamic Data Pruning", 2021, arXiv 2111.12621.

    Args:
        epsilon: Fraction of the kept samples that is drawn at random, in [0, 1].
        alpha: Weight of the newest loss in the moving average, in (0, 1].
    """

    epsilon: float = 0.1
    alpha: float = 0.8

    def __post_init__(self) -> None:
        check_number('rule.epsilon', self.epsilon, least=0, most=1)
        check_number('rule.alpha', self.alpha, above=0, most=1)
        self.decay = 1 - self.alpha

    def keep(self, table: SampleRows, epoch: Epoch) -> Kept:
        size = len(table)
        count = num_kept(size, epoch.prune_ratio)
        drawn = int(self.epsilon * count)
        greedy = highest(table.scores, count - drawn)
        others = torch.ones(size, dtype=torch.bool)
        others[greedy] = False
        left = others.nonzero()[:, 0]
        return torch.cat([greedy, left[epoch.draw(len(left), drawn)]]).sort().values, None
