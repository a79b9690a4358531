"""Trains the runs of a sweep one after the other, and goes on where an earlier call stopped."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from composer_effalgos.bench.sweep import Job
from composer_effalgos.build import checkpoint_folder
from composer_effalgos.errors import InputError
from composer_effalgos.monitor import SUMMARY

LOG, RECIPE, FINISHED, LOCK = 'train.log', 'recipe.yaml', 'finished', '.lock'
TARGET = 'target'  # in a folder of effalgos search: the accuracy at which its runs were stopped
GRACE = 30.0  # seconds for a run to end after SIGTERM, and for one that an earlier call left behind
PORTION_OVER = 3  # the exit status where runs are left for the next call


@dataclass(frozen=True)
class Outcome:
    """What came of a sweep in this call.

    Attributes:
        failures: A line for each run that failed: its name and why.
        pending: Names of the runs that are left for the next call.
    """

    failures: list[str]
    pending: list[str]

    @property
    def status(self) -> int:
        """The exit status: 1 where a run failed, 3 where some are left, else 0."""
        return 1 if self.failures else PORTION_OVER if self.pending else 0


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    fresh: bool = False,
    ranks: int = 1,
    minutes: float | None = None,
    keep_checkpoints: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Trains runs, one at a time, each in a process of its own.

    What is finished in ``out`` is kept. A run that was stopped goes on from its last checkpoint where its recipe has ``save_interval``,
    else it starts anew. One that fails is named, and the others go on. What a run prints is in ``train.log`` in its folder. On the CPU a
    run computes with one thread, or with as many as ``OMP_NUM_THREADS`` says.

    Args:
        jobs: The runs; their recipes' ``save_folder`` is ``out``.
        out: The folder of the runs.
        fresh: Train everything anew and remove what earlier calls left of these runs.
        ranks: Processes a run, one a GPU.
        minutes: Stop after so many; the rest is left for the next call. None for no limit.
        keep_checkpoints: Whether a finished run keeps its checkpoints; otherwise they are there for a run that is stopped alone.
        console: Where progress goes; the standard output when None.

    Returns:
        What failed and what is left.

    Raises:
        InputError: ``out`` cannot be written, another call is at work in it, or it holds a run of the same name with other settings.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    console = console or Console()
    failures: list[str] = []
    text, clock = TextColumn('{task.description}'), (TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn())
    with locked(out) as lock:
        if (out / TARGET).exists():
            raise InputError(f'{out}: holds runs of effalgos search, which stops them early; give another --out')
        for job in jobs:
            if fresh and job.recipe.run_folder.exists():
                shutil.rmtree(job.recipe.run_folder)
            check_settings(job)
        todo = [job for job in jobs if not (job.recipe.run_folder / FINISHED).exists()]
        if len(todo) < len(jobs):
            console.print(f'{len(jobs) - len(todo)} of {len(jobs)} runs are done already', highlight=False)
        # Runs differ in length: what is left of one counts by its epochs. The last hour says how long an epoch takes.
        with Progress(text, BarColumn(), TaskProgressColumn(), *clock, console=console, speed_estimate_period=3600.0) as progress:
            task = progress.add_task('', total=sum(job.epochs or 1 for job in todo), visible=bool(todo))
            done, pending = 0, [job.recipe.run_name for job in todo]
            for number, job in enumerate(todo, start=1 + len(jobs) - len(todo)):
                name = job.recipe.run_name
                progress.update(task, description=f'{name} ({number}/{len(jobs)})')
                if deadline is not None and time.monotonic() >= deadline:
                    break

                def advance(epochs: list[dict[str, Any]], done: int = done, most: int = job.epochs or 0) -> bool:
                    progress.update(task, completed=done + min(len(epochs), most))
                    return False

                failure = train_job(job, lock, ranks=ranks, deadline=deadline, enough=advance)
                if failure is None:
                    break  # the time is over
                pending.remove(name)
                if failure:
                    failures.append(f'{name}: {failure}')
                    console.print(f'{name}: failed', highlight=False)
                else:
                    if not keep_checkpoints:
                        shutil.rmtree(checkpoint_folder(job.recipe), ignore_errors=True)
                    console.print(f'[{number}/{len(jobs)}] {_result(job)}', highlight=False, markup=False, soft_wrap=True)
                done += job.epochs or 1
                progress.update(task, completed=done)
    return Outcome(failures, pending)


def finished(job: Job) -> bool:
    """Whether a run has come to its end, in this call or an earlier one."""
    return (job.recipe.run_folder / FINISHED).exists()


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Makes ``out`` and holds it for this process and its runs; what a killed call left running is waited for.

    Args:
        out: The folder of the runs.

    Yields:
        The descriptor that holds the lock, for the runs to inherit.

    Raises:
        InputError: ``out`` cannot be written, or another call is at work in it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'{out}: the folder cannot be made ({error.strerror})') from error
    try:
        file = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f'{out}: the folder is not writable ({error.strerror})') from error
    try:
        deadline = time.monotonic() + GRACE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise InputError(f'{out}: another sweep is at work in this folder; wait for it, or give another --out') from error
                time.sleep(0.2)
        yield file
    finally:
        os.close(file)  # the lock goes with the last process that holds the file


def check_settings(job: Job) -> None:
    """Refuses a folder that holds the same run with other settings: neither mixing nor replacing them is what was asked for.

    Args:
        job: The run.

    Raises:
        InputError: Its folder holds other settings; the message names one of them.
    """
    path = job.recipe.run_folder / RECIPE
    if not path.exists():
        return
    before = _flat(yaml.safe_load(path.read_text(encoding='utf-8')))
    now = _flat(job.recipe.settings)
    for key in [*now, *before]:
        if key != 'save_folder' and before.get(key) != now.get(key):
            raise InputError(
                f'{path}: {key}: {before.get(key)!r} there, {now.get(key)!r} now; give another --out, or --fresh to train these runs anew'
            )


def _flat(settings: Any, prefix: str = '') -> dict[str, Any]:
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    return {key: value for name, item in settings.items() for key, value in _flat(item, f'{prefix}.{name}' if prefix else name).items()}


def train_job(
    job: Job, lock: int, *, ranks: int = 1, deadline: float | None = None, enough: Callable[[list[dict[str, Any]]], bool]
) -> str | None:
    """Trains one run, or what is left of it.

    Args:
        job: The run.
        lock: What :func:`locked` gave.
        ranks: Its processes.
        deadline: When to stop it, on the monotonic clock.
        enough: Sees the epochs in ``summary.json`` again and again; where it is true, the run has come to its end.

    Returns:
        What went wrong; '' where all is well; None where the deadline came first.
    """
    folder = job.recipe.run_folder
    resumes = (checkpoint_folder(job.recipe) / 'latest-rank0.pt').exists()
    if folder.exists() and not resumes:
        shutil.rmtree(folder)  # what a run left that cannot go on must not pass for this one
    folder.mkdir(exist_ok=True)
    (folder / RECIPE).write_text(yaml.safe_dump(job.recipe.settings, sort_keys=False), encoding='utf-8')
    # Small networks do not share a step between threads with gain, and threads that wait for each other starve on a busy machine.
    environment = {'OMP_NUM_THREADS': '1', **os.environ}
    with (folder / LOG).open('a', encoding='utf-8') as stream:
        process = subprocess.Popen(
            _command(folder / RECIPE, ranks),
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            pass_fds=[lock],
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == 'linux' else None,
        )
        reached = False
        try:
            while process.poll() is None and not reached:
                if deadline is not None and time.monotonic() >= deadline:
                    return None
                time.sleep(0.1)
                reached = enough(_epochs(folder))
        finally:
            _stop(process)
    if (reached or process.returncode == 0) and (folder / SUMMARY).exists():
        (folder / FINISHED).touch()
        return ''
    return f'{_last_line(folder / LOG, process.returncode)} (see {folder / LOG})'


def _command(recipe: Path, ranks: int) -> list[str]:
    launcher = [sys.executable] if ranks == 1 else [sys.executable, '-m', 'composer.cli', '-n', str(ranks)]
    return [*launcher, '-m', 'composer_effalgos.train', str(recipe)]


_LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """A run does not outlive a sweep that was killed."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)  # the ranks too
    try:
        process.wait(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _epochs(folder: Path) -> list[dict[str, Any]]:
    try:
        return json.loads((folder / SUMMARY).read_text(encoding='utf-8'))['epochs']
    except (OSError, ValueError):
        return []


def _last_line(log: Path, returncode: int) -> str:
    lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
    last = next((line.strip() for line in reversed(lines) if line.strip()), f'exit status {returncode}')
    return last.removeprefix('error: ')


def _result(job: Job) -> str:
    totals = json.loads((job.recipe.run_folder / SUMMARY).read_text(encoding='utf-8'))['totals']
    accuracy = '' if totals['eval_accuracy'] is None else f'accuracy {totals["eval_accuracy"]:.4f}, '
    return f'{job.recipe.run_name}: {accuracy}{totals["saved_fraction"]:.1%} saved, {totals["train_seconds"]:.1f} s of training'
