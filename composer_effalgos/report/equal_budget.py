"""The equivalent-budget factor: the budget that a plain run needs for a method's quality, divided by the method's budget.

A method that trains on fewer samples must be compared with a plain run of the same budget whose schedule also decays to zero. Plain runs
of several lengths give a curve of quality against budget; a method's factor is the budget at which this curve reaches the method's quality,
divided by the method's own budget. Above 1 the method pays; below 1, train shorter.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.stats import chi2

from composer_effalgos.utils.errors import InputError

_GRID = 512  # points on the curve between the shortest and longest plain run
_DRAWS = 4000
_PRIOR_DOF = 4  # degrees of freedom of the prior variance, from all other cells
_MOST_SHIFT = 9.0  # clip of log-budget errors: with one degree of freedom some draws would overflow
_ENDS = (0.025, 0.975)
_LENGTHS = 3  # plain lengths that a verdict needs
_MOST_GAP = 2.5  # ratio of neighbouring plain budgets above which the interpolation may be off by more than a twentieth

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Cell:
    """The runs of one method at one length, differing only in the seed.

    Attributes:
        name: The method's name with its length.
        budget: Budget of each run (seconds, samples or steps), float ``[n]``, positive.
        quality: Quality of each run, higher is better, float ``[n]``.
    """

    name: str
    budget: Array
    quality: Array


@dataclass(frozen=True)
class Factor:
    """An equivalent-budget factor with its 95 % interval.

    Attributes:
        value: The factor; 0 if the method is worse than the shortest plain run, inf if it is better than the longest: the curve is not
            extrapolated.
        low: Lower end of the interval, 0 or inf as for ``value``; 0 if every cell has a single seed, so that the spread is unknown.
        high: Upper end; inf if the spread is unknown.
        least: The smallest measurable factor: the shortest plain budget over the method's.
        most: The largest measurable factor: the longest plain budget over the method's.
        doubt: Why the interval allows no verdict, e.g. because the plain lengths are too far apart; empty if it does.
    """

    value: float
    low: float
    high: float
    least: float
    most: float
    doubt: str = ''

    def __str__(self) -> str:
        return f'{self.text(self.value)} ({self.text(self.low)} to {self.text(self.high)})'

    def text(self, factor: float) -> str:
        """Formats the value or an end of the interval; as a bound if it lies beyond the plain runs."""
        return f'< {self.least:.2f}' if factor == 0 else f'> {self.most:.2f}' if np.isinf(factor) else f'{factor:.2f}'

    @property
    def verdict(self) -> str:
        """The verdict in words, based on the interval; an end beyond the plain runs is replaced by its bound."""
        low = self.most if np.isinf(self.low) else self.low
        high = self.least if self.high == 0 else self.high
        if self.doubt and (low > 1 or high < 1):
            return f'not resolved: {self.doubt}'
        if low > 1:
            return 'pays'
        if high < 1:
            return 'train shorter instead'
        if np.isinf(self.value):
            return 'not resolved: needs a longer plain run'
        if self.value == 0:
            return 'not resolved: needs a shorter plain run'
        return 'not resolved'


@dataclass(frozen=True)
class Curve:
    """Quality of plain runs against budget, with a pointwise 95 % band.

    Attributes:
        budget: Budgets from the shortest to the longest length, float ``[G]``.
        quality: The curve, float ``[G]``.
        low: Lower edge of the band.
        high: Upper edge.
    """

    budget: Array
    quality: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Comparison:
    """Comparison of methods with plain runs.

    Attributes:
        curve: The curve of the plain runs.
        factors: One factor per method.
        quality: Mean quality and its 95 % interval of the plain cells, then the methods, as given; float ``[cells, 3]``: mean, low, high.
    """

    curve: Curve
    factors: list[Factor]
    quality: Array


def compare(baseline: Sequence[Cell], methods: Sequence[Cell], *, seed: int = 0) -> Comparison:
    """Compares methods with the curve of plain runs.

    The curve is a monotone cubic (PCHIP) in the logarithm of the budget, through the mean qualities of the plain lengths after making them
    monotone (the average of the running maximum and of the running minimum from the other end).

    The intervals come from a parametric bootstrap, which keeps its level with three seeds, unlike resampling: each cell's mean quality and
    mean log budget are drawn from normal distributions, whose variances are drawn from scaled inverse chi-squared distributions. A cell's
    variance between seeds is moderated by those of the other cells.

    Args:
        baseline: Plain runs of two or more lengths, in any order.
        methods: Runs of one method at one length each.
        seed: Seed of the bootstrap.

    Returns:
        The curve, the factors in the order of ``methods``, and the quality of each cell.

    Raises:
        InputError: There are fewer than two plain lengths, or two have the same budget.
    """
    order = np.argsort([np.log(cell.budget).mean() for cell in baseline])
    plain = [baseline[number] for number in order]
    cells = [*plain, *methods]
    x = np.array([np.log(cell.budget).mean() for cell in cells])
    lengths = x[: len(plain)]
    if len(plain) < 2 or np.any(np.diff(lengths) <= 0):
        names = ', '.join(cell.name for cell in plain) or 'none'
        raise InputError(f'baseline: expected plain runs of at least two lengths, got {names}; four or more show a curve')
    rng = np.random.default_rng(seed)
    repeated = any(len(cell.quality) > 1 for cell in cells)
    means = np.array([[cell.quality.mean()] for cell in cells])
    quality = means + _errors([cell.quality for cell in cells], rng)
    logs = [np.log(cell.budget) for cell in cells]
    # exact budgets, such as the samples of a plain run, say nothing about the spread of the others
    shifts = np.zeros_like(quality)
    noisy = [number for number, values in enumerate(logs) if len(values) == 1 or np.ptp(values) > 0]
    if any(len(logs[number]) > 1 for number in noisy):
        shifts[noisy] = _errors([logs[number] for number in noisy], rng).clip(-_MOST_SHIFT, _MOST_SHIFT)

    curves = _Curves(lengths, quality[: len(plain)], shifts[: len(plain)])
    ends = np.exp(lengths[[0, -1]])
    factors = []
    for number in range(len(plain), len(cells)):
        own = np.exp(x[number])
        found = curves.budget(quality[number]) / np.exp(x[number] + shifts[number])
        # inverted_cdf returns draws without interpolating: those beyond the curve are 0 or inf
        low, high = np.quantile(found[1:], _ENDS, method='inverted_cdf') if repeated else (0.0, np.inf)
        doubt = _doubt(np.exp(lengths), low * own, high * own)
        factors.append(Factor(float(found[0]), float(low), float(high), float(ends[0] / own), float(ends[1] / own), doubt))
    intervals = np.quantile(quality[:, 1:], _ENDS, axis=1).T
    found = np.hstack([means, intervals])
    return Comparison(curves.band(), factors, np.concatenate([found[: len(plain)][np.argsort(order)], found[len(plain) :]]))


def _doubt(lengths: Array, low: float, high: float) -> str:
    """Why the curve is not known well enough between two budgets; the interval has no term for the error of the interpolation.

    A curve that flattens lies above its interpolation, so a method between two distant plain lengths would seem to pay. For power laws and
    exponentials, lengths that double give factors right to 3 %; lengths that grow fourfold, only to 14 % or worse.
    """
    if len(lengths) < _LENGTHS:
        return f'needs {_LENGTHS} plain lengths'
    low, high = np.clip([low, high], lengths[0], lengths[-1])
    spans = itertools.pairwise(lengths)
    wide = any(right / left > _MOST_GAP and low <= right and high >= left for left, right in spans)
    return 'needs closer plain lengths' if wide else ''


def _errors(values: Sequence[Array], rng: np.random.Generator) -> Array:
    """Draws errors of the cells' means, ``[cells, 1 + draws]``; the first column is 0, for the estimate itself."""
    if all(len(own) == 1 for own in values):
        return np.zeros((len(values), 2))  # the spread is unknown
    variance, freedom = _moderated(values)
    counts = np.array([len(own) for own in values])
    scale = np.sqrt(variance * freedom / counts)[:, None] / np.sqrt(rng.chisquare(freedom[:, None], (len(values), _DRAWS)))
    return np.hstack([np.zeros((len(values), 1)), scale * rng.standard_normal((len(values), _DRAWS))])


def _moderated(values: Sequence[Array]) -> tuple[Array, Array]:
    """Variances between seeds: each cell's own, moderated by a prior with four degrees of freedom, the median of the other cells.

    The two degrees of freedom of three seeds are too few; pooling all cells would hide that a method is noisier than plain training, and
    such a method would widen every interval. This is the moderated variance of Smyth (2004), with a fixed prior weight.

    Args:
        values: The values of the runs of each cell; at least one cell has two or more.

    Returns:
        The variances and their degrees of freedom, ``[cells]`` each.
    """
    own = np.array([len(cell) - 1 for cell in values], float)
    squares = np.array([((cell - cell.mean()) ** 2).sum() for cell in values])
    others = own.sum() - own
    prior = np.minimum(others, _PRIOR_DOF)
    freedom = prior + own
    several = own > 0
    typical = squares[several] / chi2.median(own[several])  # median-unbiased: as likely above the true variance as below
    places = np.cumsum(several) - 1
    common = np.array(
        [
            np.median(np.delete(typical, places[number]) if several[number] else typical) if prior[number] else 0.0
            for number in range(len(values))
        ]
    )
    return (prior * common + squares) / freedom, freedom


class _Curves:
    """Bootstrap draws of the plain runs' curve.

    Args:
        x: Logarithms of the plain budgets, ascending, ``[L]``.
        quality: Mean qualities at these budgets, ``[L, D]``; the first draw is the estimate.
        shifts: Errors of ``x``, ``[L, D]``.
    """

    def __init__(self, x: Array, quality: Array, shifts: Array) -> None:
        up = np.maximum.accumulate(quality)
        down = np.minimum.accumulate(quality[::-1])[::-1]
        self._grid = np.linspace(x[0], x[-1], _GRID)
        self._curve = np.maximum.accumulate(PchipInterpolator(x, (up + down) / 2)(self._grid))  # removes decreases by rounding
        # The curve is fitted at the mean log budgets; errors of the budgets shift its points afterwards, interpolated between lengths
        right = np.searchsorted(x, self._grid).clip(1, len(x) - 1)
        share = ((self._grid - x[right - 1]) / (x[right] - x[right - 1]))[:, None]
        self._places = self._grid[:, None] + (1 - share) * shifts[right - 1] + share * shifts[right]

    def budget(self, wanted: Array) -> Array:
        """Smallest budget at which each draw reaches a quality.

        Args:
            wanted: A quality for each draw, ``[D]``.

        Returns:
            Budgets ``[D]``; 0 below the curve, inf above it.
        """
        curve, column = self._curve, np.arange(len(wanted))
        inside = (curve < wanted).sum(axis=0).clip(1, _GRID - 1)
        low, high = curve[inside - 1, column], curve[inside, column]
        share = ((wanted - low) / np.where(high > low, high - low, 1.0)).clip(0, 1)
        found = np.exp((1 - share) * self._places[inside - 1, column] + share * self._places[inside, column])
        return np.where(wanted < curve[0], 0.0, np.where(wanted > curve[-1], np.inf, found))

    def band(self) -> Curve:
        """Returns the estimated curve and its band."""
        drawn = [np.interp(self._grid, place, curve) for place, curve in zip(self._places.T[1:], self._curve.T[1:], strict=True)]
        low, high = np.quantile(drawn, _ENDS, axis=0)
        return Curve(np.exp(self._grid), self._curve[:, 0], low, high)
