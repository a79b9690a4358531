"""A frontier as a table for the terminal and in Markdown, and as files for other tools."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from composer_effalgos.monitor import perplexity
from composer_effalgos.report.frontier import UNITS, Frontier, Point
from composer_effalgos.report.frontier_figure import draw
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.figures import save_figure
from composer_effalgos.utils.files import write_texts
from composer_effalgos.utils.tables import csv_text, markdown_table

NAME = 'frontier'
_WIDE = 130  # columns of a terminal that all factors need
_LEFT = (0, 3)  # positions in the header of the columns of words: method and verdict


def header(found: Frontier) -> list[str]:
    """Returns the column titles of the table."""
    budgets = [UNITS[unit] for unit in found.units]
    quality = 'held-out loss (perplexity)' if found.is_loss else 'accuracy %'
    return ['method', 'seeds', quality, f'verdict by {UNITS[found.by]}', *(f'factor by {name}' for name in budgets), *budgets]


def cells_of(found: Frontier, point: Point) -> list[str]:
    """Returns the table cells of a point, in the order of :func:`header`."""
    scale, digits = (1, 3) if found.is_loss else (100, 2)
    quality = f'{scale * point.quality:.{digits}f}' + ('' if point.sd is None else f' ± {scale * point.sd:.{digits}f}')
    if found.is_loss:
        quality += f' ({perplexity(point.quality):.2f})'
    budgets = [f'{point.budgets[unit]:,.0f}' for unit in found.units]
    factors = [str(point.factors[unit]) if unit in point.factors else '–' for unit in found.units]
    verdict = point.factors[found.by].verdict if point.factors else 'baseline'
    return [point.method, str(len(point.seeds)), quality, verdict, *factors, *budgets]


LEGEND = (
    'Factor: the budget that plain training needs for the same quality, over what the method spent, with its 95 % interval. '
    'Above 1 the method pays; below 1 a shorter plain run is as good for less. “>” and “<”: beyond the longest or shortest plain run.'
)


def markdown(found: Frontier) -> str:
    """Returns the table as Markdown, followed by the legend and the notes."""
    table = markdown_table(header(found), (cells_of(found, point) for point in found.points), left=_LEFT)
    return f'{table}\n{LEGEND}\n' + ''.join(f'\n- {note}' for note in found.notes) + ('\n' if found.notes else '')


def as_rows(found: Frontier) -> list[dict[str, Any]]:
    """Returns one flat record per point, for CSV and JSON: a factor beyond the plain runs is null, and its text gives the bound."""
    quality = 'eval_loss' if found.is_loss else 'eval_accuracy'
    rows = []
    for point in found.points:
        row: dict[str, Any] = {'method': point.method, 'plain': point.plain, 'seeds': ' '.join(map(str, point.seeds))}
        row |= {quality: point.quality, 'sd': point.sd, 'low': point.low, 'high': point.high} | point.budgets
        for unit in found.units:
            factor = point.factors.get(unit)
            for name in ('value', 'low', 'high', 'least', 'most'):
                value = None if factor is None else getattr(factor, name)
                row[f'factor_{unit}_{name}'] = None if value is None or value == 0 or math.isinf(value) else value
            row[f'factor_{unit}'] = None if factor is None else str(factor)
        row['verdict'] = point.factors[found.by].verdict if point.factors else 'baseline'
        rows.append(row)
    return rows


def terminal(found: Frontier, width: int) -> Group:
    """Returns the table for a terminal of ``width`` columns: without the budgets and, if narrow, only with the factor of the verdict."""
    titles = header(found)
    names = titles[:4] + [f'factor by {UNITS[unit]}' for unit in found.units if unit == found.by or width >= _WIDE]
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for number, name in enumerate(names):
        justify: Literal['left', 'right'] = 'left' if number in _LEFT else 'right'
        table.add_column(name, justify=justify, no_wrap=number == 0)
    for point in found.points:
        cells = dict(zip(titles, cells_of(found, point), strict=True))
        table.add_row(*(Text(cells[name]) for name in names))
    return Group(table, Text(), Text(LEGEND, style='dim'), *(Text(f'- {note}') for note in found.notes))


def write_frontier(found: Frontier, out: Path, about: Mapping[str, Any], name: str = NAME) -> None:
    """Writes the table as ``frontier.csv``, ``.json`` and ``.md``, and the figure as ``.svg`` and ``.png``.

    ``about`` goes to the top of the JSON.
    """
    content = {**about, **as_json(found)}
    texts = {'csv': csv_text(as_rows(found)), 'json': json.dumps(content, indent=2, allow_nan=False) + '\n', 'md': markdown(found)}
    write_texts({out / f'{name}.{ending}': text for ending, text in texts.items()}, 'the frontier')
    try:
        write_figure(found, out, name)
    except OSError as error:
        raise InputError(f'{out}: the frontier cannot be written ({error.strerror})') from error


def as_json(found: Frontier) -> dict[str, Any]:
    """Returns the content of ``frontier.json``: points as in the CSV, the curve and the notes."""
    curve = {key: [float(f'{number:.6g}') for number in value] for key, value in vars(found.curve).items()}
    return {'by': found.by, 'notes': found.notes, 'points': as_rows(found), 'curve': curve}


def write_figure(found: Frontier, out: Path, name: str, endings: Sequence[str] = ('svg', 'png')) -> None:
    """Writes the figure as ``NAME.svg`` and ``NAME.png``."""
    figure = draw(found)
    for ending in endings:
        save_figure(figure, out / f'{name}.{ending}')
