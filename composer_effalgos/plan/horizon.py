"""How long a run is planned to be, over however many calls of ``fit``."""

from __future__ import annotations

from composer.core import State, Time


class Horizon:
    """The planned end of the run.

    ``fit(duration=...)`` sets ``max_duration`` to the end of that call alone. The run is planned to end where the Trainer's own
    ``max_duration`` says, if that is later and in the same unit. Past that end, each ``fit`` moves it.

    Attributes:
        end: The planned end, from ``FIT_START`` on.
        extended: Whether the current ``fit`` began at or past the end that was planned before: how far the run will go is then unknown.
    """

    def __init__(self) -> None:
        self._given: Time | None = None  # the Trainer's max_duration
        self._fitted = False
        self.end: Time | None = None
        self.extended = False

    def after_load(self, state: State) -> None:
        """Notes the Trainer's ``max_duration``.

        Args:
            state: The trainer's state at ``AFTER_LOAD``.
        """
        self._given = state.max_duration

    def fit_start(self, state: State, loaded: str | None = None) -> None:
        """Plans the end anew for this ``fit``.

        Args:
            state: The trainer's state at ``FIT_START``.
            loaded: The planned end as a checkpoint has it.
        """
        fit_end, before = state.max_duration, self.end if loaded is None else Time.from_timestring(loaded)
        assert fit_end is not None
        if self._fitted and int(state.timestamp.batch) == 0:  # fit(reset_time=True) is another run
            self._given = before = None
        given = self._given is not None and self._given.unit == fit_end.unit and self._given >= fit_end
        self.end = self._given if given else fit_end
        passed = before is not None and before.unit == fit_end.unit and before <= state.timestamp.get(before.unit)
        self.extended, self._fitted = passed and not given, True

    def progress(self, state: State) -> float:
        """The share of the run that has passed.

        Args:
            state: The trainer's state.

        Returns:
            A number in [0, 1] before the end.
        """
        assert self.end is not None
        return int(state.timestamp.get(self.end.unit)) / int(self.end.value)
