"""Argument checks."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean, shown

LARGEST = 1e12  # upper limit for step sizes, factors and the like; larger than any sensible value, and its square does not overflow
MOST_CLASSES = 2**20  # more than any real class count; without a limit, a label of 2**60 would allocate as many class names


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds: ``value in Range(least=0, below=1)``. Booleans do not count as numbers.

    Attributes:
        above: Exclusive lower bound.
        least: Inclusive lower bound.
        below: Exclusive upper bound.
        most: Inclusive upper bound.
    """

    above: float = -math.inf
    least: float = -math.inf
    below: float = math.inf
    most: float = math.inf

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return False
        try:
            finite = math.isfinite(value)
        except OverflowError:  # an integer too large for a float
            return False
        # as a float, 2**63 - 1 would not be below 2**63
        number = int(value) if is_whole(value) else float(value)  # type: ignore[call-overload]
        return finite and self.above < number < self.below and self.least <= number <= self.most

    def __str__(self) -> str:
        """The range in words that can follow ``a number``: ``in [0, 1)``, ``greater than 1``."""
        low = f'({_bound(self.above)}' if self.above > -math.inf else f'[{_bound(self.least)}' if self.least > -math.inf else ''
        high = f'{_bound(self.below)})' if self.below < math.inf else f'{_bound(self.most)}]' if self.most < math.inf else ''
        if low and high:
            return f'in {low}, {high}'
        bounds = {'greater than': self.above, 'at least': self.least, 'less than': self.below, 'at most': self.most}
        return ' and '.join(f'{words} {_bound(bound)}' for words, bound in bounds.items() if math.isfinite(bound)) or 'that is finite'


def _bound(value: float) -> str:
    short = f'{value:g}'
    return short if float(short) == value else str(value)


def is_whole(value: Any) -> bool:
    """Whether a value has an integer type, including NumPy's; booleans do not count."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_number(
    name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf, most: float = math.inf
) -> None:
    """Checks that a value is a finite number within bounds, of which ``above`` and ``below`` are exclusive; ``name`` starts the message."""
    allowed = Range(above, least, below, most)
    if value not in allowed:
        raise InputError(f'{name}: expected a number {allowed}, got {shown(value)}')


def check_whole(name: str, value: Any, *, least: int, most: int | None = None, what: str = 'a whole number') -> None:
    """Checks that a value is an integer within inclusive bounds.

    ``what`` is what the message expects, such as ``a whole number of batches``.
    """
    if not is_whole(value) or value < least or (most is not None and value > most):
        bounds = f', at least {least}' if most is None else f' from {least} to {most}'
        raise InputError(f'{name}: expected {what}{bounds}, got {shown(value)}')


def name_and_options(key: str, given: Any, known: Iterable[str], what: str) -> tuple[str, dict[str, Any]]:
    """Parses ``'seta'`` or ``{'name': 'seta', 'groups': 5}`` into the name, which must be in ``known``, and the options.

    ``what`` is what else is allowed, for the message.
    """
    options = {'name': given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = options.pop('name', None)
    if not isinstance(name, str) or name not in set(known):
        raise InputError(f'{key}: expected {what} or a name, alone or with its options, got {shown(given)}; {did_you_mean(name, known)}')
    return name, options
