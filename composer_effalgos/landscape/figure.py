"""Figure 3 of Keskar et al.: cross-entropy (left axis) and accuracy (right axis) along the line between two solutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from composer_effalgos.landscape.curve import Point

_LOSS, _ACCURACY = '#1f4e9c', '#c2411c'


def draw(points: Sequence[Point], names: tuple[str, str], title: str) -> Figure:
    """Draws the curve, in ascending order of alpha, like Keskar et al.'s figure 3, with a logarithmic loss axis.

    ``names`` are those of the solutions at 0 and at 1. A non-finite loss leaves a gap, with a cross at the upper edge; a loss of 0 is drawn
    at the lower edge.
    """
    figure = Figure(figsize=(7.2, 4.6), layout='constrained')
    loss = figure.subplots()
    accuracy = loss.twinx()
    places = [point.alpha for point in points]
    losses: dict[str, Callable[[Point], float]] = {'-': lambda point: point.train_loss, '--': lambda point: point.test_loss}
    accuracies: dict[str, Callable[[Point], float]] = {'-': lambda point: point.train_accuracy, '--': lambda point: point.test_accuracy}

    loss.set_yscale('log', nonpositive='clip')
    for style, value in losses.items():
        heights = [value(point) for point in points]
        loss.plot(places, [height if math.isfinite(height) else math.nan for height in heights], style, color=_LOSS, linewidth=1.8)
        _mark_not_finite(loss, places, heights)
    for style, value in accuracies.items():
        accuracy.plot(places, [100 * value(point) for point in points], style, color=_ACCURACY, linewidth=1.8)

    for place in (0, 1):
        loss.axvline(place, color='0.6', linewidth=0.8, zorder=0)
    loss.set_xlim(min(places), max(places))
    accuracy.set_ylim(0, 100)
    loss.set_xlabel(f'alpha   (0: {names[0]}, 1: {names[1]})')
    loss.set_ylabel('cross-entropy', color=_LOSS)
    accuracy.set_ylabel('accuracy, %', color=_ACCURACY)
    loss.tick_params(axis='y', which='both', colors=_LOSS)
    accuracy.tick_params(axis='y', colors=_ACCURACY)
    loss.grid(axis='both', which='major', color='0.9', linewidth=0.6)
    loss.set_title(title, loc='left', fontsize='medium')
    styles = [Line2D([], [], color='0.2', linestyle='-', label='train'), Line2D([], [], color='0.2', linestyle='--', label='test')]
    loss.legend(handles=styles, loc='lower right', bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
    return figure


def _mark_not_finite(axes: Axes, places: Sequence[float], heights: Sequence[float]) -> None:
    """Draws a cross at the upper edge for each infinite or NaN value."""
    gone = [place for place, height in zip(places, heights, strict=True) if not math.isfinite(height)]
    axes.plot(gone, [1] * len(gone), 'x', color=_LOSS, transform=axes.get_xaxis_transform(), clip_on=False)
