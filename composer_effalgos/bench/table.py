"""Runs read from their ``summary.json`` and set against their baseline, one row a method."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from composer_effalgos.errors import InputError
from composer_effalgos.monitor import SUMMARY

COLUMNS = ('run', 'seeds', 'accuracy %', 'Δ', 'samples', 'saved %', 'train s', 'time %')
NOTE = (
    'accuracy: mean ± sample standard deviation over the seeds, at the end of the run; Δ: its mean less the baseline’s; samples: mean '
    'number trained on; train s: mean, selection included and evaluation left out; time %: of the baseline’s train s. A baseline is for '
    'runs of the same data set, limit, model and max_duration.'
)
_NONE = '–'
_NUMBERS = {
    'epochs': ('epoch', 'seconds', 'samples', 'batches', 'batch_size', 'lr', 'selection_seconds'),
    'totals': (
        'train_seconds',
        'samples_seen',
        'samples_full',
        'samples_saved',
        'saved_fraction',
        'selection_seconds',
        'peak_memory_bytes',
    ),
}


@dataclass(frozen=True)
class Run:
    """One ``summary.json``.

    Attributes:
        folder: The run's folder, relative to the folder that was searched.
        summary: The file's content, checked by :func:`read_runs`.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def method(self) -> str:
        """The run's name without its seed: ``digits_infobatch_seed17``, run with seed 17, is of ``digits_infobatch``."""
        name, seed = self.summary['run_name'], self.summary['seed']
        return re.sub(rf'[-_.](seed|s)?[-_=]?{seed}$', '', name, flags=re.IGNORECASE) or name

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe without what tells one run of a method from another."""
        return {key: value for key, value in self.summary['recipe'].items() if key not in ('run_name', 'seed', 'save_folder')}

    @property
    def task(self) -> str:
        """Data set and its limit, model and duration, as far as the recipe has them; runs of one task share a baseline."""
        recipe = self.summary['recipe']
        dataset, model = (section if isinstance(section, dict) else {} for section in (recipe.get('dataset'), recipe.get('model')))
        duration = recipe.get('max_duration')
        duration = f'{duration}ep' if isinstance(duration, int) else duration  # a plain number is of epochs
        return json.dumps([dataset.get('name'), dataset.get('limit'), model.get('name'), duration])


@dataclass(frozen=True)
class Row:
    """What the runs of one method, alike but for the seed, came to.

    Attributes:
        method: The runs' common name.
        runs: The runs themselves.
        accuracy: Mean of the final accuracies in [0, 1]; None where a run has none.
        accuracy_sd: Their sample standard deviation; None for a single run.
        accuracy_gain: ``accuracy`` less the baseline's; None for the baseline itself or where there is none.
        samples_seen: Mean number of samples trained on.
        saved_fraction: Share of the unpruned samples that was not trained on, over all the runs.
        train_seconds: Mean seconds of training, selection included, evaluation left out.
        time_ratio: ``train_seconds`` over the baseline's; None as for ``accuracy_gain``, or where the device or its number differ.
    """

    method: str
    runs: tuple[Run, ...]
    accuracy: float | None
    accuracy_sd: float | None
    accuracy_gain: float | None
    samples_seen: float
    saved_fraction: float
    train_seconds: float
    time_ratio: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, one cell for each of ``COLUMNS``."""
        accuracy = _NONE if self.accuracy is None else f'{100 * self.accuracy:.2f}'
        if self.accuracy_sd is not None:
            accuracy += f' ± {100 * self.accuracy_sd:.2f}'
        return (
            self.method,
            str(len(self.runs)),
            accuracy,
            _NONE if self.accuracy_gain is None else f'{100 * self.accuracy_gain:+.2f}',
            f'{self.samples_seen:,.0f}',
            f'{100 * self.saved_fraction:.1f}',
            f'{self.train_seconds:.1f}',
            _NONE if self.time_ratio is None else f'{100 * self.time_ratio:.0f}',
        )

    @property
    def values(self) -> tuple[str | float | None, ...]:
        """What the cells sort by."""
        return (
            self.method,
            len(self.runs),
            self.accuracy,
            self.accuracy_gain,
            self.samples_seen,
            self.saved_fraction,
            self.train_seconds,
            self.time_ratio,
        )


def read_runs(folder: str | Path) -> tuple[list[Run], list[str]]:
    """Reads the ``summary.json`` of every run in a folder.

    Args:
        folder: The runs' ``save_folder``, with one folder a run; what lies deeper is not read.

    Returns:
        The runs in the order of their paths, and a line for each summary that cannot be used: which file, and why.

    Raises:
        InputError: The folder is missing or holds no usable summary.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder; give one that holds runs, each with a {SUMMARY}')
    runs, problems = [], []
    for path in sorted(folder.glob(f'*/{SUMMARY}')):
        try:
            summary = json.loads(path.read_text(encoding='utf-8'))
            _check(summary)
        except (OSError, UnicodeDecodeError, ValueError) as error:
            reason = f'is not valid JSON: {error}' if isinstance(error, json.JSONDecodeError) else str(error)
            problems.append(f'{path}: left out, {reason}')
        else:
            runs.append(Run(path.parent.relative_to(folder), summary))
    if not runs:
        raise InputError(
            problems[0] if problems else f'{folder}: no {SUMMARY} in any folder in it; train a recipe with save_folder={folder} first'
        )
    return runs, problems


def table_rows(runs: Sequence[Run]) -> list[Row]:
    """Sets runs against their baseline.

    Runs of the same name, settings, device and number of ranks that differ in the seed alone share a row. The baseline of a row is the
    first method of the same data set, limit, model and duration whose name has ``baseline`` in it.

    Args:
        runs: Runs as :func:`read_runs` gives them.

    Returns:
        One row a method, each baseline before the others, then in the order of the runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.method, run.settings, run.summary['device'], run.summary['world_size']], sort_keys=True)
        groups.setdefault(key, []).append(run)
    members = sorted(groups.values(), key=lambda group: not _is_baseline(group[0]))
    baselines: dict[str, list[Run]] = {}
    for group in members:
        if _is_baseline(group[0]):
            baselines.setdefault(group[0].task, group)
    return [_row(group, baselines.get(group[0].task)) for group in members]


def rich_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """The rows for a terminal.

    Args:
        rows: Rows as :func:`table_rows` gives them.
        title: A line above the table.

    Returns:
        A table that rich prints.
    """
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify='right' if number else 'left', overflow='fold')
    for row in rows:
        table.add_row(*map(Text, row.cells))
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table.

    Args:
        rows: Rows as :func:`table_rows` gives them.

    Returns:
        Lines of Markdown, with a line break after the last.
    """
    lines = [COLUMNS, ['---'] + ['---:'] * (len(COLUMNS) - 1), *([_markdown(cell) for cell in row.cells] for row in rows)]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _row(group: list[Run], baseline: list[Run] | None) -> Row:
    accuracies = [run.summary['totals']['eval_accuracy'] for run in group]
    accuracy, seconds = _mean_accuracy(group), _mean_seconds(group)
    gain = time_ratio = None
    if baseline is not None and baseline is not group:
        reference = _mean_accuracy(baseline)
        if accuracy is not None and reference is not None:
            gain = accuracy - reference
        if all(group[0].summary[key] == baseline[0].summary[key] for key in ('device', 'world_size')) and _mean_seconds(baseline) > 0:
            time_ratio = seconds / _mean_seconds(baseline)
    full = sum(run.summary['totals']['samples_full'] for run in group)
    saved = sum(run.summary['totals']['samples_saved'] for run in group)
    return Row(
        method=group[0].method,
        runs=tuple(group),
        accuracy=accuracy,
        accuracy_sd=stdev(accuracies) if accuracy is not None and len(group) > 1 else None,
        accuracy_gain=gain,
        samples_seen=fmean(run.summary['totals']['samples_seen'] for run in group),
        saved_fraction=saved / full if full else 0.0,
        train_seconds=seconds,
        time_ratio=time_ratio,
    )


def _mean_accuracy(group: list[Run]) -> float | None:
    accuracies = [run.summary['totals']['eval_accuracy'] for run in group]
    return None if None in accuracies else fmean(accuracies)


def _mean_seconds(group: list[Run]) -> float:
    return fmean(run.summary['totals']['train_seconds'] for run in group)


def _is_baseline(run: Run) -> bool:
    return 'baseline' in run.method.lower()


def _markdown(text: str) -> str:
    """Text as a table cell shows it, whatever it holds."""
    text = re.sub(r'([\\`*\[\]|~])', r'\\\1', ' '.join(text.split()))
    return text.replace('&', '&amp;').replace('<', '&lt;')


def _check(summary: Any) -> None:
    """Raises ValueError, with the reason, unless the table and the report can use the summary."""
    if not isinstance(summary, dict):
        raise ValueError('it holds no JSON object')
    kinds = {
        'run_name': str,
        'recipe': dict,
        'seed': int,
        'world_size': int,
        'device': str,
        'versions': dict,
        'epochs': list,
        'totals': dict,
    }
    for key, kind in kinds.items():
        if not isinstance(summary.get(key), kind):
            raise ValueError(f'{key!r} is missing or not {kind.__name__}')
    if not summary['epochs']:
        raise ValueError('no epoch has finished')
    for part, entries in (('epochs', summary['epochs']), ('totals', [summary['totals']])):
        for entry in entries:
            if not isinstance(entry, dict) or any(not _is_number(entry.get(key)) for key in _NUMBERS[part]):
                raise ValueError(f'{part!r}: each of {", ".join(_NUMBERS[part])} must be a number')
            if entry.get('eval_accuracy') is not None and not _is_number(entry['eval_accuracy']):
                raise ValueError(f"{part!r}: 'eval_accuracy' must be a number or null")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
