"""A folder of runs as one HTML page that needs nothing else, and as a Markdown table."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from composer_effalgos.bench.table import COLUMNS, NOTE, Row, Run, markdown_table, read_runs, table_rows
from composer_effalgos.errors import InputError

log = logging.getLogger(__name__)

# Okabe and Ito's colours, told apart by most colour-blind readers, in tones that stand out on white and on near-black alike.
COLORS = ('#7f7f7f', '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#b8860b', '#56b4e9', '#8a5cd1')
_Values = Callable[[list[dict[str, Any]]], list[Any]]  # of a run's epochs
DASHES = ('solid', 'dash', 'dot', 'dashdot')


def write_report(runs_dir: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report on every run in a folder: an HTML page, and its table as Markdown beside it.

    The page is self-contained (plotly is inlined), follows the reader's light or dark setting and fits a phone. A ``summary.json`` that
    cannot be used is named in a warning and in the report, and left out.

    Args:
        runs_dir: The runs' ``save_folder``: one folder a run, each with its ``summary.json``.
        out: Path of the page, ending in ``.html``; ``report.html`` in ``runs_dir`` when None. The Markdown goes beside it, as ``.md``.

    Returns:
        The path of the page.

    Raises:
        InputError: There is no usable run in ``runs_dir``, or ``out`` cannot be written.
    """
    out = Path(runs_dir) / 'report.html' if out is None else Path(out)
    if out.suffix.lower() not in ('.html', '.htm'):
        raise InputError(f'{out}: the report is an HTML page; give a name that ends in .html')
    runs, problems = read_runs(runs_dir)
    for problem in problems:
        log.warning('%s', problem)
    rows = table_rows(runs)
    pages = {out: _html(rows, problems), out.with_suffix('.md'): _markdown(rows, problems)}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path, text in pages.items():
            part = path.with_name(f'{path.name}.tmp')
            part.write_text(text, encoding='utf-8')
            part.replace(path)
    except OSError as error:
        raise InputError(f'{out}: the report cannot be written ({error.strerror})') from error
    return out


def charts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The report's charts: one line a run, one colour a method.

    Args:
        rows: Rows as :func:`~composer_effalgos.bench.table.table_rows` gives them.

    Returns:
        For each chart its ``title``, the axes' ``x`` and ``y`` titles, what more plotly is to know of them (``xaxis``, ``yaxis``) and
        plotly ``traces``; charts without a value are left out.
    """
    drawn: list[tuple[str, str, str, _Values, _Values, str]] = [
        ('Accuracy by epoch', 'epoch', 'accuracy %', _epochs, _accuracy, 'linear'),
        ('Accuracy by samples seen', 'samples seen', 'accuracy %', _samples, _accuracy, 'linear'),
        ('Accuracy by training time', 'seconds of training', 'accuracy %', _seconds, _accuracy, 'linear'),
        ('Samples by epoch', 'epoch', 'samples in the epoch', _epochs, lambda epochs: _column(epochs, 'samples'), 'hv'),
        ('Batch size', 'epoch', 'samples in a step, all ranks', _epochs, lambda epochs: _column(epochs, 'batch_size'), 'hv'),
        ('Learning rate', 'epoch', 'learning rate at the epoch’s end', _epochs, lambda epochs: _column(epochs, 'lr'), 'linear'),
    ]
    result = []
    for title, x_title, y_title, x_of, y_of, shape in drawn:
        traces = [
            _trace(row, number, run) | {'x': x_of(run.summary['epochs']), 'y': y_of(run.summary['epochs'])}
            for number, row in enumerate(rows)
            for run in row.runs
        ]
        for trace in traces:
            trace['line']['shape'] = shape
            if y_of is not _accuracy:  # such lines often coincide: the later, thinner ones leave an edge of those below
                trace['line']['width'] = max(1.5, 6 - 1.25 * int(trace['legendgroup']))
        if any(value is not None for trace in traces for value in trace['y']):
            axes = {
                'xaxis': _counts(traces, 'x') if x_of is not _seconds else {'rangemode': 'tozero'},
                'yaxis': _counts(traces, 'y') if shape == 'hv' else {'rangemode': 'normal'},
            }
            result.append({'title': title, 'x': x_title, 'y': y_title, 'traces': traces} | axes)
    return result


def _counts(traces: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """An axis of whole numbers: from zero, and never with a tick between two of them."""
    return {'rangemode': 'tozero'} | ({'dtick': 1} if max(max(trace[key]) for trace in traces) < 10 else {})


def _trace(row: Row, number: int, run: Run) -> dict[str, Any]:
    """How the line of a run looks, and what it says of itself."""
    first = run is row.runs[0]
    name = html.escape(row.method)  # plotly reads text as HTML
    return {
        'type': 'scatter',
        'mode': 'lines+markers',
        'name': name,
        'showlegend': first,
        'legendgroup': str(number),
        'line': {'color': COLORS[number % len(COLORS)], 'dash': DASHES[(number + number // len(COLORS)) % len(DASHES)], 'width': 2},
        'marker': {'size': 4},
        'opacity': 1.0 if first else 0.45,
        'connectgaps': True,
        'hovertemplate': f'{name}, seed {run.summary["seed"]}<br>%{{x}}: %{{y}}<extra></extra>',
    }


def _column(epochs: list[dict[str, Any]], key: str) -> list[Any]:
    return [entry[key] for entry in epochs]


def _epochs(epochs: list[dict[str, Any]]) -> list[int]:
    return [entry['epoch'] + 1 for entry in epochs]


def _samples(epochs: list[dict[str, Any]]) -> list[int]:
    return list(accumulate(_column(epochs, 'samples')))


def _seconds(epochs: list[dict[str, Any]]) -> list[float]:
    return [round(seconds, 3) for seconds in accumulate(_column(epochs, 'seconds'))]


def _accuracy(epochs: list[dict[str, Any]]) -> list[float | None]:
    return [None if value is None else round(100 * value, 4) for value in (entry.get('eval_accuracy') for entry in epochs)]


def _stacks(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Each machine and software stack in words, with the methods that ran on it."""
    stacks: dict[str, list[str]] = {}
    for row in rows:
        for run in row.runs:
            summary = run.summary
            versions = ', '.join(f'{name} {version}' for name, version in summary['versions'].items())
            words = f'{summary["device"]}, {summary["world_size"]} rank(s); {versions}'
            methods = stacks.setdefault(words, [])
            if row.method not in methods:
                methods.append(row.method)
    return list(stacks.items())


def _html(rows: Sequence[Row], problems: Sequence[str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('composer_effalgos.bench', '.'), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template('report.html.j2').render(
        columns=COLUMNS,
        note=NOTE,
        rows=[list(zip(row.cells, row.values, strict=True)) for row in rows],
        charts=charts(rows),
        stacks=_stacks(rows),
        runs=[(run.summary['run_name'], json.dumps(run.summary['recipe'], indent=2)) for row in rows for run in row.runs],
        problems=problems,
        # Inside a script element nothing may look like its end.
        plotly=get_plotlyjs().replace('</script', '<\\/script'),
    )


def _markdown(rows: Sequence[Row], problems: Sequence[str]) -> str:
    stacks = ''.join(f'- {words}: {len(methods)} method(s)\n' for words, methods in _stacks(rows))
    left_out = ''.join(f'- {problem}\n' for problem in problems)
    return f'{markdown_table(rows)}\n{NOTE}\n\n{stacks}' + (f'\nLeft out:\n\n{left_out}' if problems else '')
