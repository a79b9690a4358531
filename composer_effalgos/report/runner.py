"""Trains the runs of a sweep in subprocesses; a later call continues an interrupted one."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from composer_effalgos.monitor import SUMMARY, quality_text
from composer_effalgos.recipes.checkpoints import checkpoint_folder
from composer_effalgos.recipes.settings import first_difference
from composer_effalgos.report.runs import read_summary
from composer_effalgos.report.sweep import Job
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_text
from composer_effalgos.utils.text import one_line

LOG, RECIPE, FINISHED, LOCK = 'train.log', 'recipe.yaml', 'finished', '.lock'
TARGET = 'target'  # file in a folder of effalgos search: the accuracy at which its runs are stopped
GRACE = 30.0  # seconds to wait for a run to end after SIGTERM, and for a run left by a killed call
EXIT_TIME_LIMIT = 3  # exit status if runs are left for the next call


@dataclass(frozen=True)
class Outcome:
    """The result of one call.

    Attributes:
        failures: One line per failed run, with its name and the reason.
        pending: Names of the runs left for the next call.
    """

    failures: list[str]
    pending: list[str]

    @property
    def status(self) -> int:
        """Exit status: 1 if a run failed, else 3 if some are left, else 0."""
        return 1 if self.failures else EXIT_TIME_LIMIT if self.pending else 0


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    max_parallel: int = 1,
    fresh: bool = False,
    ranks: int = 1,
    minutes: float | None = None,
    keep_checkpoints: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Trains runs, each in its own process; their recipes' ``save_folder`` is ``out``.

    Finished runs in ``out`` are skipped; ``fresh`` deletes the results of earlier calls first. An interrupted run resumes from its last
    checkpoint if its recipe has ``save_interval``, otherwise it starts over. A failed run is reported and does not stop the others. A run's
    output goes to ``train.log`` in its folder. On the CPU a run uses one thread, or the number in ``OMP_NUM_THREADS``. Finished runs lose
    their checkpoints unless ``keep_checkpoints``.

    ``max_parallel`` runs share the machine: compare their ``cpu_seconds``, not their ``seconds``. A run has ``ranks`` processes, one per
    GPU. After ``minutes``, at least 0, the rest is left for the next call. An ``InputError`` says that ``out`` is not writable, used by
    another call or by ``effalgos search``, or holds a run of the same name with other settings.
    """
    deadline = deadline_in(minutes)
    console = console or Console()
    with locked(out) as lock:
        if is_search(out):
            raise InputError(f'{out}: holds runs of effalgos search, which stops them early; give another --out')
        for job in jobs:
            prepare(job, fresh=fresh)
        todo = [job for job in jobs if not finished(job)]
        if len(todo) < len(jobs):
            console.print(f'{len(jobs) - len(todo)} of {len(jobs)} runs are done already', highlight=False)
        failures: list[str] = []
        pending = [job.recipe.run_name for job in todo]
        meter = _Meter(todo, console)
        with meter.progress:
            ended = train_jobs(todo, lock, max_parallel=max_parallel, ranks=ranks, deadline=deadline, should_stop=meter.update)
            for number, (job, failure) in enumerate(ended, start=1 + len(jobs) - len(todo)):
                name = job.recipe.run_name
                pending.remove(name)
                if failure:
                    failures.append(f'{name}: {failure}')
                    console.print(f'{name}: failed', highlight=False, markup=False)
                else:
                    if not keep_checkpoints:
                        shutil.rmtree(checkpoint_folder(job.recipe), ignore_errors=True)
                    console.print(f'[{number}/{len(jobs)}] {_result(job)}', highlight=False, markup=False, soft_wrap=True)
                meter.end(job)
    return Outcome(failures, pending)


class _Meter:
    """Progress bar that counts epochs, as runs differ in length. The time per epoch is estimated from the last hour."""

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        text, clock = TextColumn('{task.description}', markup=False), (TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn())
        self.progress = Progress(text, BarColumn(), TaskProgressColumn(), *clock, console=console, speed_estimate_period=3600.0)
        self._task = self.progress.add_task('', total=sum(job.epochs or 1 for job in jobs), visible=bool(jobs))
        self._done = 0
        self._running: dict[str, int] = {}  # epochs so far, by the run's name

    def update(self, job: Job, epochs: Sequence[Any]) -> bool:
        """Shows the progress of a run; returns False, as runs of a sweep never end early."""
        self._running[job.recipe.run_name] = min(len(epochs), job.epochs or 0)
        self._show()
        return False

    def end(self, job: Job) -> None:
        self._running.pop(job.recipe.run_name, None)
        self._done += job.epochs or 1
        self._show()

    def _show(self) -> None:
        completed = self._done + sum(self._running.values())
        self.progress.update(self._task, completed=completed, description=', '.join(self._running))


def deadline_in(minutes: float | None) -> float | None:
    """Returns the monotonic clock's time in this many minutes, at least 0 and finite (NaN would never be reached); None for None."""
    if minutes is None:
        return None
    check_number('--minutes', minutes, least=0)
    return time.monotonic() + 60 * minutes


def is_search(out: Path) -> bool:
    """Whether a folder holds the runs of ``effalgos search``, which are marked as finished where it stopped them."""
    return (out / TARGET).exists()


def finished(job: Job) -> bool:
    """Whether a run is finished, in this call or an earlier one."""
    return (job.recipe.run_folder / FINISHED).exists()


@contextmanager
def locked(out: Path) -> Iterator[int]:
    """Creates ``out`` and locks it for this process and its runs; waits for runs that a killed call left behind.

    Yields the file descriptor that holds the lock, for the runs to inherit.
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
        os.close(file)  # the lock is released when the last process closes the file


def prepare(job: Job, *, fresh: bool = False) -> None:
    """Checks that a run's folder is free or belongs to the same run, before anything is trained; ``fresh`` empties it first."""
    folder = job.recipe.run_folder
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise InputError(f'{folder}: expected a folder, got something else; remove it, or give another --out')
    if fresh:
        _clear(folder)
    path = folder / RECIPE
    if not path.exists() and not path.is_symlink():
        return
    try:
        before = yaml.safe_load(read_text(path))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f'{path}: expected the settings of an earlier run, got {one_line(error)}; remove it, or give --fresh') from error
    differs = first_difference(before, job.recipe.settings, lambda key: key == 'save_folder')
    if differs is not None:
        key, there, now = differs
        raise InputError(f'{path}: {key}: {there!r} there, {now!r} now; give another --out, or --fresh to train these runs anew')


def _clear(folder: Path) -> None:
    for path in folder.iterdir() if folder.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


class _Training:
    """Trains or resumes one run in its own process, which inherits the file descriptor of :func:`locked`."""

    def __init__(self, job: Job, lock: int, ranks: int) -> None:
        self.job = job
        self._folder = folder = job.recipe.run_folder
        if not (checkpoint_folder(job.recipe) / 'latest-rank0.pt').exists():
            _clear(folder)  # leftovers of a run that cannot resume must not be mistaken for results of this one
        folder.mkdir(exist_ok=True)
        (folder / RECIPE).write_text(yaml.safe_dump(job.recipe.settings, sort_keys=False), encoding='utf-8')
        # Small networks do not gain from several threads, and threads that wait for each other starve on a busy machine.
        environment = {'OMP_NUM_THREADS': '1', **os.environ}
        with (folder / LOG).open('a', encoding='utf-8') as stream:
            self._process = subprocess.Popen(
                _command(folder / RECIPE, ranks),
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[lock],
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == 'linux' else None,
            )

    def poll(self, should_stop: Callable[[Job, list[dict[str, Any]]], bool]) -> str | None:
        """Returns None while the run is going, then its error, or '' on success. A run that ``should_stop`` ended has no error."""
        status = self._process.poll()
        reached = status is None and should_stop(self.job, _epochs(self._folder))
        if status is None and not reached:
            return None
        self.stop()
        if (reached or status == 0) and (self._folder / SUMMARY).is_file():
            (self._folder / FINISHED).touch()
            return ''
        return f'{_last_line(self._folder / LOG, self._process.returncode)} (see {self._folder / LOG})'

    def terminate(self) -> None:
        """Sends SIGTERM to the run and its ranks."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)

    def stop(self) -> None:
        """Ends the run; kills it after :data:`GRACE` seconds."""
        self.terminate()
        try:
            self._process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def train_jobs(
    jobs: Iterable[Job],
    lock: int,
    *,
    max_parallel: int = 1,
    ranks: int = 1,
    deadline: float | None = None,
    should_stop: Callable[[Job, list[dict[str, Any]]], bool],
) -> Iterator[tuple[Job, str]]:
    """Trains runs in order, up to ``max_parallel`` concurrently; yields each ended run and its error, '' on success.

    ``lock`` is the file descriptor from :func:`locked`. At ``deadline``, a time of the monotonic clock, running runs are stopped and no
    more are started. ``should_stop`` is called repeatedly with a run and its epochs in ``summary.json``; the run is ended when it returns
    True.
    """
    waiting, running = iter(jobs), list[_Training]()
    try:
        while deadline is None or time.monotonic() < deadline:
            for job in itertools.islice(waiting, max_parallel - len(running)):
                try:
                    running.append(_Training(job, lock, ranks))
                except OSError as error:  # disk full, or folder not writable
                    yield job, f'{error.filename}: {error.strerror}'
            if not running:
                return
            time.sleep(0.1)
            for training in running[:]:
                failure = training.poll(should_stop)
                if failure is not None:
                    running.remove(training)
                    yield training.job, failure
    finally:
        for training in running:
            training.terminate()
        for training in running:
            training.stop()


def _command(recipe: Path, ranks: int) -> list[str]:
    launcher = [sys.executable] if ranks == 1 else [sys.executable, '-m', 'composer.cli', '-n', str(ranks)]
    return [*launcher, '-m', 'composer_effalgos.train', str(recipe)]


_LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Lets the kernel end the run when the process of its sweep is killed."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _epochs(folder: Path) -> list[dict[str, Any]]:
    """Returns the epochs that a run has written so far."""
    try:
        return read_summary(folder / SUMMARY)['epochs']
    except (OSError, InputError):
        return []


def _last_line(log: Path, returncode: int) -> str:
    lines = log.read_text(encoding='utf-8', errors='replace').split('\n')
    last = next((line.strip() for line in reversed(lines) if line.strip()), f'exit status {returncode}')
    return last.removeprefix('error: ')


def _result(job: Job) -> str:
    totals = read_summary(job.recipe.run_folder / SUMMARY)['totals']
    return (
        f'{job.recipe.run_name}: {quality_text(totals)}, {totals["saved_fraction"]:.1%} saved, {totals["train_seconds"]:.1f} s of training'
    )
