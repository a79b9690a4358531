"""``effalgos search``: finds the combination of settings that reaches an accuracy fastest."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from composer_effalgos.monitor import SUMMARY
from composer_effalgos.recipes.settings import read_settings
from composer_effalgos.report.runner import TARGET, Outcome, deadline_in, finished, locked, prepare, train_jobs
from composer_effalgos.report.runs import Run, first_above, read_summary
from composer_effalgos.report.sweep import Job, Method, Sweep, combine, load_sweep
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_text, write_texts
from composer_effalgos.utils.tables import markdown_table
from composer_effalgos.utils.text import one_line

BEST = 3  # combinations that go into best.yaml
_NEVER = 1e9  # cost of a run that did not reach the target: more than the seconds of any that did
_FACTOR = 'seconds of the quickest combination without algorithms, over those of this one; above 1 it pays.'
_REPEATS = 10  # after this many known suggestions in a row, enqueue a random remaining combination


@dataclass(frozen=True)
class Trial:
    """One combination, trained until it reached the target or could no longer be the best.

    Attributes:
        name: The combination's name: its choices that have settings.
        choices: The choice on each axis.
        epoch: The first epoch above the target, from 1; None if not reached.
        seconds: Training seconds to the end of that epoch; None if not reached.
        accuracy: The best accuracy, in [0, 1]; None if not measured.
        epochs: Number of epochs trained.
        stopped: Whether it was stopped because it had taken longer than the best trial.
        plain: Whether its recipe has no algorithms.
    """

    name: str
    choices: dict[str, str]
    epoch: int | None
    seconds: float | None
    accuracy: float | None
    epochs: int
    stopped: bool
    plain: bool

    @property
    def cost(self) -> float:
        """The objective to minimise: the seconds to the target; if not reached, a larger cost that decreases with the best accuracy."""
        return _NEVER * (2 - (self.accuracy or 0.0)) if self.seconds is None else self.seconds


def run_search(
    path: str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    target: float | None = None,
    trials: int = 30,
    seed: int = 17,
    minutes: float | None = None,
    fresh: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Searches for the combination of choices that exceeds an accuracy in the fewest seconds of training.

    Optuna's tree-structured Parzen estimator suggests combinations, starting with the first choice on every axis. A run ends as soon as it
    exceeds the target, or has taken as long as the best trial so far, so that it cannot win. Trained combinations are kept: calling again
    continues, and a larger ``trials`` extends the search; other settings than theirs are refused. Times are compared, so nothing else
    should run on the machine.

    Seconds to one accuracy rank combinations like the equivalent-budget factor at that accuracy: the seconds of the fastest plain
    combination of any length over those of the combination.

    ``search.json`` and ``search.md`` list the trials; ``best.yaml`` is a sweep of the first choices and the best combinations with three
    seeds, to confirm the result of a single seed with ``effalgos bench``.

    ``out`` is ``runs/<name of the sweep>`` by default, ``target``, in (0, 1], the last of the sweep's ``targets``; ``seed`` seeds the
    search and the runs. If time runs out, the outcome has the number of trials left.
    """
    optuna = _optuna()
    console, deadline = console or Console(), deadline_in(minutes)
    sweep = load_sweep(path)
    out = Path('runs') / sweep.name if out is None else Path(out)
    target = _target(sweep, target)
    first, rest = _space(sweep)
    for axis, choices in sweep.search.items():  # checks every choice before the first run
        for choice in choices:
            _job(sweep, first | {axis: choice}, out, overrides, seed)
    trials = min(trials, len(rest))
    random.Random(seed).shuffle(rest)
    study = _study(optuna, seed, trials)
    study.enqueue_trial(first)
    suggestions = _suggestions(study, sweep, rest)
    done: dict[str, Trial] = {}
    failures: dict[str, str] = {}
    over = False
    with locked(out) as lock:
        _keep_target(out, target, fresh=fresh)
        while len(done) + len(failures) < trials:
            asked, choices = next(suggestions)
            job = _job(sweep, choices, out, overrides, seed)
            if job.method not in done and job.method not in failures:
                prepare(job, fresh=fresh)  # before its result counts: an earlier run may have had other settings
                if not finished(job):
                    best = min((trial.seconds for trial in done.values() if trial.seconds is not None), default=float('inf'))
                    failure = _train(job, target, best, deadline, lock)
                    if failure is None:
                        over = True
                        break
                    if failure:
                        failures[job.method] = f'{job.recipe.run_name}: {failure}'
            if job.method in failures:
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
                continue
            if job.method not in done:
                done[job.method] = trial = _trial(job, choices, target)
                console.print(f'[{len(done)}/{trials}] {_line(trial)}', highlight=False, markup=False, soft_wrap=True)
            study.tell(asked, done[job.method].cost)
        if done:
            _write(sweep, list(done.values()), first, out, target, overrides, seed)
            console.print(f'\n{_table(list(done.values()), target)}', highlight=False, markup=False, soft_wrap=True)
            console.print(f'Confirm with: effalgos bench {out / "best.yaml"}', highlight=False, markup=False, soft_wrap=True)
    return Outcome(list(failures.values()), [f'{trials - len(done) - len(failures)} trials'] if over else [])


def _space(sweep: Sweep) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Returns the combination of the first choices, and all combinations."""
    if not sweep.search or not all(sweep.search.values()):
        raise InputError(f'{sweep.path}: search: missing; give axes with their choices, as under matrix:')
    combinations = [dict(zip(sweep.search, taken, strict=True)) for taken in itertools.product(*sweep.search.values())]
    if len({_combination(sweep, choices)[0] for choices in combinations}) < len(combinations):
        raise InputError(f'{sweep.path}: search: two combinations have the same name; give each axis one choice without settings at most')
    return combinations[0], combinations


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError("effalgos search needs Optuna; pip install 'composer-effalgos[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _study(optuna: Any, seed: int, trials: int) -> Any:
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(1, trials // 3))))


def _suggestions(study: Any, sweep: Sweep, rest: list[dict[str, str]]) -> Iterator[tuple[Any, dict[str, str]]]:
    """Yields the suggestions of the study, and a remaining combination if it keeps suggesting known ones; updates ``rest``."""
    repeats = 0
    while True:
        asked = study.ask()
        choices = {axis: asked.suggest_categorical(axis, list(names)) for axis, names in sweep.search.items()}
        if choices in rest:
            rest.remove(choices)
            repeats = 0
        else:
            repeats += 1
            if repeats % _REPEATS == 0:
                study.enqueue_trial(rest[0])
        yield asked, choices


def _target(sweep: Sweep, target: float | None) -> float:
    if target is None and not sweep.targets:
        raise InputError(f'{sweep.path}: targets: missing; give the accuracy to reach there, or with --target')
    found = sweep.targets[-1] if target is None else target
    if not 0 < found <= 1:
        raise InputError(f'target: expected an accuracy in (0, 1], got {found}')
    return found


def _keep_target(out: Path, target: float, *, fresh: bool) -> None:
    """Records the target; rejects a target other than the one at which earlier runs were stopped."""
    file = out / TARGET
    try:
        before = float(read_text(file)) if file.exists() and not fresh else target
    except (OSError, ValueError) as error:
        raise InputError(f'{file}: expected the accuracy at which its runs were stopped, got {one_line(error)}; give --fresh') from error
    if before != target and not fresh:
        raise InputError(f'{out}: its runs were stopped at an accuracy of {before}, not {target}; give another --out, or --fresh')
    file.write_text(str(target), encoding='utf-8')


def _job(sweep: Sweep, choices: Mapping[str, str], out: Path, overrides: Sequence[str], seed: int) -> Job:
    name, layers = _combination(sweep, choices)
    return sweep.job(name, sweep.method(name, layers), seed, out, overrides)


def _combination(sweep: Sweep, choices: Mapping[str, str]) -> tuple[str, list[Any]]:
    return combine({choice: sweep.search[axis][choice] for axis, choice in choices.items()})


def _train(job: Job, target: float, best: float, deadline: float | None, lock: int) -> str | None:
    def should_stop(_: Job, epochs: list[dict[str, Any]]) -> bool:
        reached = any(entry['eval_accuracy'] is not None and entry['eval_accuracy'] > target for entry in epochs)
        return reached or sum(entry['seconds'] for entry in epochs) >= best

    return next((failure for _, failure in train_jobs([job], lock, deadline=deadline, should_stop=should_stop)), None)


def _trial(job: Job, choices: dict[str, str], target: float) -> Trial:
    summary = read_summary(job.recipe.run_folder / SUMMARY)
    epoch, seconds = first_above(Run(job.recipe.run_folder, summary), target) or (None, None)
    accuracies = [entry['eval_accuracy'] for entry in summary['epochs'] if entry['eval_accuracy'] is not None]
    epochs = len(summary['epochs'])
    stopped = epoch is None and epochs < (job.epochs or epochs)
    return Trial(job.method, choices, epoch, seconds, max(accuracies, default=None), epochs, stopped, plain=not job.recipe.algorithms)


def _line(trial: Trial) -> str:
    if trial.seconds is not None:
        return f'{trial.name}: target reached after {trial.seconds:.1f} s, in epoch {trial.epoch}'
    accuracy = 'no accuracy measured' if trial.accuracy is None else f'accuracy {trial.accuracy:.4f}'
    return f'{trial.name}: {"stopped, slower than the best" if trial.stopped else "target not reached"}, {accuracy}'


def factor(trial: Trial, trials: Sequence[Trial]) -> float | None:
    """Seconds of the fastest plain trial to the target over those of this trial; above 1 the combination pays. None if unknown."""
    plain = min((other.seconds for other in trials if other.plain and other.seconds is not None), default=None)
    return None if plain is None or trial.seconds is None else plain / trial.seconds


def _table(trials: Sequence[Trial], target: float) -> str:
    header = ['combination', f's to {100 * target:g} %', 'factor', 'epoch', 'best accuracy %', 'epochs trained', '']
    rows = []
    for trial in sorted(trials, key=lambda trial: trial.cost):
        seconds, epoch = ('–', '–') if trial.seconds is None else (f'{trial.seconds:.1f}', trial.epoch)
        why = 'slower than the best, stopped' if trial.stopped else '' if trial.seconds is not None else 'not reached'
        accuracy = '–' if trial.accuracy is None else f'{100 * trial.accuracy:.2f}'
        times = factor(trial, trials)
        rows.append([trial.name, seconds, '–' if times is None else f'{times:.2f}', epoch, accuracy, trial.epochs, why])
    return f'{markdown_table(header, rows, left=(0, 6))}Factor: {_FACTOR}\n'


def _write(sweep: Sweep, trials: list[Trial], first: dict[str, str], out: Path, target: float, overrides: Sequence[str], seed: int) -> None:
    order = sorted(trials, key=lambda trial: trial.cost)
    chosen = [first, *(trial.choices for trial in order[:BEST])]
    jobs = [_job(sweep, choices, out, overrides, seed) for choices in chosen]
    methods = [sweep.method(*_combination(sweep, choices)) for choices in chosen]
    best = _sweep_of(jobs, methods, overrides) | {'seeds': [17, 18, 19], 'targets': [target]}
    content = {
        'sweep': str(sweep.path),
        'target': target,
        'overrides': list(overrides),
        'trials': [asdict(trial) | {'factor': factor(trial, trials)} for trial in order],
    }
    title = f'# The combinations that a search found soonest at {100 * target:g} %, with three seeds'
    texts = {
        'search.json': json.dumps(content, indent=2) + '\n',
        'search.md': _table(trials, target),
        'best.yaml': f'{title}\n{OmegaConf.to_yaml(best)}',  # quotes text that OmegaConf reads as a number
    }
    write_texts({out / name: text for name, text in texts.items()}, 'the search')


def _sweep_of(jobs: Sequence[Job], methods: Sequence[Method], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the content of a sweep whose methods train what these jobs do, as plain data.

    A sweep merges two layers into a recipe, its ``settings`` and a method's, but these methods have several. Merging their layers with
    each other first can lose a ``null`` that removed a section before a later layer set it. A section where this makes a difference is
    removed in ``settings`` and given as a whole, as is one with an interpolation, which would refer to the keys of the sweep.
    """
    layers: dict[str, dict[str, Any]] = {}
    whole = set[str]()
    for job, method in zip(jobs, methods, strict=True):
        merged: Any = OmegaConf.to_container(OmegaConf.merge(*method.layers, OmegaConf.from_dotlist(list(overrides))))
        trained = job.recipe.settings
        again = read_settings(method.recipe, [merged, {key: trained[key] for key in ('run_name', 'seed', 'save_folder')}])
        whole |= {key for key, value in merged.items() if again.get(key) != trained.get(key) or '${' in json.dumps(value)}
        layers[job.method] = {'recipe': str(method.recipe.resolve()), **merged}
    for job in jobs:
        layers[job.method] |= {key: job.recipe.settings[key] for key in sorted(whole & job.recipe.settings.keys())}
    sections = sorted(key for key in whole if any(isinstance(job.recipe.settings.get(key), dict) for job in jobs))
    return {'settings': dict.fromkeys(sections), 'methods': layers}
