"""The planned length of a run over any number of calls of ``fit``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from composer.core import State, Time, TimeUnit

from composer_effalgos.utils.errors import InputError

Budget = Literal['trained', 'full']
"""What a ``max_duration`` in samples, batches or tokens counts: the samples trained on, or those of a run without pruning."""


def check_budget(budget: str) -> None:
    """Checks that an argument is a :data:`Budget`."""
    if budget not in ('trained', 'full'):
        raise InputError(f"budget: expected 'trained' or 'full', got {budget!r}")


def in_full_epochs(length: Time, full: Mapping[TimeUnit, int]) -> Time:
    """Converts a time to epochs.

    Args:
        length: The time.
        full: Samples, batches and tokens of a full epoch, as far as they are known.

    Raises:
        InputError: If it is not a whole number of epochs.
    """
    if length.unit == TimeUnit.EPOCH:
        return length
    if length.unit not in full:
        known = ' or '.join(unit.value for unit in (TimeUnit.EPOCH, *full))
        raise InputError(
            f"max_duration: expected {known} with budget='full', got {length.to_timestring()!r}; the length of a full epoch in "
            'other units is not known in advance'
        )
    size = full[length.unit]
    epochs, rest = divmod(length.value, size)
    if rest or not epochs:
        raise InputError(
            f"max_duration: expected whole epochs of {size}{length.unit.value} with budget='full', got {length.to_timestring()!r}, "
            f"{length.value / size:.3f} of them; give '{max(1, round(length.value / size))}ep'"
        )
    return Time(epochs, TimeUnit.EPOCH)


class Horizon:
    """The planned end of the run.

    ``fit(duration=...)`` sets ``max_duration`` to the end of that call only. The planned end is the Trainer's own ``max_duration``, if that
    is later and in the same unit. Once the run has reached it, each further ``fit`` moves it.

    Attributes:
        end: The planned end, from ``FIT_START`` on.
        budget: The ``max_duration`` that :meth:`convert` replaced by epochs; ``None`` if it replaced none.
        extended: Whether the current ``fit`` began at or after the previously planned end, so that the end of the run is unknown.
    """

    def __init__(self) -> None:
        self._given: Time | None = None  # the Trainer's max_duration
        self._fitted = False
        self.end: Time | None = None
        self.budget: Time | None = None
        self.extended = False
        self._sample_tokens: int | None = None  # used to convert a budget in tokens

    def after_load(self, state: State) -> None:
        """Records the Trainer's ``max_duration``; at ``AFTER_LOAD``."""
        self._given = state.max_duration

    def convert(self, state: State, full: Mapping[TimeUnit, int], sample_tokens: int | None = None) -> None:
        """Replaces a ``max_duration`` in another unit by the number of epochs that a run without pruning would train.

        Args:
            state: The trainer's state at ``FIT_START``, before :meth:`fit_start`.
            full: Samples and batches of a full epoch.
            sample_tokens: Tokens per sample, if all samples have the same number.

        Raises:
            InputError: If it is not a whole number of epochs.
        """
        if sample_tokens is not None:
            full = {**full, TimeUnit.TOKEN: sample_tokens * full[TimeUnit.SAMPLE]}
        length = state.max_duration
        assert length is not None
        if length.unit != TimeUnit.EPOCH:
            self.budget = length
        elif self.end is None or length != self.end:  # otherwise fit() continues with the converted end
            self.budget = None
        state.max_duration = in_full_epochs(length, full)
        if self._given is not None:
            self._given = in_full_epochs(self._given, full)
        in_tokens = self.budget is not None and self.budget.unit == TimeUnit.TOKEN
        self._sample_tokens = sample_tokens if in_tokens else None

    def check_tokens(self, state: State) -> None:
        """Checks the tokens that Composer counted in a batch against the number used to convert a budget in tokens; at ``BATCH_END``.

        Raises:
            InputError: If the samples have another number of tokens.
        """
        if self._sample_tokens is None:
            return
        assert state.previous_timestamp is not None, 'the trainer has just advanced the timestamp'
        samples = int(state.timestamp.sample - state.previous_timestamp.sample)
        tokens = int(state.timestamp.token - state.previous_timestamp.token)
        if tokens != samples * self._sample_tokens:
            raise InputError(
                f"max_duration: expected {self._sample_tokens} tokens in each sample with budget='full' in tokens, according to the "
                f"dataset's seq_len, got {tokens} in {samples} samples; give max_duration in 'ep' or 'sp'"
            )

    def fit_start(self, state: State, loaded: str | None = None) -> None:
        """Updates the planned end for this ``fit``.

        Args:
            state: The trainer's state at ``FIT_START``.
            loaded: The planned end from a checkpoint.
        """
        fit_end, before = state.max_duration, self.end if loaded is None else Time.from_timestring(loaded)
        assert fit_end is not None
        if self._fitted and int(state.timestamp.batch) == 0:  # fit(reset_time=True) starts another run
            self._given = before = None
        given = self._given is not None and self._given.unit == fit_end.unit and self._given >= fit_end
        self.end = self._given if given else fit_end
        passed = before is not None and before.unit == fit_end.unit and before <= state.timestamp.get(before.unit)
        self.extended, self._fitted = passed and not given, True

    def progress(self, state: State) -> float:
        """The fraction of the run that is finished, in [0, 1] up to the planned end."""
        assert self.end is not None
        return int(state.timestamp.get(self.end.unit)) / int(self.end.value)
