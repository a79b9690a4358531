"""Growth policies: when the batch grows.

A policy is a function of the run's progress, ``policy(progress) -> growths``, that returns how often the batch should have grown by now. It
is called before every batch, and at the start of an epoch also for its later batches, so it must not count its calls. It must return the
same number on every rank. A policy that observes training is also a Composer ``Callback``; AdaBatch adds it to the run, so it receives the
run's events, and its ``state_dict`` is saved in checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from composer.core import State, Time
from composer.loggers import Logger

from composer_effalgos.adabatch.gradient_noise import NoiseScale, NormTest
from composer_effalgos.adabatch.schedules import SizePolicy
from composer_effalgos.adabatch.seesaw import Seesaw
from composer_effalgos.adabatch.watching import Watching
from composer_effalgos.plan.progress import Progress, parse_time, times_passed
from composer_effalgos.utils.checks import LARGEST, check_number, check_whole, name_and_options
from composer_effalgos.utils.errors import InputError

Policy = Callable[[Progress], int]
"""``progress -> growths``: how often the batch should have grown by now. AdaBatch never shrinks it, except with
:class:`~composer_effalgos.adabatch.seesaw.Seesaw`."""


class Every:
    """Grows at regular intervals.

    Args:
        interval: Time between growths: epochs (``'20ep'``), batches (``'2000ba'``), samples (``'1000000sp'``), tokens (``'50000000tok'``)
            or a fraction of the run (``'0.2dur'``).

    Raises:
        InputError: If it is not such a time.
    """

    def __init__(self, interval: str | int | Time) -> None:
        self.times = [parse_time('interval', interval)]

    def __call__(self, progress: Progress) -> int:
        return times_passed(progress, self.times[0])


class Milestones:
    """Grows at given times.

    Args:
        milestones: Times as for :class:`Every`, in any order, with any units.

    Raises:
        InputError: If they are not a non-empty list of such times.
    """

    def __init__(self, milestones: Sequence[str | int | Time]) -> None:
        if isinstance(milestones, str | Time) or not isinstance(milestones, Sequence):
            raise InputError(f"milestones: expected a list of times such as ['20ep', '40ep'], got {milestones!r}")
        if not milestones:
            raise InputError('milestones: expected at least one time, got []; leave AdaBatch out if the batch should not grow')
        self.times = [parse_time(f'milestones[{i}]', milestone) for i, milestone in enumerate(milestones)]

    def __call__(self, progress: Progress) -> int:
        return sum(times_passed(progress, time) > 0 for time in self.times)


class LossPlateau(Watching):
    """Grows when the training loss stops decreasing.

    The mean training loss of each window is compared with the best so far. After more than ``patience`` consecutive windows without a
    relative improvement of ``threshold``, the batch grows and the count restarts. This is the rule of
    ``torch.optim.lr_scheduler.ReduceLROnPlateau`` (``mode='min'``, ``threshold_mode='rel'``). Composer has already moved the loss of all
    ranks to the host, so reading it costs nothing.

    Args:
        patience: Allowed windows without improvement, at least 0.
        threshold: Relative decrease of the best loss that counts as an improvement, at least 0.
        window: Time over which the loss is averaged: epochs, batches, samples, tokens or a fraction of the run.

    Raises:
        InputError: For an argument outside its range.
    """

    def __init__(self, patience: int = 2, threshold: float = 0.01, window: str | int | Time = '1ep') -> None:
        check_whole('patience', patience, least=0, what='a whole number of windows')
        check_number('threshold', threshold, least=0, most=LARGEST)
        self.patience, self.threshold = patience, threshold
        super().__init__(window)

    def _reset(self) -> None:
        super()._reset()
        self._best, self._bad_windows = math.inf, 0
        self._loss_sum, self._samples = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        own = {'best': self._best, 'bad_windows': self._bad_windows, 'loss_sum': self._loss_sum, 'samples': self._samples}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._best, self._bad_windows = state['best'], state['bad_windows']
        self._loss_sum, self._samples = state['loss_sum'], state['samples']

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.previous_timestamp is not None
        if 'loss/train/total' in state.total_loss_dict:
            samples = int(state.timestamp.sample - state.previous_timestamp.sample)
            self._loss_sum += state.total_loss_dict['loss/train/total'] * samples
            self._samples += samples
        super().batch_end(state, logger)

    def _decide(self, state: State, logger: Logger) -> None:
        if not self._samples:
            return
        loss = self._loss_sum / self._samples
        self._loss_sum, self._samples = 0.0, 0
        if math.isfinite(loss) and (self._best == math.inf or loss < self._best - self.threshold * abs(self._best)):
            self._best, self._bad_windows = loss, 0
        else:
            self._bad_windows += 1
        if self._bad_windows > self.patience:
            self._bad_windows = 0
            self.growths += 1


POLICIES: Mapping[str, Callable[..., Policy | SizePolicy]] = {
    'loss_plateau': LossPlateau,
    'noise_scale': NoiseScale,
    'norm_test': NormTest,
    'seesaw': Seesaw,
}


def find_policy(given: Policy | str | Mapping[str, Any]) -> Policy | SizePolicy:
    """Finds a policy by name.

    Args:
        given: A policy, or one of :data:`POLICIES` by name: ``'noise_scale'``, or ``{'name': 'noise_scale', 'ratio': 1}``.

    Raises:
        InputError: For an unknown name or argument, or another type.
    """
    if callable(given):
        return given
    name, arguments = name_and_options('policy', given, POLICIES, 'a function of the progress')
    try:
        return POLICIES[name](**arguments)
    except TypeError as error:
        raise InputError(f'policy: {name}: {error}') from error
