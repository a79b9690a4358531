"""``effalgos bench`` and ``effalgos frontier``: train a sweep, print its table, and write results and report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from composer_effalgos.report.frontier import Frontier, check_unit, finished_among, frontier, plain_lengths
from composer_effalgos.report.frontier_table import terminal, write_frontier
from composer_effalgos.report.page import write_report
from composer_effalgos.report.results import write_results
from composer_effalgos.report.runner import Outcome, deadline_in, finished, is_search, run_jobs
from composer_effalgos.report.runs import Run, read_runs
from composer_effalgos.report.sweep import Job, Sweep, load_sweep
from composer_effalgos.report.table import note, rich_table, table_rows
from composer_effalgos.utils.errors import InputError

_CONTINUE = 'Run the same command again to continue.'


def run_sweep(
    path: str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    max_parallel: int = 1,
    minutes: float | None = None,
    ranks: int = 1,
    fresh: bool = False,
    keep_checkpoints: bool = False,
    equal_budget: bool = False,
    by: str | None = None,
    console: Console | None = None,
) -> Outcome:
    """Trains a sweep or its remaining runs, prints its table, and writes results and report; checks every recipe before the first run.

    ``out`` is ``runs/<name of the sweep>`` by default; ``seeds`` replace the sweep's, and ``only`` are the methods to train, if not empty.
    With ``equal_budget`` every method is compared with plain runs of the same budget, in the unit ``by`` (see
    :func:`composer_effalgos.report.frontier.frontier`), including runs of earlier calls. The other arguments are those of
    :func:`composer_effalgos.report.runner.run_jobs`.
    """
    console = console or Console()
    deadline_in(minutes)  # checks it
    sweep = load_sweep(path)
    out = Path('runs') / sweep.name if out is None else Path(out)
    jobs = sweep.jobs(out, overrides, seeds=seeds, only=only)  # checks every recipe before the first run
    if equal_budget:
        _check_frontier(sweep, sweep.jobs(out, overrides), by)
    _say_what_is_left([job for job in jobs if fresh or not finished(job)], out, console)
    try:
        outcome = run_jobs(
            jobs,
            out,
            max_parallel=max_parallel,
            fresh=fresh,
            ranks=ranks,
            minutes=minutes,
            keep_checkpoints=keep_checkpoints,
            console=console,
        )
    except KeyboardInterrupt:
        console.print(_CONTINUE, highlight=False)
        raise
    about = {'sweep': str(path), 'overrides': list(overrides), 'failed': outcome.failures, 'pending': outcome.pending}
    names = {job.recipe.run_name for job in jobs if finished(job)}
    if equal_budget:
        found = _frontier_so_far(sweep, out, by, console)
        if found is not None:
            _show_frontier(found, out, about, console)
    elif names:
        ours = [run for run in read_runs(out)[0] if run.summary['run_name'] in names]
        rows = table_rows(ours, sweep.targets)
        write_results(rows, out, targets=sweep.targets, about=about)
        report = write_report(out, targets=sweep.targets)
        console.print()
        console.print(rich_table(rows))  # same order as in the report
        console.print()
        console.print(note(rows, brief=True), style='dim')
        console.print(f'Report: {report}', soft_wrap=True, markup=False, highlight=False)
    if outcome.pending:
        _say_what_is_left([job for job in jobs if job.recipe.run_name in outcome.pending], out, console)
        console.print(_CONTINUE, highlight=False)
    return outcome


def show_frontier(folder: str | Path, by: str | None = None, *, console: Console | None = None) -> None:
    """Prints and writes the frontier of the finished runs in a folder, and writes the report; ``by`` is the unit of the budget."""
    folder, console = Path(folder), console or Console()
    runs, problems = read_runs(folder)
    if is_search(folder):
        raise InputError(f'{folder}: holds runs of effalgos search, which stops them early; train its best.yaml with effalgos bench')
    _show_frontier(_frontier_of(runs, problems, folder, by), folder, {}, console)


def _check_frontier(sweep: Sweep, jobs: Sequence[Job], by: str | None) -> None:
    """Rejects a sweep that cannot form a frontier, before the first run is trained."""
    check_unit(by)
    recipes = {job.method: job.recipe.settings for job in jobs}
    plain_lengths(list(recipes.items()), str(sweep.path))


def _frontier_so_far(sweep: Sweep, out: Path, by: str | None, console: Console) -> Frontier | None:
    """Returns the frontier of a sweep's finished runs; if there are too few, prints the reason and returns None."""
    try:
        methods = sweep.all_methods()
        runs, problems = read_runs(out)
        return _frontier_of([run for run in runs if run.method in methods], problems, out, by)
    except InputError as error:
        console.print(f'No frontier yet: {error}', highlight=False, markup=False, soft_wrap=True)
        return None


def _frontier_of(runs: Sequence[Run], problems: Sequence[str], folder: Path, by: str | None) -> Frontier:
    """Returns the frontier of the finished runs; its notes name the others, and the summaries that cannot be read."""
    done, unfinished = finished_among(runs, folder)
    return frontier(done, str(folder), by, left_out=[*problems, *unfinished])


def _show_frontier(found: Frontier, out: Path, about: dict[str, Any], console: Console) -> None:
    write_frontier(found, out, about)
    report = write_report(out, equal_budget=found)
    console.print()
    console.print(terminal(found, console.width))
    console.print()
    console.print(f'Picture: {out / "frontier.svg"}. Report: {report}', soft_wrap=True, markup=False, highlight=False)


def _say_what_is_left(jobs: Sequence[Job], out: Path, console: Console) -> None:
    """Prints the number of remaining runs and the estimated training time."""
    if not jobs or not out.is_dir():
        return
    try:
        done = read_runs(out)[0]
    except InputError:
        return
    text = f'{len(jobs)} run{"s" if len(jobs) > 1 else ""} left'
    if all(job.epochs for job in jobs):  # the length of others, in batches or tokens, is not known here
        seconds = sum((job.epochs or 0) * _epoch_seconds(job.method, done) for job in jobs)
        time = f'{seconds / 3600:.1f} hours' if seconds > 3600 else f'{seconds / 60:.1f} minutes'
        text += f', about {time} of training in sequence'
    console.print(text, highlight=False)


def _epoch_seconds(method: str, done: Sequence[Run]) -> float:
    """Mean training seconds per epoch of the method's runs, or of all runs if it has none."""
    own = [run for run in done if run.method == method] or done
    return fmean(run.summary['totals']['train_seconds'] / len(run.summary['epochs']) for run in own)
