"""The frontier of a sweep: compares every method with plain runs of several lengths, by quality against budget."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from composer.core import Time, TimeUnit, ensure_time

from composer_effalgos.recipes.components import algorithms
from composer_effalgos.report.equal_budget import Cell, Curve, Factor, compare
from composer_effalgos.report.runner import FINISHED
from composer_effalgos.report.runs import Run, data_of
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_text
from composer_effalgos.utils.text import one_line, plain

TIMES = {'cpu_seconds': 'CPU seconds', 'seconds': 'seconds'}
UNITS = {**TIMES, 'samples': 'samples', 'steps': 'steps'}
COST = '.cost.json'  # suffix of the file next to an algorithm's input file that holds the cost of producing it, by unit
LENGTHS, SEEDS = 4, 3  # fewer are mentioned in the notes
MOST_LEFT = 0.1  # last over highest learning rate per sample; above this the schedule has not decayed

_ENDINGS = ('.npy', '.parquet', '.safetensors')  # of files that algorithms read

# Recipe settings that define a training run, except its length, with their defaults. Compilation changes only the time, and microbatches
# mostly so, but time is a budget: a curve of plain runs must not mix them.
_TRAINING = {
    **dict.fromkeys(('dataset', 'model', 'optimizer', 'loader', 'algorithms', 'precision', 'precision_config', 'scheduler')),
    'train_subset_num_batches': -1,
    'scale_schedule_ratio': 1.0,
    'step_schedulers_every_batch': None,
    'accumulate_train_batch_on_tokens': False,
    'device_train_microbatch_size': None,
    'compile_config': None,
    'parallelism_config': None,
}
# What a run starts from
_LOADING = {'load_path': None, 'load_weights_only': False, 'load_ignore_keys': None, 'load_exclude_algorithms': None}
_READERS: Mapping[str, Callable[[dict[str, Any]], float]] = {
    'cpu_seconds': lambda summary: summary['totals']['train_cpu_seconds'],
    'seconds': lambda summary: summary['totals']['train_seconds'],
    'samples': lambda summary: summary['totals']['samples_seen'],
    'steps': lambda summary: sum(epoch['batches'] for epoch in summary['epochs']),
}


@dataclass(frozen=True)
class Point:
    """A method at one length.

    Attributes:
        method: The method's name.
        plain: Whether it is a plain run.
        seeds: Seeds of its runs.
        quality: Mean accuracy in [0, 1], or held-out loss in nats, at the end of the runs.
        sd: Sample standard deviation of the quality over the seeds; None for a single run.
        low: Lower end of the 95 % interval of the mean.
        high: Upper end.
        budgets: Mean budget of the runs, by unit.
        factors: The equivalent-budget factor by unit; empty for plain runs.
    """

    method: str
    plain: bool
    seeds: list[int]
    quality: float
    sd: float | None
    low: float
    high: float
    budgets: dict[str, float]
    factors: dict[str, Factor]


@dataclass(frozen=True)
class Frontier:
    """Plain runs and methods at their budgets.

    Attributes:
        by: The budget unit of the verdicts, a key of :data:`UNITS`.
        units: The budget units of the table.
        is_loss: Whether quality is a held-out loss (lower is better) instead of an accuracy.
        points: The plain runs by length, then the methods.
        curve: The curve of the plain runs, with quality as in the points.
        notes: Caveats, one sentence each.
    """

    by: str
    units: list[str]
    is_loss: bool
    points: list[Point]
    curve: Curve
    notes: list[str]


def frontier(runs: Sequence[Run], source: str, by: str | None = None, *, timed: bool = True, left_out: Sequence[str] = ()) -> Frontier:
    """Compares the methods with the plain runs.

    Plain runs use no algorithm of this package and no SelectiveBackprop, and differ only in length. Of several such groups (e.g. with
    different batch sizes), the one with the most lengths is used; ties go to one with ``baseline`` in its names.

    Args:
        runs: Finished runs.
        source: Origin of the runs; prefix of error messages.
        by: The budget unit of the verdicts, a key of :data:`UNITS`; None for CPU seconds of runs on a CPU and seconds of other runs.
        timed: Whether the runs' times are comparable; False for several machines, or one machine under varying load.
        left_out: A line for each run that is not among ``runs``, although it is in the same place; each becomes a note.

    Returns:
        The frontier.

    Raises:
        InputError: There are fewer than two plain lengths or no method, the runs use several datasets or machines, or lack the unit.
    """
    check_unit(by)
    runs, is_loss, missing = _with_quality(runs, source)
    what = 'held-out loss' if is_loss else 'accuracy'
    lost = [run.summary['run_name'] for run in missing]
    notes = [f'Left out, without {what} (not evaluated at its end, or not a finite number): {", ".join(lost)}.'] if lost else []
    cells = _cells(runs, source)
    _check_machine(runs, source)
    chosen = plain_lengths([(group[0].method, group[0].summary['recipe']) for group in cells], source)
    baseline = sorted((cells[number] for number in chosen), key=lambda group: np.mean([_READERS['samples'](run.summary) for run in group]))
    methods = [group for number, group in enumerate(cells) if number not in chosen]
    by, units = _units(runs, by, timed=timed)
    ordered = [*baseline, *methods]
    sign = -1 if is_loss else 1
    found = {unit: [_cell(group, unit, is_loss=is_loss) for group in ordered] for unit in units}
    compared = {unit: compare(own[: len(baseline)], own[len(baseline) :]) for unit, own in found.items()}
    incomplete = {run.method for run in missing}
    points = []
    for number, group in enumerate(ordered):
        cell = found[by][number]
        factors = {unit: compared[unit].factors[number - len(baseline)] for unit in units if number >= len(baseline)}
        if cell.name in incomplete:
            factors = {unit: replace(factor, doubt=f'a seed has no {what}') for unit, factor in factors.items()}
        mean, *ends = (sign * value for value in compared[by].quality[number])
        points.append(
            Point(
                method=cell.name,
                plain=number < len(baseline),
                seeds=[run.summary['seed'] for run in group],
                quality=float(mean),
                sd=float(cell.quality.std(ddof=1)) if len(group) > 1 else None,
                low=float(min(ends) if is_loss else max(0.0, min(ends))),  # a normal distribution goes beyond what an accuracy can be
                high=float(max(ends) if is_loss else min(1.0, max(ends))),
                budgets={unit: float(own[number].budget.mean()) for unit, own in found.items()},
                factors=factors,
            )
        )
    curve = compared[by].curve
    if is_loss:
        curve = Curve(curve.budget, -curve.quality, -curve.high, -curve.low)
    else:
        curve = Curve(curve.budget, *(edge.clip(0, 1) for edge in (curve.quality, curve.low, curve.high)))
    left = [f'Left out: {line}.' for line in left_out]
    return Frontier(by, units, is_loss, points, curve, [*left, *notes, *_notes(ordered, baseline)])


def check_unit(by: str | None) -> None:
    """Rejects a budget unit that is not a key of :data:`UNITS`; None is allowed."""
    if by is not None and by not in UNITS:
        raise InputError(f'--by: expected one of {", ".join(UNITS)}, got {by!r}')


def _cells(runs: Sequence[Run], source: str) -> list[list[Run]]:
    """Groups runs that differ only in the seed; ignores settings for saving, logging and evaluation."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        recipe = run.summary['recipe']
        key = json.dumps([run.method, str(_duration(recipe)), _training(recipe)], sort_keys=True)
        group = groups.setdefault(key, [])
        if run.summary['seed'] in [other.summary['seed'] for other in group]:
            raise InputError(f'{source}: expected each run once, got two of {run.method} with seed {run.summary["seed"]}; remove one')
        group.append(run)
    return list(groups.values())


def is_finished(folder: Path, run: Run) -> bool:
    """Whether a run in a folder of runs is finished: a sweep has marked it so, or it has all the epochs of its recipe."""
    epochs = _epochs(run)
    return (folder / run.folder / FINISHED).exists() or (epochs is not None and len(run.summary['epochs']) >= epochs)


def finished_among(runs: Sequence[Run], folder: Path) -> tuple[list[Run], list[str]]:
    """Returns the finished runs of a folder, and a line for each of the others."""
    done = [run for run in runs if is_finished(folder, run)]
    return done, [f'{run.summary["run_name"]}, not finished' for run in runs if run not in done]


def is_unfinished(folder: Path, run: Run) -> bool:
    """Whether a run in a folder of runs is known to be unfinished: without a mark, and with fewer epochs than its recipe.

    A run whose length is not in epochs may be either, as may one that a callback may stop early.
    """
    stops = any('stopper' in plain(str(name)) for name in run.summary['recipe'].get('callbacks') or {})
    return _epochs(run) is not None and not stops and not is_finished(folder, run)


def _epochs(run: Run) -> int | None:
    """The length of a run by its recipe; None if it is not in epochs."""
    duration = _duration(run.summary['recipe'])
    return int(duration) if duration is not None and duration.unit == TimeUnit.EPOCH else None


def plain_lengths(methods: Sequence[tuple[str, Mapping[str, Any]]], source: str) -> list[int]:
    """Finds the plain runs of several lengths among methods, given as names and recipes; returns their positions.

    Raises an ``InputError`` if there is no plain run, only one length, or two of the same length; if every method is plain; or if the
    datasets differ.
    """
    _check_data(methods, source)
    families: dict[str, list[int]] = {}
    for number, (_, recipe) in enumerate(methods):
        if is_plain(recipe):
            families.setdefault(json.dumps(_without_length(recipe), sort_keys=True), []).append(number)
    hint = 'add plain runs of other lengths, such as baseline+15ep: {max_duration: 15ep}, four in all'
    if not families:
        raise InputError(f'{source}: expected a baseline, runs without an algorithm that saves training, got none; {hint}')

    def fitness(family: list[int]) -> tuple[int, bool]:
        return len({str(_duration(methods[number][1])) for number in family}), any('baseline' in methods[number][0] for number in family)

    family = max(families.values(), key=fitness)
    lengths: dict[str, str] = {}
    for number in family:
        name, recipe = methods[number]
        other = lengths.get(length := str(_duration(recipe)))
        if other is not None:
            raise InputError(f'{source}: expected one plain run per length, got {other} and {name}, which differ only in ignored settings')
        lengths[length] = name
    if len(lengths) < 2:
        raise InputError(f'{source}: expected a baseline of at least two lengths, got {", ".join(lengths.values())} alone; {hint}')
    if len(family) == len(methods):
        raise InputError(f'{source}: expected methods beside the baseline, got plain runs alone')
    return family


def is_plain(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe has no algorithm that changes the samples or batches that a run trains on."""
    named = recipe.get('algorithms') or {}
    known = {plain(name): item for name, item in algorithms().items()}
    known |= {plain(item.__name__): item for item in algorithms().values()}
    for name in named:
        item = known.get(plain(str(name)))
        if item is None or item.__module__.startswith('composer_effalgos.') or item.__name__ == 'SelectiveBackprop':
            return False
    return True


def _training(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that determine a run, except its seed, its length and the path of its data.

    The seed in the name of a file that the run reads is left out too: every seed may have a checkpoint or scores of its own.
    """
    named = _TRAINING if recipe.get('load_path') is None else _TRAINING | _LOADING
    kept = {key: default if recipe.get(key) is None else recipe[key] for key, default in named.items()}
    if isinstance(kept['dataset'], dict):
        kept['dataset'] = {key: value for key, value in kept['dataset'].items() if key != 'path'}
    seed = recipe.get('seed')
    return kept if seed is None else _without_seed_in_files(kept, seed)


def _without_seed_in_files(value: Any, seed: int, *, of_file: bool = False) -> Any:
    """Returns settings in which a run's seed is replaced in the paths of files; other texts, such as ``17ep``, stay."""
    if isinstance(value, dict):
        return {key: _without_seed_in_files(item, seed, of_file=key == 'load_path') for key, item in value.items()}
    if isinstance(value, list):
        return [_without_seed_in_files(item, seed) for item in value]
    if isinstance(value, str) and (of_file or Path(value).suffix in _ENDINGS):
        return re.sub(rf'(?<!\d){seed}(?!\d)', '${seed}', value)
    return value


def _without_length(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that plain runs of different lengths share: without times in the schedule, which depend on the length."""
    kept = _training(recipe)
    if isinstance(kept['scheduler'], dict):
        kept['scheduler'] = {key: value for key, value in kept['scheduler'].items() if not _is_time(value)}
    return kept


def _is_time(value: Any) -> bool:
    """Whether a value of a schedule is a time, such as ``'10ep'``, or a list of times."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_time, value))
    try:
        Time.from_timestring(value)
    except (TypeError, ValueError):
        return False
    return True


def _duration(recipe: Mapping[str, Any]) -> Any:
    duration = recipe.get('max_duration')
    return None if duration is None else ensure_time(duration, TimeUnit.EPOCH)


def _with_quality(runs: Sequence[Run], source: str) -> tuple[list[Run], bool, list[Run]]:
    """Returns the runs with an accuracy, or with a held-out loss if none has one; whether it is a loss; and the other runs."""
    for key, is_loss in (('eval_accuracy', False), ('eval_loss', True)):
        found = [run for run in runs if run.summary['totals'].get(key) is not None]
        if found:
            return found, is_loss, [run for run in runs if run not in found]
    raise InputError(f'{source}: expected finished runs with an accuracy or a held-out loss, got {len(runs)} without; see eval_interval')


def _check_data(methods: Sequence[tuple[str, Mapping[str, Any]]], source: str) -> None:
    """Raises unless all methods train on the same data; otherwise their quality is not comparable."""
    found: dict[str, str] = {}
    for name, recipe in methods:
        found.setdefault(', '.join(f'{key}={value}' for key, value in sorted(data_of(recipe).items())), name)
    _check_one('dataset', found, source)


def _check_machine(runs: Sequence[Run], source: str) -> None:
    """Raises unless all runs used one kind of machine; otherwise their budgets are not comparable."""
    found: dict[str, str] = {}
    for run in runs:
        found.setdefault(f'{run.summary["device"]} with {run.summary["world_size"]} rank(s)', run.summary['run_name'])
    _check_one('kind of machine', found, source)


def _check_one(what: str, found: Mapping[str, str], source: str) -> None:
    if len(found) > 1:
        names = '; '.join(f'{value or "none"} ({name})' for value, name in found.items())
        raise InputError(f'{source}: expected runs on one {what}, got {names}; give each a folder of its own')


def _units(runs: Sequence[Run], by: str | None, *, timed: bool) -> tuple[str, list[str]]:
    """Returns the budget unit of the verdicts and the units of the table."""
    if not timed:
        if by in TIMES:
            raise InputError(f'--by: expected samples or steps, as the times of the runs are not comparable, got {by}')
        return by or 'samples', ['samples', 'steps']
    time = by if by in TIMES else 'cpu_seconds' if runs[0].summary['device'] == 'cpu' else 'seconds'
    return by or time, [time, 'samples', 'steps']


def _cell(group: Sequence[Run], unit: str, *, is_loss: bool) -> Cell:
    budgets = np.array([spent(run, unit) for run in group], float)
    if not (budgets > 0).all():
        raise InputError(f'{group[0].summary["run_name"]}: expected {UNITS[unit]} above 0 in its summary, got {budgets.min():g}')
    totals = [run.summary['totals'] for run in group]
    quality = [-total['eval_loss'] if is_loss else total['eval_accuracy'] for total in totals]
    return Cell(group[0].method, budgets, np.array(quality, float))


def spent(run: Run, unit: str) -> float:
    """Returns the budget of a run, including the cost of files that its algorithms read (a model trained on held-out data, a subset)."""
    return _READERS[unit](run.summary) + sum(cost[unit] for cost in map(_cost, _files(run)) if cost is not None)


def _files(run: Run) -> list[Path]:
    """Returns the files that the algorithms' settings name, whether or not they exist: a value with the ending of a data file."""

    def strings(value: Any) -> list[str]:
        if isinstance(value, dict | list):
            return [text for item in (value.values() if isinstance(value, dict) else value) for text in strings(item)]
        return [value] if isinstance(value, str) else []

    found = (Path(text) for text in strings(run.summary['recipe'].get('algorithms')))
    return [path for path in dict.fromkeys(found) if path.suffix in _ENDINGS]


def _cost(path: Path) -> dict[str, float] | None:
    try:
        cost = json.loads(read_text(Path(f'{path}{COST}')))
        return {unit: float(cost[unit]) for unit in UNITS}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f'{path}{COST}: expected a number for each of {", ".join(UNITS)}, got {one_line(error)}') from error


def _notes(cells: Sequence[Sequence[Run]], baseline: Sequence[Sequence[Run]]) -> list[str]:
    notes = []
    if len(baseline) < LENGTHS:
        notes.append(f'Only {len(baseline)} plain lengths: the curve between them is uncertain; train {LENGTHS} or more.')
    others = {group[0].method: _differences(group[0], baseline[0][0]) for group in cells[len(baseline) :]}
    if named := [f'{method} ({", ".join(keys)})' for method, keys in others.items() if keys]:
        notes.append(f'Differs from the plain runs not only in the algorithms of this package: {", ".join(named)}.')
    few = [group[0].method for group in cells if len(group) < SEEDS]
    if few:
        notes.append(f'Fewer than {SEEDS} seeds: {", ".join(few)}.')
    files = dict.fromkeys(path for group in cells for run in group for path in _files(run))
    counted, unknown = ([str(path) for path in files if (_cost(path) is None) == missing] for missing in (False, True))
    if counted:
        notes.append(f'The cost of making {", ".join(counted)} is included in the budgets of the runs that read it.')
    if unknown:
        notes.append(
            f'The cost of making {", ".join(unknown)} is not included in the budgets: there is no {unknown[0]}{COST} '
            '(a relative path counts from the current folder).'
        )
    high = [group[0].method for group in cells if any(_last_share(run) > MOST_LEFT for run in group)]
    if high:
        notes.append(
            f'The last learning rate is above {MOST_LEFT:.0%} of the highest (for the same batch size) in {", ".join(high)}: '
            'a run whose schedule has not decayed is worse than it could be at its length.'
        )
    return notes


def _differences(run: Run, plain: Run) -> list[str]:
    """Returns the recipe keys, besides the length and the algorithms that save training, in which a method differs from the plain runs."""
    ours, theirs = (_without_length(item.summary['recipe']) for item in (run, plain))
    keys = []
    for key, value in ours.items():
        one, other = (item if isinstance(item, dict) else {'': item} for item in (value or {}, theirs[key] or {}))
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        if key == 'algorithms':
            names = [name for name in names if is_plain({'algorithms': {name: None}})]
        keys += [f'{key}.{name}'.rstrip('.') for name in names]
    return keys


def _last_share(run: Run) -> float:
    """Last over highest learning rate per sample; a growing batch counts as a decaying learning rate."""
    rates = [epoch['lr'] / max(epoch['batch_size'], 1) for epoch in run.summary['epochs']]
    return float(rates[-1] / max(rates)) if len(rates) > 1 and max(rates) > 0 else 0.0
