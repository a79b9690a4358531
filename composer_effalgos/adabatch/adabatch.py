"""AdaBatch: batch sizes that grow during training (Devarakonda et al., arXiv 1712.02029; Smith et al., arXiv 1711.00489)."""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Sequence
from typing import Any

from composer.core import Algorithm, Event, State, Time, TimeUnit
from composer.loggers import Logger
from torch.optim.lr_scheduler import LRScheduler

from composer_effalgos.errors import InputError
from composer_effalgos.plan import BatchSize, Plan

_UNITS = (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.DURATION)


def parse_time(name: str, value: str | int | Time, units: Sequence[TimeUnit]) -> Time:
    """Reads a time string.

    Args:
        name: The argument's name, for messages.
        value: A Composer time string (``'20ep'``), a :class:`composer.core.Time`, or a number of epochs.
        units: The units that are allowed.

    Returns:
        The time, greater than 0.

    Raises:
        InputError: Where it is not a time, not positive, or in another unit.
    """
    allowed = ', '.join(f"'{unit.value}'" for unit in units)
    try:
        time = Time(value, TimeUnit.EPOCH) if isinstance(value, int) and not isinstance(value, bool) else Time.from_input(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: must be a time such as '20ep' (units {allowed}), got {value!r}") from error
    if time.unit not in units or time.value <= 0:
        raise InputError(f'{name}: must be a positive time in one of the units {allowed}, got {value!r}')
    return time


class AdaBatch(Algorithm):
    """Grows the batch size during training, with the learning rate coupled to it.

    At each growth the batch size per rank is multiplied by ``growth_factor`` and the learning rate, on top of whatever schedule runs, by
    ``lr_factor``. No sample is lost or repeated, workers live on, and schedules keep the time of the run without growth. Times in
    epochs and shares of the run take effect at the next epoch start; times in batches and samples at the very batch.

    Runs on ``INIT``, ``FIT_START`` and ``BATCH_START``. Source: Devarakonda et al., "AdaBatch: Adaptive Batch Sizes for Training Deep
    Neural Networks", arXiv 1712.02029; Smith et al., "Don't Decay the Learning Rate, Increase the Batch Size", arXiv 1711.00489.

    Args:
        growth_factor: What the batch size is multiplied by, greater than 1. Sizes are rounded to whole samples.
        interval: Time between growths: epochs (``'20ep'``), batches (``'2000ba'``), samples (``'1000000sp'``) or a share of the run
            (``'0.2dur'``).
        milestones: Times of the growths, in place of ``interval``.
        max_batch_size: Largest batch size per rank; a growth past it, or past the samples there are, does not happen.
        lr_factor: What the learning rate is multiplied by at each growth: 0.75 with factor 2 is the paper's, in place of a step decay of
            0.375; 1 grows instead of decaying; ``growth_factor`` is linear scaling.

    Raises:
        InputError: For an argument outside its range.

    Example:
        >>> from composer import Trainer
        >>> from composer_effalgos import AdaBatch
        >>> trainer = Trainer(model=model, train_dataloader=loader, max_duration='100ep', algorithms=[AdaBatch()])  # doctest: +SKIP
    """

    _plan: Plan  # from INIT on
    _state: State

    def __init__(
        self,
        growth_factor: float = 2.0,
        interval: str | int | Time = '20ep',
        *,
        milestones: Sequence[str | int | Time] | None = None,
        max_batch_size: int | None = None,
        lr_factor: float = 1.0,
    ) -> None:
        if not _is_number(growth_factor) or not growth_factor > 1 or math.isinf(growth_factor):
            raise InputError(f'growth_factor: must be a number greater than 1, got {growth_factor!r}')
        if not _is_number(lr_factor) or not lr_factor > 0 or math.isinf(lr_factor):
            raise InputError(f'lr_factor: must be a number greater than 0, got {lr_factor!r}')
        if max_batch_size is not None and (isinstance(max_batch_size, bool) or not isinstance(max_batch_size, int) or max_batch_size < 1):
            raise InputError(f'max_batch_size: must be a whole number of samples per rank, at least 1, got {max_batch_size!r}')
        if milestones is not None and (isinstance(milestones, str | Time) or not isinstance(milestones, Sequence)):
            raise InputError(f"milestones: must be a list of times such as ['20ep', '40ep'], got {milestones!r}")
        self.growth_factor = growth_factor
        self.interval = parse_time('interval', interval, _UNITS)
        self.milestones = None if milestones is None else [parse_time(f'milestones[{i}]', m, _UNITS) for i, m in enumerate(milestones)]
        self.max_batch_size = max_batch_size
        self.lr_factor = lr_factor
        self._lr_scale = 1.0  # what the learning rate has been multiplied by
        self._microbatch: int | None = None  # the batch size that the microbatch was last set for
        self._explicit_microbatch = self._capped = False

    def __repr__(self) -> str:
        when = f'interval={self.interval.to_timestring()!r}'
        if self.milestones is not None:
            when = f'milestones={[m.to_timestring() for m in self.milestones]}'
        return (
            f'{type(self).__name__}(growth_factor={self.growth_factor}, {when}, max_batch_size={self.max_batch_size}, '
            f'lr_factor={self.lr_factor})'
        )

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.FIT_START, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._initialise(state)
        elif event == Event.FIT_START:
            microbatch = state.device_train_microbatch_size
            if self._microbatch is not None and microbatch != self._microbatch and not state.auto_microbatching:
                self._explicit_microbatch = True  # given to this fit()
            rescale_schedules(state, self._lr_scale)
        else:
            self._grow(state, logger)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), 'lr_scale': self._lr_scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lr_scale = state['lr_scale']

    def growths(self, state: State, batch: int, sample: int) -> int:
        """How often the batch has grown.

        Args:
            state: The trainer's state, for the epoch and the run's length.
            batch: Batches trained before.
            sample: Samples trained before, over all ranks.

        Returns:
            The number of growth times that have come.
        """
        now = {TimeUnit.EPOCH: int(state.timestamp.epoch), TimeUnit.BATCH: batch, TimeUnit.SAMPLE: sample}
        assert state.max_duration is not None
        length = state.max_duration
        now_in_duration = (now[length.unit] if length.unit in now else int(state.timestamp.get(length.unit).value)) / length.value
        now_in = {**now, TimeUnit.DURATION: now_in_duration}
        if self.milestones is None:
            return math.floor(now_in[self.interval.unit] / self.interval.value + 1e-9)
        return sum(now_in[m.unit] >= m.value - 1e-9 for m in self.milestones)

    def _size(self, growths: int) -> tuple[int, int]:
        """The batch size per rank after so many growths, and how many of them fit."""
        loader = self._plan.loader
        available = loader.num_samples if self._plan.candidates is None else len(self._plan.candidates)
        limit = max(loader.initial_batch_size, available // loader.world_size)
        why = f'the {available} samples there are'
        if self.max_batch_size is not None and self.max_batch_size < limit:
            limit, why = max(loader.initial_batch_size, self.max_batch_size), f'max_batch_size {self.max_batch_size}'
        sizes = [loader.initial_batch_size]
        while len(sizes) <= growths and sizes[-1] <= limit:
            sizes.append(round(loader.initial_batch_size * self.growth_factor ** len(sizes)))
        fitting = bisect.bisect_right(sizes, limit) - 1
        if fitting < growths and not self._capped:
            self._capped = True
            warnings.warn(
                f'AdaBatch: growing to {sizes[fitting + 1]} samples per rank would pass {why}; the batch stays at {sizes[fitting]}',
                stacklevel=2,
            )
        return sizes[fitting], fitting

    def _initialise(self, state: State) -> None:
        if sum(isinstance(algorithm, AdaBatch) for algorithm in state.algorithms) > 1:
            raise InputError('algorithms: AdaBatch is given twice; keep one')
        self._plan, self._state = Plan.of(state), state
        self._plan.batch_size = self._epoch_batch_size
        self._lr_scale, self._capped = 1.0, False
        self._explicit_microbatch = state.device_train_microbatch_size is not None and not state.auto_microbatching
        self._microbatch = None

    def _epoch_batch_size(self) -> BatchSize:
        """The plan asks for this epoch's batch size: a number, or where it may grow within the epoch, a function."""
        state = self._state
        assert state.max_duration is not None
        batch = int(state.timestamp.batch) - int(state.timestamp.batch_in_epoch)
        sample = int(state.timestamp.sample) - int(state.timestamp.sample_in_epoch)
        units = {time.unit for time in (self.milestones if self.milestones is not None else [self.interval])}
        if TimeUnit.DURATION in units:
            units = units - {TimeUnit.DURATION} | {state.max_duration.unit}
        if units <= {TimeUnit.EPOCH}:
            return self._size(self.growths(state, batch, sample))[0]
        return lambda b, s: self._size(self.growths(state, batch + b, sample + s))[0]

    def _grow(self, state: State, logger: Logger) -> None:
        size, growths = self._size(self.growths(state, int(state.timestamp.batch), int(state.timestamp.sample)))
        loader, scale = self._plan.loader, self.lr_factor**growths
        if scale != self._lr_scale:
            for group in (group for optimizer in state.optimizers for group in optimizer.param_groups):
                group['lr'] = group['lr'] * (scale / self._lr_scale)
            rescale_schedules(state, scale, now=False)
            self._lr_scale = scale
        if size != loader.batch_size:
            loader.set_batch_size(size)
        if size != self._microbatch:
            self._microbatch = size
            if not self._explicit_microbatch:
                state.device_train_microbatch_size = size
            logger.log_metrics({'adabatch/batch_size': size * loader.world_size, 'adabatch/lr_scale': scale})


def rescale_schedules(state: State, scale: float, *, now: bool = True) -> None:
    """Makes every schedule set ``scale`` times the learning rates that it was made for.

    What a schedule is scaled by is noted on it and travels in its checkpoint, so a schedule that was restored is found as it is and one
    that was given to a later ``fit`` is scaled too.

    Args:
        state: The trainer's state.
        scale: The factor.
        now: Whether learning rates that the schedule has already set are scaled as well.
    """
    for scheduler in state.schedulers:
        factor = scale / getattr(scheduler, 'adabatch_lr_scale', 1.0)
        if factor == 1:
            continue
        _scale_base(scheduler, factor)
        scheduler.adabatch_lr_scale = scale  # type: ignore[attr-defined]
        for group in scheduler.optimizer.param_groups:
            if now:
                group['lr'] = group['lr'] * factor
            if 'max_lr' in group:  # OneCycleLR keeps its base here
                for key in ('initial_lr', 'max_lr', 'min_lr'):
                    group[key] = group[key] * factor


def _scale_base(scheduler: LRScheduler, factor: float) -> None:
    if hasattr(scheduler, 'base_lrs'):
        scheduler.base_lrs = [lr * factor for lr in scheduler.base_lrs]
    for part in getattr(scheduler, '_schedulers', []):  # SequentialLR, ChainedScheduler
        _scale_base(part, factor)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
