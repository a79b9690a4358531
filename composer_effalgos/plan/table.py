"""The sample table: the scores of each sample, and how often it was trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import State
from composer.utils import dist
from torch import Tensor

from composer_effalgos.plan.planner import EpochPlanner
from composer_effalgos.plan.selector import Choice

SAVED = ('history', 'scored', 'offered', 'trained')


@dataclass
class SampleRows:
    """Rows of the table, for all samples or for an epoch's candidates; on the CPU, without NaN.

    Attributes:
        history: The last ``H`` scores of each sample, float32 ``[H, n]``, newest first; 0 if missing, inf if not finite.
        scored: Whether a sample has a score, bool ``[n]``.
        offered: Whether a sample was a candidate in an earlier epoch, bool ``[n]``.
        trained: Number of epochs that trained on a sample, int32 ``[n]``.
    """

    history: Tensor
    scored: Tensor
    offered: Tensor
    trained: Tensor

    @classmethod
    def empty(cls, history: int, num_samples: int) -> SampleRows:
        """Rows for samples without any records."""
        flags = torch.zeros(2, num_samples, dtype=torch.bool)
        return cls(torch.zeros(history, num_samples, dtype=torch.float32), flags[0], flags[1], torch.zeros(num_samples, dtype=torch.int32))

    @property
    def scores(self) -> Tensor:
        """The last score of each sample, float32 ``[n]``; 0 if it has none."""
        return self.history[0]

    def __len__(self) -> int:
        return len(self.scored)

    def take(self, samples: Tensor) -> SampleRows:
        """The rows of some samples, int64 ``[n]``."""
        return SampleRows(self.history[:, samples], *(getattr(self, name)[samples] for name in SAVED[1:]))

    def clone(self) -> SampleRows:
        """A copy."""
        return SampleRows(*(getattr(self, name).clone() for name in SAVED))


class SampleTable:
    """Keeps one row per sample over the run.

    The scores of the current epoch stay on the training device, in the rank's order, so recording them needs no transfer to the host. The
    ranks exchange them once, at the end of the epoch, and when a checkpoint is written within an epoch.

    Args:
        planner: The run's planner, which knows the samples that are trained on.
        history: Number of scores to keep per sample; 0 if none are recorded.
        decay: Weight of the old score in an exponential moving average; 0 keeps the last score.
    """

    def __init__(self, planner: EpochPlanner, history: int = 1, decay: float = 0.0) -> None:
        self._planner, self._history, self._decay = planner, history, decay
        self._rows = SampleRows.empty(history, 0)
        self._noted: Tensor | None = None  # scores in the rank's order; NaN if not trained yet

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> SampleRows:
        """The rows of all samples, as of the last exchange."""
        return self._rows

    def total(self, number: int) -> int:
        """Sums a number computed from :attr:`rows` over all samples; a collective call if the table is sharded."""
        return number

    def agreed(self, choice: Choice | None) -> Choice | None:
        """Turns a decision on :attr:`rows` into one that all ranks agree on; a collective call if the table is sharded."""
        return choice

    def reset(self, num_samples: int) -> None:
        """Clears the table for another dataset."""
        self._rows, self._noted = SampleRows.empty(self._history, num_samples), None

    def note(self, scores: Tensor, where: slice) -> None:
        """Records the scores of a microbatch.

        Args:
            scores: Float32 ``[B]``; values that are not finite become inf.
            where: Their position in the rank's epoch.
        """
        if self._noted is None:
            self._noted = scores.new_full((len(self._planner.loader.rank_order),), math.nan)
        self._noted[where] = torch.nan_to_num(scores, nan=math.inf, posinf=math.inf, neginf=math.inf)

    @property
    def noted(self) -> bool:
        """Whether there are scores that the ranks have not exchanged yet."""
        return self._noted is not None

    def of_this_rank(self) -> SampleRows:
        """The rows including the scores that this rank recorded since the last exchange."""
        if self._noted is None:
            return self._rows
        return self._with([scores_of(self._planner.loader.rank_order, self._noted)])

    def of_all_ranks(self, state: State) -> SampleRows:
        """The rows including the scores that all ranks recorded since the last exchange; a collective call."""
        if self._noted is None or dist.get_world_size() == 1:
            return self.of_this_rank()
        orders = self._planner.loader.rank_orders()
        padded = state.device.tensor_to_device(torch.full((max(map(len, orders)),), math.nan, dtype=torch.float32))
        noted = self._noted[: len(padded)]  # a batch size that changed within the epoch may have shortened it since
        padded[: len(noted)] = noted
        gathered = dist.all_gather(padded)
        return self._with([scores_of(order, values[: len(order)]) for order, values in zip(orders, gathered, strict=True)])

    def exchange(self, state: State) -> None:
        """Adds the scores recorded by all ranks to the rows; a collective call."""
        self._rows, self._noted = self.of_all_ranks(state), None

    def end_epoch(self, state: State) -> None:
        """Adds the scores recorded by all ranks, and counts the samples that the epoch trained on; a collective call."""
        self.exchange(state)
        plan = self._planner.loader.plan
        assert plan is not None
        # usually all: then the order does not matter, and indexing in ascending order is faster
        everything = plan.num_samples == len(plan.kept)
        self._rows.trained[plan.kept if everything else plan.order[: plan.num_samples]] += 1

    def offer(self, samples: Tensor | None) -> None:
        """Records that samples are candidates of an epoch.

        Args:
            samples: Sample indices, int64 ``[n]``; ``None`` for all.
        """
        self._rows.offered[slice(None) if samples is None else samples] = True

    def state_dict(self, state: State) -> dict[str, Tensor]:
        """The rows including the scores recorded by all ranks; a collective call."""
        rows = self.of_all_ranks(state)
        rows = rows.clone() if rows is self._rows else rows  # later training must not change what is saved
        return {name: getattr(rows, name) for name in SAVED}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores the result of :meth:`state_dict`."""
        self._rows, self._noted = SampleRows(*(saved[name].cpu() for name in SAVED)), None

    def _with(self, noted: list[tuple[Tensor, Tensor]]) -> SampleRows:
        rows = self._rows.clone()
        for samples, fresh in noted:
            if self._decay:
                old = rows.scores[samples]
                blend = rows.scored[samples] & torch.isfinite(old) & torch.isfinite(fresh)
                fresh = torch.where(blend, self._decay * old + (1 - self._decay) * fresh, fresh)
            for age in range(self._history - 1, 0, -1):
                rows.history[age, samples] = rows.history[age - 1, samples]
            rows.history[0, samples] = fresh
            rows.scored[samples] = True
        return rows


def scores_of(order: Tensor, noted: Tensor) -> tuple[Tensor, Tensor]:
    """The samples for which scores were recorded, int64 ``[n]``, and these scores, float32 ``[n]``.

    Args:
        order: The samples of the epoch, int64 ``[m]``.
        noted: Their scores, NaN if not trained, float32; longer if the epoch has lost its last samples since, which were not trained.
    """
    noted = noted[: len(order)].cpu()
    trained = ~torch.isnan(noted)
    return order[trained], noted[trained]
