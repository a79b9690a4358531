"""Table of runs compared with their baseline, one row per method."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from composer_effalgos.monitor import perplexity
from composer_effalgos.report.runs import Run, first_above
from composer_effalgos.utils import tables

PARITY = 0.002  # accuracies down to this far below the baseline's mean count as equal
_NONE = '–'


@dataclass(frozen=True)
class Reached:
    """When the runs of a method exceeded an accuracy.

    Attributes:
        target: The accuracy, in [0, 1].
        runs: Number of runs that exceeded it.
        of: Number of all runs.
        epoch: Mean of the first epoch (from 1) at whose end a run was above the target, over the runs that exceeded it; None if none did.
        seconds: Mean seconds of training to the end of that epoch; None likewise.
    """

    target: float
    runs: int
    of: int
    epoch: float | None
    seconds: float | None

    @property
    def share(self) -> str:
        """Number of runs that exceeded the target, as text; empty if all did."""
        return '' if self.runs == self.of else f' ({self.runs}/{self.of})'


@dataclass(frozen=True)
class Row:
    """Results of the runs of one method, which differ only in the seed.

    Attributes:
        method: The runs' common name.
        runs: The runs.
        accuracy: Mean final accuracy in [0, 1]; None if a run has none.
        accuracy_sd: Sample standard deviation of the final accuracies; None for a single run.
        accuracy_gain: ``accuracy`` minus the baseline's; None for the baseline itself or without one.
        samples_seen: Mean number of samples trained on.
        saved_fraction: Fraction of the samples of the full epochs that was not trained on, over all runs.
        train_seconds: Mean seconds of training, including selection, excluding evaluation.
        time_ratio: ``train_seconds`` over the baseline's; None as for ``accuracy_gain``, or if device or number of ranks differ.
        epoch_seconds: Mean training seconds per epoch.
        selection_seconds: Mean seconds of selection.
        reached: When the runs exceeded each target.
        parity: When the runs exceeded the baseline's mean accuracy minus :data:`PARITY`; None without a baseline.
        speed_up: The baseline's seconds to parity over the method's; None as for ``time_ratio``, or if not all runs reach parity.
        loss: Mean final held-out loss, in nats; None if a run has none.
        loss_sd: Sample standard deviation of the final losses; None for a single run.
        loss_gain: ``loss`` minus the baseline's; None as for ``accuracy_gain``.
        tokens_seen: Mean number of tokens trained on; None if a run does not count tokens.
        tokens_saved_fraction: Fraction of the tokens of the full epochs that was not trained on, over all runs.
        tokens_per_second: Tokens over seconds of training, over all runs.
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
    epoch_seconds: float
    selection_seconds: float
    reached: tuple[Reached, ...]
    parity: Reached | None
    speed_up: float | None
    loss: float | None = None
    loss_sd: float | None = None
    loss_gain: float | None = None
    tokens_seen: float | None = None
    tokens_saved_fraction: float | None = None
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        title: The column title.
        text: Returns the cell text of a row.
        value: Returns the sort key of a row; None if it has no value.
        brief: Whether to show it in a terminal.
        meaning: Explanation, if the title needs one.
    """

    title: str
    text: Callable[[Row], str]
    value: Callable[[Row], str | float | None]
    brief: bool = True
    meaning: str = ''


def columns(rows: Sequence[Row]) -> list[Column]:
    """Returns the columns for rows, the method's name first; optional columns only if they have values."""
    found = [
        Column('run', lambda row: row.method, lambda row: row.method),
        Column('seeds', lambda row: str(len(row.runs)), lambda row: len(row.runs)),
        *_quality(rows),
        _number('samples', lambda row: row.samples_seen, ',.0f', brief=False, meaning='mean number trained on'),
        _number('saved %', lambda row: row.saved_fraction, '.1f', 100, meaning='of the samples of the full epochs'),
        *_tokens(rows),
        _number('train s', lambda row: row.train_seconds, '.1f', meaning='mean, selection included and evaluation left out'),
        _number('time %', lambda row: row.time_ratio, '.0f', 100, meaning='of the baseline’s train s'),
    ]
    speeds = any(row.speed_up is not None for row in rows)
    if speeds:
        same = f'the baseline’s seconds to its mean accuracy less {100 * PARITY:g} points over the method’s, where all runs get there'
        found.append(_number('× faster', lambda row: row.speed_up, '.2f', meaning=same))
    found.append(_number('s/epoch', lambda row: row.epoch_seconds, '.2f', brief=False, meaning='train s over the epochs'))
    if any(row.selection_seconds for row in rows):
        found.append(_number('selection s', lambda row: row.selection_seconds, '.1f', brief=False, meaning='mean'))
    for number, reached in enumerate(rows[0].reached if rows else ()):
        found += _reached(f'{100 * reached.target:g} %', lambda row, number=number: row.reached[number])  # type: ignore[misc]
    if speeds:
        found.append(_reached('same %', lambda row: row.parity)[1])
    return found


def _quality(rows: Sequence[Row]) -> list[Column]:
    """Columns of accuracy, and of held-out loss and perplexity for text or without an accuracy."""
    spread = 'mean ± sample standard deviation over the seeds, at the end of the run'
    less = 'its mean less the baseline’s'
    by_loss = any(row.loss is not None and (row.accuracy is None or row.tokens_seen is not None) for row in rows)
    found = []
    if not by_loss or any(row.accuracy is not None for row in rows):
        found += [
            Column(
                'accuracy %', lambda row: _mean_and_sd(row.accuracy, row.accuracy_sd, '.2f', 100), lambda row: row.accuracy, True, spread
            ),
            _number('Δ', lambda row: row.accuracy_gain, '+.2f', 100, meaning=less),
        ]
    if by_loss:
        found += [
            Column(
                'held-out loss', lambda row: _mean_and_sd(row.loss, row.loss_sd, '.3f'), lambda row: row.loss, True, f'{spread}, in nats'
            ),
            _number('Δ loss', lambda row: row.loss_gain, '+.3f', meaning=less),
            _number('perplexity', _perplexity, '.2f', meaning='exp of the held-out loss'),
        ]
    return found


def _tokens(rows: Sequence[Row]) -> list[Column]:
    if all(row.tokens_seen is None for row in rows):
        return []
    return [
        _number('tokens', lambda row: row.tokens_seen, ',.0f', brief=False, meaning='mean number trained on'),
        _number('saved tokens %', lambda row: row.tokens_saved_fraction, '.1f', 100, brief=False, meaning='of those of the full epochs'),
        _number('tokens/s', lambda row: row.tokens_per_second, ',.0f', meaning='tokens over train s'),
    ]


def note(rows: Sequence[Row], *, brief: bool = False) -> str:
    """Explains the columns of a table in one paragraph; with ``brief`` only those shown in a terminal."""
    shown = [column for column in columns(rows) if column.brief or not brief]
    parts = [f'{column.title}: {column.meaning}' for column in shown if column.meaning]
    if not brief:
        if rows and rows[0].reached:
            parts.append(
                'epoch > x %: first epoch with an accuracy above x; s to x %: seconds of training to its end; means of the runs that do'
            )
        if any(column.title == 's to same %' for column in shown):
            parts.append(f's to same %: the same for the baseline’s mean accuracy less {100 * PARITY:g} points')
        if any(column.title.startswith('s to ') for column in shown):
            parts.append('in parentheses: how many runs reach it, if not all do')
    rule = 'A baseline is a run with “baseline” in its name, for those of the same dataset and options, model and max_duration.'
    return f'{"; ".join(parts)}. {rule}'


def _number(
    title: str, value: Callable[[Row], float | None], form: str, factor: float = 1, *, brief: bool = True, meaning: str = ''
) -> Column:
    def text(row: Row) -> str:
        number = value(row)
        return _NONE if number is None else f'{factor * number:{form}}'

    return Column(title, text, value, brief, meaning)


def _reached(accuracy: str, of: Callable[[Row], Reached | None]) -> list[Column]:
    def column(title: str, value: Callable[[Reached], float | None], form: str) -> Column:
        def of_row(row: Row) -> float | None:
            reached = of(row)
            return None if reached is None else value(reached)

        def text(row: Row) -> str:
            reached = of(row)
            number = None if reached is None else value(reached)
            return _NONE if reached is None or number is None else f'{number:{form}}{reached.share}'

        return Column(title, text, of_row, brief=False)

    return [
        column(f'epoch > {accuracy}', lambda reached: reached.epoch, '.3g'),
        column(f's to {accuracy}', lambda reached: reached.seconds, '.1f'),
    ]


def _mean_and_sd(mean: float | None, sd: float | None, form: str, factor: float = 1) -> str:
    text = _NONE if mean is None else f'{factor * mean:{form}}'
    return text if sd is None else f'{text} ± {factor * sd:{form}}'


def _perplexity(row: Row) -> float | None:
    return None if row.loss is None else perplexity(row.loss)


def table_rows(runs: Sequence[Run], targets: Sequence[float] = ()) -> list[Row]:
    """Compares runs with their baseline; one row per method, baselines first, otherwise in the order of the runs.

    Runs with the same name, settings, device and number of ranks that differ only in the seed share a row. The baseline of a row is the
    first method with the same dataset, its options except batching, model and duration whose name contains ``baseline``. ``targets`` are
    accuracies in [0, 1] for which to find the first epoch above.
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
    return [_row(group, baselines.get(group[0].task), targets) for group in members]


def rich_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """Returns the rows as a table for a terminal, with the brief columns only."""
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    shown = [column for column in columns(rows) if column.brief]
    for number, column in enumerate(shown):
        table.add_column(column.title, justify='right' if number else 'left', overflow='fold')
    for row in rows:
        table.add_row(*(Text(column.text(row)) for column in shown))
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """Returns the rows as a Markdown table, with a newline at the end."""
    shown = columns(rows)
    return tables.markdown_table([column.title for column in shown], ([column.text(row) for column in shown] for row in rows))


def _when_reached(group: Sequence[Run], target: float) -> Reached:
    found = [when for when in (first_above(run, target) for run in group) if when is not None]
    epochs, seconds = zip(*found, strict=True) if found else ((), ())
    return Reached(target, len(found), len(group), fmean(epochs) if found else None, fmean(seconds) if found else None)


def _row(group: list[Run], baseline: list[Run] | None, targets: Sequence[float]) -> Row:
    accuracy, accuracy_sd = _mean_of(group, 'eval_accuracy')
    loss, loss_sd = _mean_of(group, 'eval_loss')
    seconds = _mean_seconds(group)
    time_ratio = parity = speed_up = None
    reference = None if baseline is None else _mean_of(baseline, 'eval_accuracy')[0]
    if reference is not None:
        parity = _when_reached(group, reference - PARITY)
    other = None if baseline is group else baseline
    if other is not None and all(group[0].summary[key] == other[0].summary[key] for key in ('device', 'world_size')):
        theirs = None if parity is None else _when_reached(other, parity.target)
        if _mean_seconds(other) > 0:
            time_ratio = seconds / _mean_seconds(other)
            if parity and theirs and parity.runs == parity.of and parity.seconds and theirs.seconds:
                speed_up = theirs.seconds / parity.seconds
    full = sum(run.summary['totals']['samples_full'] for run in group)
    saved = sum(run.summary['totals']['samples_saved'] for run in group)
    return Row(
        method=group[0].method,
        runs=tuple(group),
        accuracy=accuracy,
        accuracy_sd=accuracy_sd,
        accuracy_gain=_less(accuracy, other, 'eval_accuracy'),
        samples_seen=fmean(run.summary['totals']['samples_seen'] for run in group),
        saved_fraction=saved / full if full else 0.0,
        train_seconds=seconds,
        time_ratio=time_ratio,
        epoch_seconds=fmean(run.summary['totals']['train_seconds'] / len(run.summary['epochs']) for run in group),
        selection_seconds=fmean(run.summary['totals']['selection_seconds'] for run in group),
        reached=tuple(_when_reached(group, target) for target in targets),
        parity=parity,
        speed_up=speed_up,
        loss=loss,
        loss_sd=loss_sd,
        loss_gain=_less(loss, other, 'eval_loss'),
        **_token_fields(group),
    )


def _mean_of(group: Sequence[Run], key: str) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation of a total; both None if a run lacks it, as older versions do."""
    values = [run.summary['totals'].get(key) for run in group]
    if None in values:
        return None, None
    return fmean(values), stdev(values) if len(values) > 1 else None


def _less(value: float | None, baseline: Sequence[Run] | None, key: str) -> float | None:
    reference = None if baseline is None else _mean_of(baseline, key)[0]
    return None if value is None or reference is None else value - reference


def _token_fields(group: Sequence[Run]) -> dict[str, float | None]:
    seen, full = ([run.summary['totals'].get(key) for run in group] for key in ('tokens_seen', 'tokens_full'))
    if not all(seen) or not all(full):
        return {}
    seconds = sum(run.summary['totals']['train_seconds'] for run in group)
    return {
        'tokens_seen': fmean(seen),
        'tokens_saved_fraction': 1 - sum(seen) / sum(full),
        'tokens_per_second': sum(seen) / seconds if seconds else None,
    }


def _mean_seconds(group: list[Run]) -> float:
    return fmean(run.summary['totals']['train_seconds'] for run in group)


def _is_baseline(run: Run) -> bool:
    return 'baseline' in run.method.lower()
