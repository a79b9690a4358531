"""``effalgos bench``: a sweep trained, its table printed, its results and its report written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from composer_effalgos.report.page import write_report
from composer_effalgos.report.results import write_results
from composer_effalgos.report.runner import Outcome, finished, run_jobs
from composer_effalgos.report.runs import read_runs
from composer_effalgos.report.sweep import load_sweep
from composer_effalgos.report.table import note, rich_table, table_rows


def run_sweep(
    path: str | Path,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    seeds: Sequence[int] = (),
    only: Sequence[str] = (),
    at_once: int = 1,
    minutes: float | None = None,
    ranks: int = 1,
    fresh: bool = False,
    keep_checkpoints: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Trains a sweep, or what is left of it, prints its table, and writes its results and its report.

    Args:
        path: The sweep's YAML file.
        out: Folder of the runs and the report; ``runs/<name of the sweep>`` when None.
        overrides: ``key=value`` settings on top of every recipe.
        seeds: In place of the sweep's seeds, where there are any.
        only: The methods to train; all where empty.
        at_once: Runs side by side.
        minutes: Stop after so many; the same call goes on. None for no limit.
        ranks: Processes a run.
        fresh: Train everything anew.
        keep_checkpoints: Whether finished runs keep their checkpoints.
        console: Where progress and table go; the standard output when None.

    Returns:
        What failed and what is left.

    Raises:
        InputError: The sweep or a recipe in it is wrong, or ``out`` cannot be used.
    """
    console = console or Console()
    sweep = load_sweep(path)
    out = Path('runs') / sweep.name if out is None else Path(out)
    jobs = sweep.jobs(out, overrides, seeds=seeds, only=only)  # every recipe is checked before the first run
    outcome = run_jobs(
        jobs, out, at_once=at_once, fresh=fresh, ranks=ranks, minutes=minutes, keep_checkpoints=keep_checkpoints, console=console
    )
    names = {job.recipe.run_name for job in jobs if finished(job)}
    if names:
        ours = [run for run in read_runs(out)[0] if run.summary['run_name'] in names]
        rows = table_rows(ours, sweep.targets)
        about = {'sweep': str(path), 'overrides': list(overrides), 'failed': outcome.failures, 'pending': outcome.pending}
        write_results(rows, out, targets=sweep.targets, about=about)
        report = write_report(out, targets=sweep.targets)
        console.print()
        console.print(rich_table(rows))  # in the order of the report
        console.print()
        console.print(note(rows, brief=True), style='dim')
        console.print(f'Report: {report}', soft_wrap=True, markup=False, highlight=False)
    if outcome.pending:
        console.print(f'{len(outcome.pending)} runs are left; the same command goes on', highlight=False)
    return outcome
