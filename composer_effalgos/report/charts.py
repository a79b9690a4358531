"""Charts of the report, as plotly data."""

from __future__ import annotations

import functools
import html
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from composer_effalgos.report.runs import Run
from composer_effalgos.report.table import Row

# Okabe and Ito's colour-blind-safe palette, in shades that contrast with both light and dark backgrounds.
COLORS = ('#7f7f7f', '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#b8860b', '#56b4e9', '#8a5cd1')
DASHES = ('solid', 'dash', 'dot', 'dashdot')
SHOWN = 8  # number of methods that are visible initially
MOST_HISTOGRAMS = 4  # maximum number of score charts in a report
_LENGTH = re.compile(r'\+\d[^+]*$')  # of a method's name, such as +30ep; other parts are methods that are combined
_Values = Callable[[Run], list[Any]]


def charts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the charts for rows: by epoch, samples and seconds, of InfoBatch's scores, and next to published results.

    Each chart has a ``title``, the axis titles ``x`` and ``y``, further plotly axis options (``xaxis``, ``yaxis``), plotly ``traces``, and
    whether it has its own ``legend``; charts without values are omitted.
    """
    drawn: list[tuple[str, str, str, _Values, _Values, str]] = [
        ('Accuracy by training time', 'seconds of training', 'accuracy %', _seconds, _accuracy, 'linear'),
        ('Accuracy by samples seen', 'samples seen', 'accuracy %', _samples, _accuracy, 'linear'),
        ('Accuracy by epoch', 'epoch', 'accuracy %', _epochs, _accuracy, 'linear'),
        ('Held-out loss by training time', 'seconds of training', 'nats a token', _seconds, _loss_of_text, 'linear'),
        ('Held-out loss by tokens seen', 'tokens seen', 'nats a token', _tokens, _loss_of_text, 'linear'),
        ('Samples left out', 'epoch', '% of the full epoch', _epochs, _left_out, 'hv'),
        ('Batch size', 'epoch', 'samples in a step, all ranks', _epochs, lambda run: _column(run, 'batch_size'), 'hv'),
        ('Learning rate', 'epoch', 'learning rate at the epoch’s end', _epochs, lambda run: _column(run, 'lr'), 'linear'),
        ('Selection time', 'epoch', 'seconds in the epoch', _epochs, lambda run: _column(run, 'selection_seconds'), 'hv'),
    ]
    shown = _shown(rows)
    styles = _styles(rows)
    result = []
    for title, x_title, y_title, x_of, y_of, shape in drawn:
        traces = [
            _trace(row, number, run, styles[number], shown=row in shown) | {'x': x_of(run), 'y': y_of(run)}
            for number, row in enumerate(rows)
            for run in row.runs
        ]
        for trace in traces:
            trace['line']['shape'] = shape
            if y_of not in (_accuracy, _loss_of_text):  # lines often coincide: later ones are thinner, so that all stay visible
                trace['line']['width'] = max(1.5, 6 - 1.25 * int(trace['legendgroup']))
        values = [value for trace in traces for value in trace['y']]
        if all(value is None for value in values) or (title == 'Selection time' and not any(values)):
            continue
        axes: dict[str, Any] = {
            'xaxis': {'rangemode': 'tozero'} if x_of is _seconds else _counts(traces, 'x'),
            'yaxis': _counts(traces, 'y') if title == 'Batch size' else {'rangemode': 'tozero' if shape == 'hv' else 'normal'},
        }
        result.append({'title': title, 'x': x_title, 'y': y_title, 'traces': traces, 'legend': False} | axes)
    return [*result, *_histograms(rows), *_beside_published(rows, shown, styles)]


def family(method: str) -> str:
    """Returns a method's name without its length: ``infobatch`` for ``infobatch+30ep``."""
    return _LENGTH.sub('', method)


def numbered(methods: Iterable[str]) -> dict[str, int]:
    """Numbers the families of some methods from 0, in order; a family has one colour in all charts of a report."""
    return {name: number for number, name in enumerate(dict.fromkeys(map(family, methods)))}


def color_of(number: int) -> str:
    """Returns the colour of a family: grey for the first, the baseline, then the other colours in turn."""
    return COLORS[0] if number == 0 else COLORS[1 + (number - 1) % (len(COLORS) - 1)]


@functools.cache
def published() -> tuple[dict[str, Any], ...]:
    """Published accuracies and times of reproductions of the methods, one record per run.

    Each has ``source``, ``method``, ``dataset`` and ``model`` as named in recipes, ``epochs``, ``seconds`` of training, ``final_accuracy``
    in percent or None, and ``accuracy`` in percent by epoch (empty if unknown).
    """
    return tuple(json.loads(Path(__file__).with_name('published.json').read_text(encoding='utf-8')))


def published_for(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the published runs with the datasets and models of the rows."""
    ours = {_task(run) for row in rows for run in row.runs}
    return [record for record in published() if (record['dataset'], record['model']) in ours]


def _task(run: Run) -> tuple[Any, Any]:
    recipe = run.summary['recipe']
    dataset, model = (recipe.get(key) if isinstance(recipe.get(key), dict) else {} for key in ('dataset', 'model'))
    # a run on part of the data is a different task
    return (None if dataset.get('limit') else dataset.get('name'), model.get('name'))


def _shown(rows: Sequence[Row]) -> list[Row]:
    """Returns the initially visible rows: at most ``SHOWN``, baselines first, then by speed-up, then by accuracy."""
    if len(rows) <= SHOWN:
        return list(rows)
    order = sorted(rows, key=lambda row: ('baseline' not in row.method.lower(), -(row.speed_up or 0), -(row.accuracy or 0)))
    return order[:SHOWN]


def scatter(group: str, name: str = '', *, mode: str = 'lines', **more: Any) -> dict[str, Any]:
    """Returns a visible plotly line; traces of a ``group`` are hidden and shown together. Without a name it is not in the legend."""
    common = {'type': 'scatter', 'mode': mode, 'legendgroup': group, 'visible': True, 'showlegend': bool(name)}
    return common | ({'name': name} if name else {}) | more


def _styles(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Returns the line style of each row: its family's colour, and dashes that tell the lengths of a family, and equal colours, apart."""
    numbers = numbered(row.method for row in rows)
    places: dict[str, int] = {}
    styles = []
    for row in rows:
        number = numbers[family(row.method)]
        place = places[family(row.method)] = places.get(family(row.method), -1) + 1
        styles.append({'color': color_of(number), 'dash': DASHES[(number + place) % len(DASHES)]})
    return styles


def _trace(row: Row, number: int, run: Run, style: dict[str, str], *, shown: bool) -> dict[str, Any]:
    """Returns the style and hover text of a run's line."""
    first = run is row.runs[0]
    name = html.escape(row.method)  # plotly interprets text as HTML
    return scatter(
        str(number),
        name,
        mode='lines+markers',
        visible=shown,
        showlegend=first,
        line=style | {'width': 2},
        marker={'size': 4},
        opacity=1.0 if first else 0.45,
        connectgaps=True,
        hovertemplate=f'{name}, seed {run.summary["seed"]}<br>%{{x}}: %{{y}}<extra></extra>',
    )


def _histograms(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Histograms of InfoBatch's scores by epoch, of the first run of each method that has scores."""
    found: list[dict[str, Any]] = []
    for row in rows:
        kept = row.runs[0].summary.get('score_histograms')
        if kept is None or len(found) == MOST_HISTOGRAMS:
            continue
        edges, entries = kept['edges'], [entry for entry in kept['epochs'] if sum(entry['counts'])]
        traces: list[dict[str, Any]] = []
        for place, entry in enumerate(entries):
            total = sum(entry['counts'])
            traces.append(
                scatter(
                    f'epoch{entry["epoch"]}',
                    f'after epoch {entry["epoch"] + 1}',
                    line={'color': _blend(place / max(1, len(entries) - 1)), 'width': 2, 'shape': 'hv'},
                    x=[round(edge, 6) for edge in edges],
                    y=[round(100 * count / total, 3) for count in [*entry['counts'], entry['counts'][-1]]],
                    hovertemplate=f'epoch {entry["epoch"] + 1}<br>from %{{x}}: %{{y}} %<extra></extra>',
                )
            )
        if traces:
            filled = [place for trace in traces for place, value in enumerate(trace['y'][:-1]) if value]
            ends = [edges[min(filled)], edges[max(filled) + 1]]
            found.append(
                {
                    'title': f'Scores: {row.method}, seed {row.runs[0].summary["seed"]}',
                    'x': 'score (last loss)',
                    'y': '% of the samples',
                    'xaxis': {
                        'type': 'log',
                        'range': [round(math.log10(edge), 4) for edge in ends],
                        'tickvals': [10.0**power for power in range(-6, 3)],
                        'ticktext': [f'{10.0**power:g}' for power in range(-6, 3)],
                    },
                    'yaxis': {'rangemode': 'tozero'},
                    'traces': traces,
                    'legend': True,
                }
            )
    return found


def _beside_published(rows: Sequence[Row], shown: Sequence[Row], styles: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Our and published accuracies, each over the percentage of its own epochs, as lengths and hardware differ."""
    theirs = [record for record in published_for(rows) if record['accuracy']]
    tasks = {(record['dataset'], record['model']) for record in theirs}
    found = []
    for dataset, model in sorted(tasks):
        ours = [
            _trace(row, number, run, styles[number], shown=row in shown)
            | {'x': _progress(len(run.summary['epochs'])), 'y': _accuracy(run), 'showlegend': run is row.runs[0]}
            for number, row in enumerate(rows)
            for run in row.runs
            if _task(run) == (dataset, model)
        ]
        records = [record for record in theirs if (record['dataset'], record['model']) == (dataset, model)]
        lines = [
            scatter(
                f'published{number}',
                f'published: {record["method"]}',
                line={'color': COLORS[-1 - number % len(COLORS)], 'dash': 'dot', 'width': 1.5},
                x=_progress(len(record['accuracy'])),
                y=record['accuracy'],
                hovertemplate=f'published: {record["method"]}, {record["epochs"]} epochs<br>%{{x}} %: %{{y}}<extra></extra>',
            )
            for number, record in enumerate(records)
        ]
        found.append(
            {
                'title': f'Beside published runs: {model} on {dataset}',
                'x': '% of the run’s epochs',
                'y': 'accuracy %',
                'xaxis': {'rangemode': 'tozero'},
                'yaxis': {'rangemode': 'normal'},
                'traces': [*ours, *lines],
                'legend': True,
            }
        )
    return found


def _blend(share: float) -> str:
    """Interpolates from light blue to vermilion, readable on light and dark backgrounds."""
    start, end = (86, 180, 233), (213, 94, 0)
    return '#' + ''.join(f'{round(low + share * (high - low)):02x}' for low, high in zip(start, end, strict=True))


def _counts(traces: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Options of an integer axis: starts at zero, without fractional ticks."""
    return {'rangemode': 'tozero'} | ({'dtick': 1} if max(max(trace[key]) for trace in traces) < 10 else {})


def _progress(epochs: int) -> list[float]:
    return [round(100 * (epoch + 1) / epochs, 2) for epoch in range(epochs)]


def _column(run: Run, key: str) -> list[Any]:
    return [entry[key] for entry in run.summary['epochs']]


def _epochs(run: Run) -> list[int]:
    return [entry['epoch'] + 1 for entry in run.summary['epochs']]


def _samples(run: Run) -> list[int]:
    return list(accumulate(_column(run, 'samples')))


def _tokens(run: Run) -> list[int]:
    return list(accumulate(entry.get('tokens') or 0 for entry in run.summary['epochs']))


def _seconds(run: Run) -> list[float]:
    return [round(seconds, 3) for seconds in accumulate(_column(run, 'seconds'))]


def _left_out(run: Run) -> list[float]:
    """Percentage of samples left out per epoch; in older summaries, all full epochs are taken to have the same size."""
    entries = run.summary['epochs']
    even = run.summary['totals']['samples_full'] / len(entries)
    full = [even if entry.get('samples_full') is None else entry['samples_full'] for entry in entries]
    return [round(100 * (1 - entry['samples'] / of), 2) if of else 0.0 for entry, of in zip(entries, full, strict=True)]


def _accuracy(run: Run) -> list[float | None]:
    values = (entry.get('eval_accuracy') for entry in run.summary['epochs'])
    return [None if value is None else round(100 * value, 4) for value in values]


def _loss_of_text(run: Run) -> list[float | None]:
    """Held-out losses of a run on text; None for other runs, whose accuracy is shown instead."""
    entries = run.summary['epochs']
    if not any(entry.get('tokens') for entry in entries):
        return [None] * len(entries)
    return [entry.get('eval_loss') for entry in entries]
