"""The progress of a run, and times in Composer's units."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from composer.core import State, Time, TimeUnit

from composer_effalgos.utils.errors import InputError

if TYPE_CHECKING:
    from composer_effalgos.plan.planner import EpochPlanner

UNITS = (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN, TimeUnit.DURATION)
_SUFFIXES = {'K': 10**3, 'M': 10**6, 'B': 10**9, 'T': 10**12}
_WITH_SUFFIX = re.compile(r'(\d+|\d*\.\d+)([KMBT])(ep|ba|sp|tok)', re.IGNORECASE)


class Progress(NamedTuple):
    """The progress of a run before a batch.

    Attributes:
        epoch: Finished epochs.
        batch: Batches trained.
        sample: Samples trained, over all ranks.
        token: Tokens trained, over all ranks; 0 if the batches have none. For later batches, an estimate from the tokens per sample so far.
        share: Finished fraction of the planned run, in [0, 1]. If its length is in epochs, the samples of the current epoch count as a
            fraction of those of an epoch that trains on everything.
    """

    epoch: int
    batch: int
    sample: int
    token: int = 0
    share: float = 0.0

    def of(self, unit: TimeUnit) -> float:
        """The progress in a unit of :data:`UNITS`."""
        return self[UNITS.index(unit)]


def progress_of(state: State, planner: EpochPlanner | None, batch: int | None = None, sample: int | None = None) -> Progress:
    """The progress of a run now, or at a later batch of the current epoch.

    Args:
        state: The trainer's state.
        planner: The run's planner, which knows the planned end of the run and the length of an epoch, from ``FIT_START`` on.
        batch: Batches trained; ``None`` for now.
        sample: Samples trained, over all ranks; ``None`` for now.
    """
    now = state.timestamp
    token = int(now.token)
    if sample is not None and token:
        token += round((sample - int(now.sample)) * token / int(now.sample))
    progress = Progress(int(now.epoch), int(now.batch) if batch is None else batch, int(now.sample) if sample is None else sample, token)
    length = state.max_duration if planner is None else planner.horizon.end or state.max_duration
    assert length is not None
    done = progress.of(length.unit) if length.unit in UNITS else now.get(length.unit).value
    if length.unit == TimeUnit.EPOCH and planner is not None and planner.loader.full_samples:
        in_epoch = progress.sample - int(now.sample - now.sample_in_epoch)
        done += min(1.0, in_epoch / planner.loader.full_samples)
    return progress._replace(share=done / length.value)


def parse_time(name: str, value: str | int | Time, units: Sequence[TimeUnit] = UNITS) -> Time:
    """Parses a time string.

    Args:
        name: The argument's name, for messages.
        value: A Composer time string (``'20ep'``), optionally with a suffix K, M, B or T (``'1.5Mtok'``), a :class:`composer.core.Time`, or
            a number of epochs.
        units: The allowed units.

    Returns:
        The time, greater than 0.

    Raises:
        InputError: If it is not a time, not positive, in another unit, or a fraction of the run above 1.
    """
    allowed = ', '.join(f"'{unit.value}'" for unit in units)
    found = _WITH_SUFFIX.fullmatch(value) if isinstance(value, str) else None
    try:
        if found:
            number, suffix, unit = found.groups()
            time = Time(round(float(number) * _SUFFIXES[suffix.upper()]), unit.lower())
        elif isinstance(value, int) and not isinstance(value, bool):
            time = Time(value, TimeUnit.EPOCH)
        else:
            time = Time.from_input(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: expected a time such as '20ep' (units {allowed}), got {value!r}") from error
    if time.unit not in units or time.value <= 0:
        raise InputError(f'{name}: expected a positive time in one of the units {allowed}, got {value!r}')
    if time.unit == TimeUnit.DURATION and time.value > 1:  # it would never be reached
        raise InputError(f"{name}: expected a share of the run of at most '1dur', got {value!r}")
    return time


def reached(progress: Progress, unit: TimeUnit) -> float:
    """The progress in a unit, for comparisons. A tolerance makes 0.6 of a run reach 3 * 0.2 despite rounding."""
    return progress.of(unit) + (1e-9 if unit == TimeUnit.DURATION else 0)


def times_passed(progress: Progress, time: Time) -> int:
    """How often ``time`` has passed."""
    if time.unit == TimeUnit.DURATION:
        return math.floor(progress.share / time.value + 1e-9)
    return int(progress.of(time.unit) // time.value)
