"""Seesaw: the batch grows where the learning-rate schedule would decay the learning rate (arXiv 2510.14717)."""

from __future__ import annotations

import math
from typing import Any

from composer.core import Callback, State, TimeUnit
from composer.loggers import Logger

from composer_effalgos.plan.clock import is_composer_schedule
from composer_effalgos.plan.progress import Progress
from composer_effalgos.utils.errors import InputError

_MOST_GROWTHS = 10_000  # requested at a learning rate of 0; the number of samples or max_batch_size limit it
_SAME = 1e-6  # relative difference up to which two learning rates count as equal


class Seesaw(Callback):
    """Grows the batch as the run's own learning-rate schedule decays.

    When the schedule has decayed to ``a`` times its peak, the batch is ``1 / a`` times as large, rounded down to a power of AdaBatch's
    ``growth_factor``. With ``lr='auto'``, the learning rate is then the schedule's, multiplied by the square root of the batch's growth
    (Adam and similar) or by the growth itself (SGD). So where the schedule falls by a factor ``a``, the learning rate falls by ``sqrt(a)``
    or not at all. Between growths, and once ``max_batch_size`` is reached, the learning rate follows the schedule. The quantity that
    determines the noise of the steps (learning rate over the square root of the batch size for Adam, learning rate over batch size for SGD)
    is the same at every step as with a fixed batch and the same schedule.

    The batch does not grow while the learning rate rises to its peak. If a schedule rises again (warm restarts), the batch shrinks again.

    The learning rate is read from the optimizer before each batch, without AdaBatch's own factor. Every schedule that sets one learning
    rate, or the same multiple of several, is therefore followed exactly. It must be a function of the samples or tokens seen and not of the
    number of steps, which Seesaw changes: give ``max_duration`` in epochs, where the epoch clock makes any schedule such a function, or in
    samples or tokens together with a Composer schedule in samples, tokens or fractions of the run.

    Source: Meterez et al., "Seesaw: Accelerating Training by Balancing Learning Rate and Batch Size Scheduling", arXiv 2510.14717; for SGD,
    Smith et al., "Don't Decay the Learning Rate, Increase the Batch Size", arXiv 1711.00489.

    Raises:
        InputError: In ``fit``, without a schedule, with one that counts steps, or with different schedules for the parameter groups.
    """

    growth_factor = 2.0  # AdaBatch sets its own

    _state: State  # from INIT on

    def __init__(self) -> None:
        self._peaks: list[float] = []  # the largest learning rate so far, per parameter group

    def __call__(self, progress: Progress) -> int:
        """Growths for the current learning rate; the rates of later batches are not known yet."""
        rates = self._rates()
        peaks = self._highest(rates)
        shares = [rate / peak if peak > 0 else 1.0 for rate, peak in zip(rates, peaks, strict=True)]
        if max(shares) - min(shares) > _SAME * max(shares):
            raise InputError(
                f'policy: seesaw expected one schedule for all parameter groups, got rates of {min(shares):.3g} to '
                f'{max(shares):.3g} times their peaks; give one schedule, or another policy'
            )
        if shares[0] <= 0:
            return _MOST_GROWTHS
        return min(_MOST_GROWTHS, math.floor(-math.log(shares[0]) / math.log(self.growth_factor) + 1e-9))

    def state_dict(self) -> dict[str, Any]:
        return {'peaks': self._peaks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._peaks = state['peaks']

    def init(self, state: State, logger: Logger) -> None:
        """Stores the state, which has the optimizer."""
        self._state = state

    def fit_start(self, state: State, logger: Logger) -> None:
        """Rejects schedules that it cannot follow."""
        if int(state.timestamp.batch) == 0:  # the object may have been used in another run
            self._peaks = []
        if not state.schedulers:
            raise InputError('policy: seesaw expected a learning-rate schedule to follow, got none; give schedulers')
        assert state.max_duration is not None
        unit = state.max_duration.unit
        if unit == TimeUnit.EPOCH:
            return
        if unit not in (TimeUnit.SAMPLE, TimeUnit.TOKEN):
            raise InputError(
                f'max_duration: expected epochs, samples or tokens with seesaw, got {state.max_duration.to_timestring()!r}, '
                'which fixes the number of steps that seesaw reduces'
            )
        if any(_counts_steps(scheduler, state) for scheduler in state.schedulers):
            raise InputError(
                f'schedulers: expected a Composer schedule in {unit.value} or dur with seesaw and max_duration in {unit.value}, got '
                'one that counts steps, which seesaw reduces; give max_duration in epochs, or such a schedule'
            )

    def batch_start(self, state: State, logger: Logger) -> None:
        """Records the largest learning rate so far."""
        self._peaks = self._highest(self._rates())

    def _rates(self) -> list[float]:
        """The learning rate that the schedule set for each parameter group."""
        scale = getattr(self._state.schedulers[0], 'adabatch_lr_scale', 1.0)
        return [float(group['lr']) / scale for optimizer in self._state.optimizers for group in optimizer.param_groups]

    def _highest(self, rates: list[float]) -> list[float]:
        return [max(rate, peak) for rate, peak in zip(rates, self._peaks or rates, strict=True)]


def _counts_steps(scheduler: Any, state: State) -> bool:
    """Whether a schedule depends on the number of steps: whether it changes if only that number does."""
    if not is_composer_schedule(scheduler):
        return True  # PyTorch schedulers count their steps
    real = state.timestamp
    try:
        rates = set()
        for batch in (0, *(3**power for power in range(20))):
            state.timestamp = real.copy(batch=batch, batch_in_epoch=batch)
            rates.add(tuple(f(0) for f in scheduler.lr_lambdas))
        return len(rates) > 1
    finally:
        state.timestamp = real
