"""What LinUpper and ESLM have in common."""

from __future__ import annotations

import math
from collections import UserDict
from typing import Any, ClassVar

import torch
from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from composer_effalgos.plan import EpochPlanner, PerSampleLoss
from composer_effalgos.plan.progress import parse_time, progress_of, times_passed
from composer_effalgos.utils.errors import InputError


class Weighting(Algorithm):
    """Weighs what a batch's loss is made of by those losses themselves; nothing is kept from one batch to the next.

    Weights are those of a microbatch: its backward pass comes before the next one's forward pass.

    Args:
        burn_in: Time at the beginning of the run without weights; ``None`` for none.
        global_batch: Whether weights are relative to the microbatches of all ranks, whose losses are exchanged, or to this rank's own.
    """

    by_token: ClassVar[bool]
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
            self._refuse(state)
        elif self.begun():
            self._check_microbatches(state)

    def begun(self) -> bool:
        """Whether the burn-in is over."""
        return self.burn_in is None or times_passed(progress_of(self._state), self.burn_in) > 0

    def weigh(self, losses: Any, batch: Any) -> Tensor:
        """The weights of a microbatch's samples or tokens.

        Args:
            losses: Those of the samples, float ``[B]``, or of the tokens, :class:`~composer_effalgos.plan.token_loss.Tokens`.
            batch: The microbatch.

        Returns:
            Float ``[B]`` or ``[n]``; ones where a loss is not finite, as mixed precision has it now and then.
        """
        raise NotImplementedError

    @property
    def _exchanges(self) -> bool:
        return self.global_batch and dist.get_world_size() > 1

    def _initialise(self, state: State, per_sample_loss: PerSampleLoss | None = None) -> None:
        self._planner, self._state = EpochPlanner.of(state), state
        self._planner.exchanges |= self._exchanges
        loss = self._planner.request_loss(state, type(self).__name__, per_sample_loss, by_position=False)
        if loss.weigher is not None:
            names = sorted((type(loss.weigher).__name__, type(self).__name__))
            what = f'{names[0]} is given twice' if names[0] == names[1] else f'{names[0]} and {names[1]} cannot be combined'
            raise InputError(f'algorithms: {what}: a batch is weighed by its losses once; keep one')
        loss.weigher = self

    def _refuse(self, state: State) -> None:
        """Refuses algorithms that it cannot be combined with."""
        name = type(self).__name__
        if self._planner.selectors.prune:
            raise InputError(
                f'algorithms: {name} and {self._planner.selectors.names[-1]} cannot be combined: both decide by the losses how much a '
                'sample counts, and the weights of one would be wrong for what the other leaves; keep one'
            )

    def _check_microbatches(self, state: State) -> None:
        """Ranks exchange losses at every microbatch, and those with fewer would leave the others waiting."""
        size = state.device_train_microbatch_size
        parts = 1 if not isinstance(size, int) else math.ceil(_num_samples(state.batch) / size)
        counts = dist.all_gather(state.device.tensor_to_device(torch.tensor([parts])))
        if len({int(count) for count in counts}) > 1:
            raise InputError(
                f'global_batch: expected as many microbatches on every rank, got {[int(count) for count in counts]}; use drop_last, or '
                'batches that are one microbatch'
            )

    def _population(self, *values: Tensor) -> tuple[list[Tensor], slice]:
        """Float ``[n]`` tensors of this rank, or of all ranks one after the other, and where this rank's are."""
        if not self._exchanges:
            return list(values), slice(None)
        mine = torch.stack([value.float() for value in values])
        sizes = [int(size) for size in dist.all_gather(torch.tensor([mine.shape[1]], device=mine.device))]
        padded = torch.nn.functional.pad(mine, (0, max(sizes) - mine.shape[1])).contiguous()
        everyone = dist.all_gather(padded)
        start, rank = sum(sizes[: dist.get_global_rank()]), dist.get_global_rank()
        joined = torch.cat([part[:, :size] for part, size in zip(everyone, sizes, strict=True)], dim=1)
        return list(joined), slice(start, start + sizes[rank])


def _num_samples(batch: Any) -> int:
    leaves = tree_leaves(dict(batch) if isinstance(batch, UserDict) else batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)
