"""``prune_ratio`` as a function of the run's progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError

Ratio = float | Mapping[float, float] | Sequence[tuple[float, float]] | Callable[[float], float]
"""A fraction in [0, 1), points ``(progress, fraction)``, or a function from progress to the fraction."""


def ratio_schedule(given: Ratio) -> Callable[[float], float]:
    """The pruned fraction as a function of the run's progress.

    Returns:
        A function from progress to a fraction in [0, 1).

    Raises:
        InputError: If it is not a fraction, points or a function; the returned function raises it if a user's function gives no fraction.
    """
    if callable(given):

        def checked(progress: float) -> float:
            ratio = given(progress)
            check_number(f'prune_ratio at progress {progress:g}', ratio, least=0, below=1)
            return float(ratio)

        return checked
    if isinstance(given, Mapping | Sequence) and not isinstance(given, str):
        try:
            points = [(progress, ratio) for progress, ratio in (given.items() if isinstance(given, Mapping) else given)]
        except (TypeError, ValueError) as error:
            raise InputError(f'prune_ratio: expected points (progress, fraction), got {given!r}') from error
        for progress, ratio in points:
            check_number('prune_ratio progress', progress, least=0, most=1)
            check_number(f'prune_ratio at progress {progress:g}', ratio, least=0, below=1)
        times = [progress for progress, _ in points]
        if not points or times != sorted(set(times)):
            raise InputError(f'prune_ratio: expected points whose progress ascends, got {given!r}')
        return lambda progress: float(np.interp(progress, times, [ratio for _, ratio in points]))
    check_number('prune_ratio', given, least=0, below=1)
    return lambda progress: given  # type: ignore[return-value]
