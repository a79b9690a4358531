"""One number a sample, noted while an epoch trains."""

from __future__ import annotations

import math

import torch
from composer.core import State
from composer.utils import dist
from torch import Tensor

from composer_effalgos.plan.plan import Plan


class EpochRecord:
    """Keeps what a subscriber of the weighted loss sees of each sample until the epoch ends.

    The numbers stay on the training device, in the rank's order, so noting them moves nothing to the host.

    Args:
        plan: The run's plan, which says which samples they are.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._values: Tensor | None = None  # NaN where not trained yet

    @property
    def begun(self) -> bool:
        """Whether anything was noted since :meth:`clear`."""
        return self._values is not None

    def note(self, values: Tensor, where: slice) -> None:
        """Notes the numbers of a microbatch.

        Args:
            values: Float32 ``[B]`` without NaN.
            where: Their place in the rank's epoch.
        """
        if self._values is None:
            self._values = values.new_full((len(self._plan.loader.rank_order),), math.nan)
        self._values[where] = values

    def of_this_rank(self) -> list[tuple[Tensor, Tensor]]:
        """What this rank noted: sample indices, int64 ``[n]``, and their numbers, float32 ``[n]`` on the CPU."""
        return [] if self._values is None else [_noted(self._plan.loader.rank_order, self._values)]

    def of_all_ranks(self, state: State) -> list[tuple[Tensor, Tensor]]:
        """What every rank noted, one pair a rank; a collective call."""
        if self._values is None or dist.get_world_size() == 1:
            return self.of_this_rank()
        orders = self._plan.loader.rank_orders()
        padded = state.device.tensor_to_device(torch.full((max(map(len, orders)),), math.nan))
        padded[: len(self._values)] = self._values
        return [_noted(order, values[: len(order)]) for order, values in zip(orders, dist.all_gather(padded), strict=True)]

    def clear(self) -> None:
        """Begins anew."""
        self._values = None


def _noted(samples: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.cpu()
    noted = ~torch.isnan(values)
    return samples[noted], values[noted]
