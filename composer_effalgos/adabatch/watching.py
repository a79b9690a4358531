"""Policies that observe training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from composer.core import Callback, State, Time
from composer.loggers import Logger

from composer_effalgos.plan import EpochPlanner
from composer_effalgos.plan.progress import Progress, parse_time, progress_of, times_passed


class Watching(Callback):
    """A policy that observes training in windows of time and decides at the end of each."""

    times: Sequence[Time]

    def __init__(self, window: str | int | Time) -> None:
        self.times = [parse_time('window', window)]
        self._reset()

    def _reset(self) -> None:
        self.growths = 0
        self._windows = 0  # finished windows

    def __call__(self, progress: Progress) -> int:
        return self.growths

    def state_dict(self) -> dict[str, Any]:
        return {'growths': self.growths, 'windows': self._windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.growths, self._windows = state['growths'], state['windows']

    def fit_start(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == 0:  # the object may have been used in another run
            self._reset()

    def batch_end(self, state: State, logger: Logger) -> None:
        self._look(state, logger)

    def epoch_end(self, state: State, logger: Logger) -> None:
        self._look(state, logger)

    def _look(self, state: State, logger: Logger) -> None:
        windows = times_passed(progress_of(state, EpochPlanner.find(state)), self.times[0])
        if windows > self._windows:
            self._windows = windows
            self._decide(state, logger)

    def _decide(self, state: State, logger: Logger) -> None:
        raise NotImplementedError
