"""The base class of LinUpper and ESLM."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from composer_effalgos.plan import EpochPlanner, PerSampleLoss
from composer_effalgos.plan.outputs import num_rows
from composer_effalgos.plan.progress import parse_time, progress_of, times_passed
from composer_effalgos.utils.errors import InputError


class Weighting(Algorithm):
    """Weights the sample or token losses of a batch by those losses, without state between batches.

    Weights are computed per microbatch, because its backward pass runs before the next microbatch's forward pass.

    Args:
        burn_in: Initial period of the run without weights; ``None`` for none.
        global_batch: Whether to compute weights over the microbatches of all ranks, which exchange losses, or over this rank's only.
    """

    by_token: ClassVar[bool]
    per_sample_loss: PerSampleLoss | None = None
    _planner: EpochPlanner  # from INIT on
    _state: State

    def __init__(self, burn_in: str | int | Time | None, *, global_batch: bool) -> None:
        self.burn_in = None if burn_in is None else parse_time('burn_in', burn_in)
        if not isinstance(global_batch, bool):
            raise InputError(f'global_batch: expected true or false, got {global_batch!r}')
        self.global_batch = global_batch

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.FIT_START) or (event == Event.BEFORE_TRAIN_BATCH and self._exchanges)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._initialise(state)
        elif event == Event.FIT_START:
            self._check_combination(state)
        elif self.begun():
            self._check_microbatches(state)

    def begun(self) -> bool:
        """Whether the burn-in is over."""
        return self.burn_in is None or times_passed(progress_of(self._state, self._planner), self.burn_in) > 0

    def weigh(self, losses: Any, batch: Any) -> Tensor:
        """Computes the weights of a microbatch's samples or tokens.

        Args:
            losses: Sample losses, float ``[B]``, or token losses, :class:`~composer_effalgos.plan.token_loss.Tokens`.
            batch: The microbatch.

        Returns:
            Float ``[B]`` or ``[n]``; all ones if any weight is not finite, which overflow in mixed precision can cause.
        """
        raise NotImplementedError

    @property
    def _exchanges(self) -> bool:
        return self.global_batch and dist.get_world_size() > 1

    def _initialise(self, state: State) -> None:
        self._planner, self._state = EpochPlanner.of(state), state
        self._planner.exchanges |= self._exchanges
        loss = self._planner.request_loss(state, type(self).__name__, self.per_sample_loss, by_position=False)
        if loss.weigher is not None:
            names = sorted((type(loss.weigher).__name__, type(self).__name__))
            what = f'{names[0]} is given twice' if names[0] == names[1] else f'{names[0]} and {names[1]} cannot be combined'
            raise InputError(f'algorithms: {what}: a batch is weighed by its losses once; keep one')
        loss.weigher = self

    def _check_combination(self, state: State) -> None:
        """Rejects algorithms that this one cannot be combined with."""
        name = type(self).__name__
        if self._planner.selectors.prune:
            raise InputError(
                f'algorithms: {name} and {self._planner.selectors.names[-1]} cannot be combined: both decide by the losses how much a '
                'sample counts, and the weights of one would be wrong for what the other leaves; keep one'
            )

    def _check_microbatches(self, state: State) -> None:
        """Checks for equal microbatch counts: ranks exchange losses in every microbatch, and unequal counts would deadlock."""
        size = state.device_train_microbatch_size
        parts = 1 if not isinstance(size, int) else math.ceil(num_rows(state.batch) / size)
        counts = dist.all_gather(state.device.tensor_to_device(torch.tensor([parts])))
        if len({int(count) for count in counts}) > 1:
            raise InputError(
                f'global_batch: expected the same number of microbatches on every rank, got {[int(count) for count in counts]}; '
                'use drop_last, or batches that are one microbatch'
            )

    def _population(self, *values: Tensor) -> tuple[list[Tensor], slice]:
        """Gathers float ``[n]`` tensors over all ranks if they exchange losses; also returns the slice of this rank's values."""
        if not self._exchanges:
            return list(values), slice(None)
        mine = torch.stack([value.float() for value in values])
        sizes = [int(size) for size in dist.all_gather(torch.tensor([mine.shape[1]], device=mine.device))]
        padded = torch.nn.functional.pad(mine, (0, max(sizes) - mine.shape[1])).contiguous()
        everyone = dist.all_gather(padded)
        start, rank = sum(sizes[: dist.get_global_rank()]), dist.get_global_rank()
        joined = torch.cat([part[:, :size] for part, size in zip(everyone, sizes, strict=True)], dim=1)
        return list(joined), slice(start, start + sizes[rank])
