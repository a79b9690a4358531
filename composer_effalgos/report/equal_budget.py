"""The equivalent-budget factor: what a plain run would have to spend for a method's quality, over what the method spent.

A method that trains on fewer samples must be compared with a plain run that is shortened to the same budget, its schedule decayed to zero
there too. The plain runs, trained at several lengths, give quality against budget; a method's factor is the budget that this curve needs
for the method's quality, divided by the method's own budget. Above 1 the method pays; below 1 one should train shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator

from composer_effalgos.utils.errors import InputError

_GRID = 512  # points of the curve between the shortest and the longest plain run
_DRAWS = 4000


@dataclass(frozen=True)
class Cell:
    """The runs of one method at one length, alike but for the seed.

    Attributes:
        name: The method's name with its length.
        budget: What each run spent (seconds, samples or steps), float ``[n]``, positive.
        quality: What each reached, higher is better, float ``[n]``.
    """

    name: str
    budget: np.ndarray
    quality: np.ndarray


@dataclass(frozen=True)
class Factor:
    """An equivalent-budget factor with its 95 % interval.

    Attributes:
        value: The factor; 0 where the method is worse than the shortest plain run, inf where it is better than the longest: the curve is
            not extrapolated.
        low: Lower end of the interval, in the same way.
        high: Upper end.
        least: The smallest factor that can be measured: the shortest plain budget over the method's.
        most: The largest: the longest plain budget over the method's.
    """

    value: float
    low: float
    high: float
    least: float
    most: float

    def __str__(self) -> str:
        return f'{self._text(self.value)} ({self._text(self.low)} to {self._text(self.high)})'

    def _text(self, factor: float) -> str:
        return f'< {self.least:.2f}' if factor == 0 else f'> {self.most:.2f}' if np.isinf(factor) else f'{factor:.2f}'


def equivalent_budget(baseline: Sequence[Cell], method: Cell, *, seed: int = 0) -> Factor:
    """Sets a method against the curve of plain runs.

    The curve goes through the mean qualities of the plain lengths, made monotone (the average of their running maximum and of the running
    minimum from the other end), as a monotone cubic (PCHIP) in the logarithm of the budget. The interval is a parametric bootstrap: the
    spread between seeds, pooled over all lengths, is drawn from its scaled inverse chi-squared distribution and every mean from a normal
    distribution with it, which holds its level with three seeds, where resampling three runs does not.

    Args:
        baseline: Plain runs at two lengths or more.
        method: The method's runs at one length.
        seed: Of the bootstrap.

    Returns:
        The factor.

    Raises:
        InputError: Where there are fewer than two plain lengths, or no length with two seeds.
    """
    cells = sorted(baseline, key=lambda cell: float(cell.budget.mean()))
    x = np.log([cell.budget.mean() for cell in cells])
    if len(cells) < 2 or np.any(np.diff(x) <= 0):
        raise InputError(f'baseline: expected runs of at least two lengths, got {[cell.name for cell in cells]}; four or more show a curve')
    everything = [*cells, method]
    freedom = sum(len(cell.quality) - 1 for cell in everything)
    if freedom == 0:
        raise InputError('seeds: expected at least two seeds of some length, got one of each; three of every length are right')
    spread = np.sqrt(sum(((cell.quality - cell.quality.mean()) ** 2).sum() for cell in everything) / freedom)

    rng = np.random.default_rng(seed)
    scale = spread * np.sqrt(freedom / rng.chisquare(freedom, _DRAWS))
    scale = np.concatenate([[0.0], scale])  # the first column is the estimate itself
    means = np.array([[cell.quality.mean()] for cell in everything])
    counts = np.array([[len(cell.quality)] for cell in everything])
    drawn = means + rng.standard_normal((len(everything), len(scale))) * scale / np.sqrt(counts)
    budgets = _inverse(x, drawn[:-1], drawn[-1])
    own = float(method.budget.mean())
    factors = budgets / own
    # an interval's ends are draws, not averages of two: those beyond the curve are 0 or inf
    low, high = np.quantile(factors[1:], [0.025, 0.975], method='inverted_cdf')
    shortest, longest = np.exp(x[[0, -1]])
    return Factor(float(factors[0]), float(low), float(high), float(shortest / own), float(longest / own))


def _inverse(x: np.ndarray, quality: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The least budget at which each curve reaches a quality.

    Args:
        x: Logarithms of the plain budgets, ascending, ``[L]``.
        quality: Mean qualities of each curve at them, ``[L, D]``.
        wanted: A quality for each curve, ``[D]``.

    Returns:
        Budgets ``[D]``; 0 below the curve, inf above it.
    """
    up = np.maximum.accumulate(quality)
    down = np.minimum.accumulate(quality[::-1])[::-1]
    grid = np.linspace(x[0], x[-1], _GRID)
    curve = np.maximum.accumulate(PchipInterpolator(x, (up + down) / 2)(grid))  # of rounding
    after = (curve < wanted).sum(axis=0)  # grid points below the quality
    column = np.arange(len(wanted))
    inside = after.clip(1, _GRID - 1)
    low, high = curve[inside - 1, column], curve[inside, column]
    rise = np.where(high > low, high - low, 1.0)
    found = np.exp(grid[inside - 1] + (grid[1] - grid[0]) * ((wanted - low) / rise).clip(0, 1))
    return np.where(wanted < curve[0], 0.0, np.where(wanted > curve[-1], np.inf, found))
