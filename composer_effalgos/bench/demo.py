"""The demo: recipes on digits, trained one after the other and set against their baseline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from composer.core import TimeUnit, ensure_time
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from composer_effalgos.bench.report import write_report
from composer_effalgos.bench.table import NOTE, read_runs, rich_table, table_rows
from composer_effalgos.errors import InputError
from composer_effalgos.monitor import SUMMARY
from composer_effalgos.recipe import load_recipe, recipe_folder

# Recipe and seeds of each run: several where the difference between two methods is what the demo is about.
DEMO: dict[str, Sequence[int]] = {
    'digits_baseline': (17, 18, 19),
    'digits_infobatch': (17, 18, 19),
    'digits_adabatch': (17,),
    'digits_glister': (17,),
    'digits_all': (17,),
}
LOG = 'train.log'


def run_demo(
    out: str | Path = 'runs/demo',
    *,
    recipes: Mapping[str, Sequence[int]] = DEMO,
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> list[str]:
    """Trains recipes with several seeds, one run at a time, then prints a table and writes a report.

    Each run is a process of its own: one that fails is named, and the others go on. What a run prints is in ``train.log`` in its folder.
    On the CPU a run computes with one thread, or with as many as ``OMP_NUM_THREADS`` says.

    Args:
        out: Folder for the runs and ``report.html``; runs of the same names in it are replaced.
        recipes: Names of the recipes, without ``.yaml``, each with its seeds.
        folder: Folder with the recipes; ``digits`` in the project's own when None.
        overrides: ``key=value`` settings on top of each recipe.
        console: Where progress and table go; the standard output when None.

    Returns:
        A line for each run that failed; empty if all is well.

    Raises:
        InputError: A recipe is missing or wrong, or ``out`` cannot be written.
    """
    console = console or Console()
    out = Path(out)
    folder = recipe_folder() / 'digits' if folder is None else Path(folder)
    paths = {name: folder / f'{name}.yaml' for name in recipes}
    epochs = {name: _epochs(path, overrides) for name, path in paths.items()}  # every recipe is checked before the first run
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'{out}: the folder cannot be made ({error.strerror})') from error

    runs = [(name, seed) for name, seeds in recipes.items() for seed in seeds]
    failures = []
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TextColumn('epochs'), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        width = max(len(f'{name}_seed{seed}') for name, seed in runs)
        task = progress.add_task('', total=sum(epochs[name] for name, _ in runs))
        done = 0
        for name, seed in runs:
            run_name = f'{name}_seed{seed}'
            progress.update(task, description=run_name.ljust(width))

            def advance(epoch: int, done: int = done) -> None:
                progress.update(task, completed=done + epoch)

            failure = _train(paths[name], [*overrides, f'seed={seed}'], out, run_name, advance)
            if failure is not None:
                failures.append(failure)
            done += epochs[name]
            progress.update(task, completed=done)

    if len(failures) < len(runs):
        report = write_report(out)
        names = {f'{name}_seed{seed}' for name, seed in runs}
        ours = [run for run in read_runs(out)[0] if run.summary['run_name'] in names]
        console.print()
        console.print(rich_table(table_rows(ours)))  # in the order of the report
        console.print()
        console.print(NOTE, style='dim')
        console.print(f'Report: {report}', soft_wrap=True, markup=False, highlight=False)
    return failures


def _epochs(path: Path, overrides: Sequence[str]) -> int:
    duration = ensure_time(load_recipe(path, overrides).max_duration, TimeUnit.EPOCH)
    if duration.unit != TimeUnit.EPOCH:
        raise InputError(f'{path}: max_duration: the demo shows its progress in epochs, got {duration.to_timestring()}; give e.g. 10ep')
    return int(duration)


def _train(recipe: Path, overrides: Sequence[str], out: Path, run_name: str, advance: Callable[[int], None]) -> str | None:
    """Trains one run in a process of its own; the line that says what went wrong, or None."""
    folder = out / run_name
    summary, log = folder / SUMMARY, folder / LOG
    folder.mkdir(exist_ok=True)
    summary.unlink(missing_ok=True)  # what an earlier demo left must not pass for this run
    # YAML reads a JSON string as it stands, whatever is in the path.
    placed = [f'run_name={run_name}', f'save_folder={json.dumps(str(out))}', 'save_overwrite=true', 'progress_bar=false']
    # The demo's networks are too small to share one step between threads, and threads that wait for each other starve on a busy machine.
    environment = {'OMP_NUM_THREADS': '1', **os.environ}
    command = [sys.executable, '-m', 'composer_effalgos.train', str(recipe), *overrides, *placed]
    with log.open('w', encoding='utf-8') as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if summary.exists():
                    advance(len(json.loads(summary.read_text(encoding='utf-8'))['epochs']))
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
                process.wait()
    if process.returncode == 0 and summary.exists():
        return None
    lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
    last = next((line.strip() for line in reversed(lines) if line.strip()), f'exit status {process.returncode}')
    return f'{run_name}: {last.removeprefix("error: ")} (see {log})'
