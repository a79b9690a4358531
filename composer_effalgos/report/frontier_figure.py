"""Plots of a frontier: quality over budget, with the plain runs' curve and band, and a point per method."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from composer_effalgos.report.charts import color_of, family, scatter
from composer_effalgos.report.frontier import UNITS, Frontier, Point

MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', '*')
_SYMBOLS = ('circle', 'square', 'triangle-up', 'diamond', 'triangle-down', 'cross', 'x', 'star')  # plotly's names of MARKERS
_GREY = color_of(0)
TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # per decade


def draw(found: Frontier) -> Figure:
    """Draws a frontier; error bars and band are 95 % intervals."""
    figure = Figure(figsize=(9.0, 5.0), layout='constrained', facecolor='white')
    axes = figure.subplots()
    scale, curve = _scale(found), found.curve
    axes.fill_between(curve.budget, scale * curve.low, scale * curve.high, color=_GREY, alpha=0.18, linewidth=0)
    axes.plot(curve.budget, scale * curve.quality, color=_GREY, linewidth=1.6)
    for number, (name, points) in enumerate(_families(found)):
        style: dict[str, Any] = {'color': color_of(number), 'marker': MARKERS[number % len(MARKERS)], 'markersize': 6.5}
        style |= {'capsize': 3, 'linewidth': 1.2}
        style |= {'linestyle': 'none'} if points[0].plain or len(points) == 1 else {'linestyle': ':'}
        places, heights = [point.budgets[found.by] for point in points], [scale * point.quality for point in points]
        bars = [[scale * (point.quality - point.low) for point in points], [scale * (point.high - point.quality) for point in points]]
        axes.errorbar(places, heights, yerr=bars, label=name, zorder=2 if points[0].plain else 3, **style)
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(LogLocator(subs=TICKS))
    axes.xaxis.set_major_formatter(lambda value, _: f'{value:,.0f}')
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=f'training budget, {UNITS[found.by]}', ylabel=_quality(found))
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(color='0.9', linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc='outside right upper', frameon=False, fontsize=9)
    return figure


def chart(found: Frontier, numbers: Mapping[str, int]) -> dict[str, Any]:
    """Returns the plot for the report, in the format of :func:`composer_effalgos.report.charts.charts`; ``numbers`` colour the families."""
    scale, curve = _scale(found), found.curve
    x = _rounded([*curve.budget, *curve.budget[::-1]])
    y = _rounded([*(scale * curve.high), *(scale * curve.low)[::-1]])
    plain = scatter('frontier0', hoverinfo='skip')
    traces: list[dict[str, Any]] = [
        plain | {'x': x, 'y': y, 'fill': 'toself', 'fillcolor': 'rgba(127, 127, 127, 0.2)', 'line': {'width': 0, 'color': _GREY}},
        plain | {'x': _rounded(curve.budget), 'y': _rounded(scale * curve.quality), 'line': {'width': 2, 'color': _GREY}},
    ]
    for number, (name, points) in enumerate(_families(found)):
        texts = [
            html.escape(f'{point.method}, {len(point.seeds)} seeds')
            + (f'<br>factor {html.escape(str(point.factors[found.by]))}<br>{point.factors[found.by].verdict}' if point.factors else '')
            for point in points
        ]
        color = _GREY if points[0].plain else color_of(numbers.get(name, number))
        line = {'color': color, 'width': 1.5, 'dash': 'solid' if points[0].plain else 'dot'}
        bars = {
            'array': _rounded([scale * (point.high - point.quality) for point in points]),
            'arrayminus': _rounded([scale * (point.quality - point.low) for point in points]),
        }
        traces.append(
            scatter(
                f'frontier{number}',
                html.escape(name),
                mode='markers' if points[0].plain else 'lines+markers',
                line=line,
                marker={'size': 9, 'color': line['color'], 'symbol': _SYMBOLS[number % len(_SYMBOLS)]},
                x=_rounded([point.budgets[found.by] for point in points]),
                y=_rounded([scale * point.quality for point in points]),
                error_y={'type': 'data', 'symmetric': False, 'thickness': 1.2, 'width': 4, 'color': line['color']} | bars,
                text=texts,
                hovertemplate='%{text}<br>%{x}: %{y}<extra></extra>',
            )
        )
    return {
        'title': f'Quality by budget ({UNITS[found.by]})',
        'x': f'training budget, {UNITS[found.by]}',
        'y': _quality(found),
        'xaxis': {'type': 'log', 'tickvals': (ticks := _ticks(found)), 'ticktext': [f'{tick:,.6g}' for tick in ticks]},
        'yaxis': {'rangemode': 'normal'},
        'traces': traces,
        'legend': True,
    }


def _ticks(found: Frontier) -> list[float]:
    """Returns round tick values that cover the budgets of all points."""
    budgets = [point.budgets[found.by] for point in found.points]
    ticks = [share * 10.0**power for power in range(-4, 16) for share in TICKS]
    return [tick for tick in ticks if min(budgets) / 1.2 < tick < max(budgets) * 1.2]


def _families(found: Frontier) -> list[tuple[str, list[Point]]]:
    """Groups the points: the plain runs, then each method with its lengths, each group sorted by budget."""
    families: dict[str, list[Point]] = {'plain training': [point for point in found.points if point.plain]}
    for point in found.points:
        if not point.plain:
            families.setdefault(family(point.method), []).append(point)
    return [(name, sorted(points, key=lambda point: point.budgets[found.by])) for name, points in families.items()]


def _scale(found: Frontier) -> int:
    return 1 if found.is_loss else 100


def _quality(found: Frontier) -> str:
    return 'held-out loss, nats (lower is better)' if found.is_loss else 'accuracy %'


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f'{value:.6g}') for value in values]
