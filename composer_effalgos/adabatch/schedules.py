"""Batch schedules: the batch size as a function of the run's progress."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from composer.core import Time, TimeUnit

from composer_effalgos.plan.progress import UNITS, Progress, parse_time, reached
from composer_effalgos.utils.errors import InputError

_FORM = "'0:32 1ep:64 250ktok:96 2Mtok:256', pairs of a time and a batch size"
_RAMP = "{'start': 32, 'stop': 256, 'increment': 32, 'over': '1Mtok'}"
_UNITS = ', '.join(unit.value for unit in UNITS)
LARGEST_SIZE = 10**9
_MOST_STEPS = 100_000

ScheduleLike = str | Mapping[str, Any] | Callable[[Progress], int | None]
"""What ``AdaBatch(schedule=...)`` takes; see :func:`find_schedule`."""


class SizePolicy:
    """A policy that returns the batch size instead of a number of growths. Sizes may shrink."""

    times: Sequence[Time] = ()

    def __call__(self, progress: Progress) -> int | None:
        """The batch size after ``progress``, in samples; ``None`` for the loader's own."""
        raise NotImplementedError

    @property
    def known_sizes(self) -> Sequence[int]:
        """All sizes that may occur, as far as they are known."""
        return ()


class Function(SizePolicy):
    """A schedule given by a function.

    Args:
        function: ``progress -> samples``.
    """

    def __init__(self, function: Callable[[Progress], int | None]) -> None:
        self.function = function

    def __call__(self, progress: Progress) -> int:
        size = self.function(progress)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f'schedule: expected the function to give a batch size of at least 1, got {size!r}')
        return size

    def __repr__(self) -> str:
        return getattr(self.function, '__name__', type(self.function).__name__)


class Steps(SizePolicy):
    """A schedule that steps between batch sizes at given times.

    The current size is that of the last entry whose time has been reached.

    Args:
        times: When each size begins. The first is 0; times in the same unit must ascend.
        sizes: As many batch sizes, in samples.
    """

    def __init__(self, times: Sequence[Time], sizes: Sequence[int]) -> None:
        self.times, self.sizes = list(times), list(sizes)
        # for each unit, its times in ascending order and their positions in the list
        self._places: dict[TimeUnit, tuple[list[float], list[int]]] = {}
        for place, time in enumerate(self.times[1:], 1):
            values, places = self._places.setdefault(time.unit, ([], []))
            values.append(time.value)
            places.append(place)

    @property
    def known_sizes(self) -> Sequence[int]:
        return self.sizes

    def __call__(self, progress: Progress) -> int:
        last = 0
        for unit, (values, places) in self._places.items():
            begun = bisect_right(values, reached(progress, unit))
            last = max(last, places[begun - 1] if begun else 0)
        return self.sizes[last]

    def __repr__(self) -> str:
        later = zip(self.times[1:], self.sizes[1:], strict=True)
        entries = [f'0:{self.sizes[0]}', *(f'{time.to_timestring()}:{size}' for time, size in later)]
        return repr(' '.join(entries if len(entries) <= 8 else [*entries[:4], '...', *entries[-2:]]))


def parse_steps(text: str) -> Steps:
    """Parses ``'0:32 1ep:64 250ktok:96'``: Megatron-LM's ``--step-batch-size-schedule`` with Composer's time units.

    Args:
        text: Pairs ``TIME:SIZE`` separated by spaces or commas. The first time is 0. A time is a number, an optional suffix K, M, B or T
            (1e3 to 1e12), and a unit.

    Returns:
        The schedule.

    Raises:
        InputError: For anything else; the message gives the number and text of the entry.
    """
    entries = text.replace(',', ' ').split()
    if not entries:
        raise InputError(f'schedule: expected {_FORM}, got {text[:40]!r}')
    times: list[Time] = []
    sizes: list[int] = []
    latest: dict[TimeUnit, tuple[float, str]] = {}
    for number, entry in enumerate(entries, 1):
        where = f'schedule: entry {number} ({entry[:40]!r})'
        time_text, colon, size_text = entry.partition(':')
        if not colon or not size_text.isascii() or not size_text.isdecimal():
            raise InputError(f'{where}: expected TIME:SIZE with a whole number of samples, such as 250ktok:96; the full form is {_FORM}')
        size = int(size_text[:12])
        if not 1 <= size <= LARGEST_SIZE or len(size_text) > 12:
            raise InputError(f'{where}: expected a batch size from 1 to {LARGEST_SIZE}, got {size_text[:20]}')
        if number == 1:
            if time_text not in ('0', *(f'0{unit.value}' for unit in UNITS)):
                raise InputError(
                    f"{where}: expected the first time to be 0, got {time_text[:40]!r}; write '0:SIZE {entry[:40]}' with the first size"
                )
            times.append(Time(0, TimeUnit.SAMPLE))
        else:
            try:
                time = parse_time('time', time_text)
            except InputError:
                raise InputError(
                    f'{where}: expected a time above 0 in {_UNITS} (at most 1dur), such as 1ep or 2.5Mtok, got {time_text[:40]!r}'
                ) from None
            before, written = latest.get(time.unit, (0, ''))
            if time.value <= before:
                raise InputError(f'{where}: expected a time after {written}, got {time_text}; times must ascend')
            latest[time.unit] = (time.value, time_text)
            times.append(time)
        sizes.append(size)
    return Steps(times, sizes)


def ramp(start: int, stop: int, over: str | int | Time, increment: int = 1, equal: str = 'samples') -> Steps:
    """A linear ramp: ``start``, ``start + increment``, ..., and ``stop`` after ``over``; descending if ``stop < start``.

    Args:
        start: First batch size.
        stop: Last batch size.
        over: Total time of all sizes before the last.
        increment: Step between sizes; must divide the difference of ``stop`` and ``start``.
        equal: ``'samples'`` gives every size an equal part of ``over``, as Megatron-LM's ``--rampup-batch-size START INCREMENT OVER``.
            ``'updates'`` gives every size the same number of updates, so a part in proportion to the size, as ModernBERT's
            ``BatchSizeWarmupScheduler(START, STOP, OVER)``.

    Returns:
        The ramp as steps.

    Raises:
        InputError: For an argument outside its range.
    """
    for name, value in (('start', start), ('stop', stop), ('increment', increment)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_SIZE:
            raise InputError(f'schedule.{name}: expected a whole number of samples from 1 to {LARGEST_SIZE}, got {value!r}; as in {_RAMP}')
    if equal not in ('samples', 'updates'):
        raise InputError(f"schedule.equal: expected 'samples' (as Megatron-LM) or 'updates' (as ModernBERT), got {equal!r}")
    length = parse_time('schedule.over', over)
    count, left = divmod(abs(stop - start), increment)
    if left or not count:
        raise InputError(f'schedule.increment: expected a divisor of stop - start = {stop - start}, got {increment}; as in {_RAMP}')
    if count > _MOST_STEPS:
        raise InputError(f'schedule.increment: expected at most {_MOST_STEPS} steps, got {count}; give a larger one')
    step = increment if stop > start else -increment
    sizes = [start + step * k for k in range(count + 1)]
    total = sum(sizes[:-1])
    times: list[Time] = [Time(0, length.unit)]
    before = 0
    for k in range(1, count + 1):
        before += sizes[k - 1]
        share = Fraction(k, count) if equal == 'samples' else Fraction(before, total)
        exact = Fraction(length.value) * share
        times.append(Time(float(exact), length.unit) if length.unit == TimeUnit.DURATION else Time(math.ceil(exact), length.unit))
    return Steps(times, sizes)


def find_schedule(given: ScheduleLike) -> SizePolicy:
    """Creates a schedule from the argument of a script or recipe.

    Args:
        given: A string for :func:`parse_steps`, a mapping of the arguments of :func:`ramp`, or a function of the progress.

    Raises:
        InputError: For anything else.
    """
    if isinstance(given, str):
        return parse_steps(given)
    if isinstance(given, Mapping):
        known = ('start', 'stop', 'over', 'increment', 'equal')
        for name in given:
            if name not in known:
                raise InputError(f'schedule.{name}: expected one of {", ".join(known)}; as in {_RAMP}')
        for name in known[:3]:
            if name not in given:
                raise InputError(f'schedule.{name}: missing; as in {_RAMP}')
        return ramp(**given)
    if isinstance(given, SizePolicy):
        return given
    if callable(given):
        return Function(given)
    raise InputError(f'schedule: expected {_FORM}, a ramp such as {_RAMP}, or a function of the progress, got {given!r}')
