"""A pruning rule of one's own, as a user would write it."""

import torch

from composer_effalgos import PruningRule


class HardOrRising(PruningRule):
    """Keeps samples whose loss is above the median or has risen, and some of the others at random."""

    history = 2

    def score(self, step):
        return step.losses.clamp(max=5.0)

    def keep(self, table, epoch):
        hard = table.scores > table.scores.median()
        rising = table.history[0] > table.history[1]
        lucky = torch.rand(len(table.scores), generator=epoch.generator) > epoch.prune_ratio
        return (hard | rising | lucky).nonzero()[:, 0], None
