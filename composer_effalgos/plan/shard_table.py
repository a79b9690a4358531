"""The sample table in which each rank keeps only the rows of its own part of the samples."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import State

from composer_effalgos.plan.planner import EpochPlanner
from composer_effalgos.plan.ranks import Ranks
from composer_effalgos.plan.selector import Choice
from composer_effalgos.plan.shard import Shard
from composer_effalgos.plan.shard_loader import ShardPlan
from composer_effalgos.plan.table import SAVED, SampleRows, SampleTable, scores_of


class ShardTable(SampleTable):
    """Keeps only the rows of this rank's samples, ``rank``, ``rank + W``, ...

    A rank records scores of the samples that it trains on, whose rows usually belong to other ranks. The scores are sent to their owners
    once per epoch, and when a checkpoint is written within an epoch. A checkpoint holds the rows of all samples, like that of a table that
    is not sharded: rank 0 gathers them in pieces, and holds all of them while it saves. A run may therefore resume on another number of
    ranks.
    """

    def __init__(self, planner: EpochPlanner, history: int, decay: float, ranks: Ranks) -> None:
        super().__init__(planner, history, decay)
        self.shard = Shard(0, ranks)

    def __len__(self) -> int:
        return self.shard.size

    def reset(self, num_samples: int) -> None:
        self.shard = Shard(num_samples, self.shard.ranks)
        super().reset(len(self.shard))

    def total(self, number: int) -> int:
        return self.shard.total(number)

    def agreed(self, choice: Choice | None) -> Choice | None:
        none, weighted = self.total(choice is None), self.total(choice is not None and choice.weights is not None)
        if none == self.shard.ranks.world_size:
            return None
        positions, weights = (torch.arange(len(self.shard)), None) if choice is None else (choice.positions, choice.weights)
        if weighted and weights is None:
            weights = torch.ones(len(positions), dtype=torch.float32)
        return Choice(positions, weights, self.total(len(positions)))

    def of_this_rank(self) -> SampleRows:
        """The rows as of the last exchange; scores recorded since then belong to samples of other ranks."""
        return self._rows

    def of_all_ranks(self, state: State) -> SampleRows:
        if self._noted is None:
            return self._rows
        return self._with([self.shard.to_owners(*scores_of(self._planner.loader.rank_order, self._noted))])

    def end_epoch(self, state: State) -> None:
        self.exchange(state)
        plan = self._planner.loader.plan
        assert isinstance(plan, ShardPlan)
        self._rows.trained[plan.trained()] += 1

    def state_dict(self, state: State) -> dict[str, Any]:
        rows = self.of_all_ranks(state)
        return {name: self.shard.whole(getattr(rows, name)) for name in SAVED}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.shard = Shard(len(saved['scored']), self.shard.ranks)
        self._rows, self._noted = SampleRows(*(self.shard.part(saved[name]).cpu() for name in SAVED)), None
