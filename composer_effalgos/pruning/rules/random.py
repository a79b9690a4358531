"""Random subsets without replacement (RS2), optionally with a shrinking fraction (SRD)."""

from __future__ import annotations

from dataclasses import dataclass

from composer_effalgos.plan import SampleRows, Shard
from composer_effalgos.pruning.rules.rule import Epoch, Kept, PruningRule, num_kept
from composer_effalgos.utils.checks import check_number


@dataclass
class RandomRule(PruningRule):
    """Keeps a random fraction of the samples, preferring those that were trained on least often.

    Every sample is trained on once before any is trained on twice: Okanovic et al., "Repeated Random Sampling for Minimizing the
    Time-to-Accuracy of Learning", ICLR 2024, arXiv 2305.18424, without replacement. With ``gamma``, epoch ``e`` keeps a fraction of
    ``gamma ** e``: the scheduled random dropout of Progressive Data Dropout, NeurIPS 2025, arXiv 2505.22342.

    Args:
        gamma: In (0, 1], instead of ``prune_ratio``; ``None`` to keep ``1 - prune_ratio``.
    """

    gamma: float | None = None

    history = 0

    def __post_init__(self) -> None:
        if self.gamma is not None:
            check_number('rule.gamma', self.gamma, above=0, most=1)
        self.uses_ratio = self.gamma is None

    def keep(self, table: SampleRows, epoch: Epoch) -> Kept:
        size = len(table)
        count = num_kept(size, epoch.prune_ratio if self.gamma is None else 1 - self.gamma**epoch.number)
        shuffled = epoch.draw(size, size)
        least_trained = table.trained[shuffled].argsort(stable=True)[:count]
        return shuffled[least_trained].sort().values, None

    def keep_part(self, table: SampleRows, epoch: Epoch, shard: Shard) -> Kept:
        count = num_kept(shard.size, epoch.prune_ratio if self.gamma is None else 1 - self.gamma**epoch.number)
        keys = table.trained.long() * shard.size + shard.keys(epoch.draw_seed())  # least trained first, ties in random order
        return shard.smallest(keys, count).nonzero()[:, 0], None
