"""Report of a folder of runs: a self-contained HTML page and a Markdown table."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from composer_effalgos.report.charts import charts, numbered, published_for
from composer_effalgos.report.frontier import Frontier, finished_among, frontier, is_unfinished
from composer_effalgos.report.frontier_figure import chart
from composer_effalgos.report.frontier_table import LEGEND, cells_of, header, markdown
from composer_effalgos.report.results import read_targets
from composer_effalgos.report.runner import is_search
from composer_effalgos.report.runs import Run, read_runs
from composer_effalgos.report.table import Row, columns, markdown_table, note, table_rows
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import write_texts

log = logging.getLogger(__name__)


def write_report(
    runs_dir: str | Path, out: str | Path | None = None, *, targets: Sequence[float] = (), equal_budget: Frontier | None = None
) -> Path:
    """Writes the report on all runs in a folder, or on one run: an HTML page, and its table in a Markdown file next to it.

    The page is self-contained (plotly is inlined), follows the reader's light or dark setting and fits a phone. Unusable ``summary.json``
    files are skipped, with a warning and a line in the report. Unfinished runs of a folder are left out, with a line; a run whose length is
    not in epochs is shown, as nothing says whether it is finished.

    ``out``, the path of the page, must end in ``.html`` or ``.htm`` and is ``report.html`` in the folder by default. ``targets`` are
    accuracies in (0, 1]; if empty, those of the folder's ``results.json``. Without ``equal_budget``, the frontier of the finished runs is
    shown if they include plain runs of several lengths and no search stopped them early.
    """
    out = Path(runs_dir) / 'report.html' if out is None else Path(out)
    if out.suffix.lower() not in ('.html', '.htm'):
        raise InputError(f'--out: expected a name that ends in .html, got {out}')
    if not all(0 < target <= 1 for target in targets):
        raise InputError(f'target: expected accuracies in (0, 1], got {", ".join(map(str, targets))}')
    runs, problems = read_runs(runs_dir)
    for problem in problems if equal_budget is None else ():  # whose notes name them
        log.warning('%s', problem)
    runs, unfinished = _finished(runs, Path(runs_dir))
    problems += unfinished
    rows = table_rows(runs, targets or read_targets(Path(runs_dir)))
    equal_budget = equal_budget or _frontier(runs, Path(runs_dir))
    pages = {out: _html(rows, problems, equal_budget), out.with_suffix('.md'): _markdown(rows, problems, equal_budget)}
    write_texts(pages, 'the report')
    return out


def _finished(runs: Sequence[Run], folder: Path) -> tuple[list[Run], list[str]]:
    """Returns the runs that are not known to be unfinished, and a line for each of the others; a run that was given alone stays."""
    if [run.folder for run in runs] == [Path()]:
        return list(runs), []
    left_out = [run for run in runs if is_unfinished(folder, run)]
    if len(left_out) == len(runs):
        raise InputError(f'{folder}: expected a finished run, got {len(runs)} unfinished; give the folder of one run to see how far it is')
    found = [(run.summary['run_name'], len(run.summary['epochs']), run.summary['recipe']['max_duration']) for run in left_out]
    lines = [f'{name}: not finished ({epochs} epochs of max_duration {duration})' for name, epochs, duration in found]
    return [run for run in runs if run not in left_out], lines


def _stacks(rows: Sequence[Row]) -> list[tuple[str, list[str]]]:
    """Describes each machine and software stack, with the methods that ran on it."""
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


def _frontier(runs: Sequence[Run], folder: Path) -> Frontier | None:
    if is_search(folder):
        return None
    try:
        return frontier(finished_among(runs, folder)[0], str(folder))
    except InputError:  # most folders hold runs of one length
        return None


def _html(rows: Sequence[Row], problems: Sequence[str], equal_budget: Frontier | None) -> str:
    shown = columns(rows)
    frontier_table = None
    if equal_budget is not None:
        frontier_table = [header(equal_budget), *(cells_of(equal_budget, point) for point in equal_budget.points)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('composer_effalgos.report', '.'), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template('report.html.j2').render(
        columns=[column.title for column in shown],
        note=note(rows),
        rows=[[(column.text(row), column.value(row)) for column in shown] for row in rows],
        charts=([] if equal_budget is None else [chart(equal_budget, numbered(row.method for row in rows))]) + charts(rows),
        frontier=frontier_table,
        frontier_notes=[] if equal_budget is None else equal_budget.notes,
        frontier_legend=LEGEND,
        published=published_for(rows),
        stacks=_stacks(rows),
        runs=[(run.summary['run_name'], json.dumps(run.summary['recipe'], indent=2)) for row in rows for run in row.runs],
        problems=problems,
        # The inlined script must not contain the closing tag of its element.
        plotly=get_plotlyjs().replace('</script', '<\\/script'),
    )


def _markdown(rows: Sequence[Row], problems: Sequence[str], equal_budget: Frontier | None) -> str:
    stacks = ''.join(f'- {words}: {len(methods)} method(s)\n' for words, methods in _stacks(rows))
    left_out = ''.join(f'- {problem}\n' for problem in problems)
    beside = '' if equal_budget is None else f'\nEqual budgets:\n\n{markdown(equal_budget)}'
    return f'{markdown_table(rows)}\n{note(rows)}\n\n{stacks}{beside}' + (f'\nLeft out:\n\n{left_out}' if problems else '')
