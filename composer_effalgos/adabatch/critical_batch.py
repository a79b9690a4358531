"""Measures the critical batch size with short runs at several sizes from one checkpoint (Merrill et al., arXiv 2505.23971)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from matplotlib.figure import Figure

from composer_effalgos.adabatch.adabatch import AdaBatch
from composer_effalgos.plan import EpochPlanner
from composer_effalgos.plan.progress import parse_time
from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.components import Component
from composer_effalgos.recipes.schema import Recipe
from composer_effalgos.utils.checks import LARGEST, check_number
from composer_effalgos.utils.errors import InputError, TooFewSamplesError
from composer_effalgos.utils.figures import save_figure
from composer_effalgos.utils.files import read_text, whole_file, write_texts

NAME = 'critical_batch'
_WINDOWS = (TimeUnit.EPOCH, TimeUnit.SAMPLE, TimeUnit.TOKEN)


@dataclass(frozen=True)
class Branch:
    """A short run at one batch size.

    Attributes:
        size: Global batch size.
        loss: Mean training loss over the second half of the window.
        steps: Updates in the window.
        seconds: Wall-clock seconds of training in the window.
    """

    size: int
    loss: float
    steps: int
    seconds: float


class Window(Callback):
    """Averages the training loss over the second half of a window that starts with ``fit``, and stops the run at its end.

    Args:
        length: Length of the window.
    """

    def __init__(self, length: Time) -> None:
        self.length = length
        self.steps, self.loss, self.seconds, self._weight = 0, 0.0, 0.0, 0.0
        self.complete = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Records the start of the window."""
        self._start = self._before = self._now(state)
        self._clock = state.timestamp.total_wct  # a checkpoint brings the time of the run that saved it

    def batch_end(self, state: State, logger: Logger) -> None:
        """Adds the loss of a batch, weighted by the part of it that lies in the second half."""
        now = self._now(state)
        half, end = self._start + self.length.value / 2, self._start + self.length.value
        weight = max(0.0, min(now, end) - max(self._before, half))
        self.steps += 1
        if weight:
            self._weight += weight
            self.loss += (float(state.total_loss_dict['loss/train/total']) - self.loss) * weight / self._weight
        self._before = now
        self.complete = now >= end - 1e-9
        if self.complete:
            state.stop_training()

    def _now(self, state: State) -> float:
        """The progress in the unit of the window, with the part of an epoch that is trained."""
        now = float(state.timestamp.get(self.length.unit).value)
        if self.length.unit == TimeUnit.EPOCH:
            loader = EpochPlanner.of(state).loader
            samples = loader.full_samples if loader.plan is None else loader.plan.num_samples
            now += int(state.timestamp.sample_in_epoch) / samples
        return now

    def fit_end(self, state: State, logger: Logger) -> None:
        """Records the training time since the start of the window."""
        self.seconds = (state.timestamp.total_wct - self._clock).total_seconds()


def critical_size(branches: Sequence[Branch], tolerance: float) -> int:
    """The largest batch size without a loss in quality.

    Args:
        branches: In ascending order of their sizes, each with the same number of samples.
        tolerance: Allowed difference of a branch's loss to that of the first.

    Returns:
        The largest size for which its loss, and the loss of all smaller sizes, is within the tolerance.
    """
    largest = branches[0].size
    for branch in branches[1:]:
        if not branch.loss <= branches[0].loss + tolerance:
            break
        largest = branch.size
    return largest


def measure(
    recipe: Recipe,
    out: Path,
    *,
    checkpoint: Path | None = None,
    window: str | int | Time = '1ep',
    sizes: Sequence[int] = (),
    tolerance: float = 0.01,
    lr: str = 'auto',
    progress: Callable[[str], None] = print,
) -> int:
    """Trains the branches that are missing in ``out``, and writes the table, the numbers and a plot.

    Every branch continues from the same weights, optimizer state and samples, with the recipe's schedules, its own batch size, and the
    learning rate that ``lr`` determines for it.

    Args:
        recipe: The run; its learning rate must be the one for its batch size.
        out: Folder for the branches and the results.
        checkpoint: Where to branch off, saved at the end of an epoch or by a run with AdaBatch; ``None`` for the start of the run.
        window: Length of a branch: epochs, samples or tokens.
        sizes: Global batch sizes; by default the recipe's and 2, 4, 8 and 16 times that, as far as there are enough samples.
        tolerance: Allowed difference of a branch's training loss to that of the smallest size.
        lr: As for :class:`~composer_effalgos.adabatch.AdaBatch`.
        progress: Called with a line of text for each finished branch.

    Returns:
        The global critical batch size; the largest measured size if none exceeds the tolerance.

    Raises:
        InputError: For an argument outside its range, a recipe or checkpoint that cannot be run, or an ``out`` with other branches.
    """
    length = parse_time('--window', window, _WINDOWS)
    check_number('--tolerance', tolerance, least=0, most=LARGEST)
    ordered = sorted(set(sizes)) or [recipe.dataset.batch_size * 2**power for power in range(5)]
    if ordered[0] < 1 or len(ordered) < 2:
        raise InputError(f'--size: expected at least two batch sizes from 1, got {ordered}')
    key = _fingerprint(recipe, checkpoint, length, lr)
    branches: list[Branch] = []
    for size in ordered:
        try:
            branch = _branch(recipe, out, key, size, checkpoint, length, lr)
        except TooFewSamplesError:
            if sizes or len(branches) < 2:
                raise
            break  # the default sizes end where the dataset does
        progress(f'batch size {size}: loss {branch.loss:.4f} in {branch.steps} steps')
        branches.append(branch)
    critical = critical_size(branches, tolerance)
    _write(out, branches, critical, tolerance, length)
    return critical


def _fingerprint(recipe: Recipe, checkpoint: Path | None, length: Time, lr: str) -> str:
    """A fingerprint of everything that determines a branch, except the size."""
    found = None
    if checkpoint is not None:
        try:
            found = [str(checkpoint.resolve()), checkpoint.stat().st_size, checkpoint.stat().st_mtime_ns]
        except OSError as error:
            raise InputError(f'--checkpoint: {checkpoint}: expected a checkpoint, got none ({error.strerror})') from error
    content = json.dumps([recipe.settings, found, length.to_timestring(), lr], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _branch(recipe: Recipe, out: Path, key: str, size: int, checkpoint: Path | None, length: Time, lr: str) -> Branch:
    """Reads a branch from ``out`` if it is finished; otherwise trains it."""
    folder = out / f'size{size}'
    done = folder / 'branch.json'
    if done.exists():
        try:
            content = json.loads(read_text(done))
            if content.pop('of') != key:
                raise InputError(f'{out}: holds branches of another recipe, checkpoint, window or lr; give another --out')
            return Branch(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f'{done}: expected a finished branch, got something else; remove it, or give another --out') from error
    others = [component for component in recipe.algorithms if component.target is not AdaBatch]
    adabatch = Component(f'{recipe.source}: --size', AdaBatch, {'schedule': f'0:{size}', 'lr': lr, 'global_sizes': True})
    arguments = {name: value for name, value in recipe.trainer.items() if name not in ('autoresume', 'save_interval', 'load_path')}
    arguments |= {'eval_interval': 0} | ({} if checkpoint is None else {'load_path': str(checkpoint)})
    trainer = build_trainer(replace(recipe, run_name=folder.name, save_folder=str(out), algorithms=[*others, adabatch], trainer=arguments))
    watch = Window(length)
    trainer.state.callbacks.append(watch)
    try:
        trainer.fit()
    finally:
        trainer.close()
    if not watch.complete:
        raise InputError(f'--window: expected one that fits into the rest of the run, got {length.to_timestring()}')
    branch = Branch(size, watch.loss, watch.steps, round(watch.seconds, 3))
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(done) as unfinished:
        unfinished.write_text(json.dumps({'of': key, **asdict(branch)}), encoding='utf-8')
    return branch


def table(branches: Sequence[Branch], critical: int) -> str:
    """The branches as a Markdown table."""
    lines = ['| batch size | loss | against the smallest | steps | seconds |', '|---|---|---|---|---|']
    for branch in branches:
        size = f'**{branch.size}**' if branch.size == critical else str(branch.size)
        lines.append(f'| {size} | {branch.loss:.4f} | {branch.loss - branches[0].loss:+.4f} | {branch.steps} | {branch.seconds:.1f} |')
    return '\n'.join(lines)


def _write(out: Path, branches: Sequence[Branch], critical: int, tolerance: float, length: Time) -> None:
    numbers: dict[str, Any] = {
        'critical_batch_size': critical,
        'largest_measured': branches[-1].size == critical,
        'tolerance': tolerance,
        'window': length.to_timestring(),
        'branches': [asdict(branch) for branch in branches],
    }
    texts = {'json': json.dumps(numbers, indent=2) + '\n', 'md': table(branches, critical) + '\n'}
    write_texts({out / f'{NAME}.{ending}': text for ending, text in texts.items()}, 'the result')
    save_figure(draw(branches, critical, tolerance), out / f'{NAME}.svg')


def draw(branches: Sequence[Branch], critical: int, tolerance: float) -> Figure:
    """Plots the loss of every branch over its batch size, with the tolerance as a band.

    Args:
        branches: The branches, in ascending order of their sizes.
        critical: The critical batch size, marked by a line.
        tolerance: Height of the band above the first loss.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(6.4, 4.0), layout='constrained')
    axes = figure.subplots()
    axes.set_xscale('log', base=2)
    sizes = [branch.size for branch in branches]
    axes.axhspan(branches[0].loss, branches[0].loss + tolerance, color='#1f4e9c', alpha=0.12, label='tolerance')
    axes.plot(sizes, [branch.loss if math.isfinite(branch.loss) else math.nan for branch in branches], 'o-', color='#1f4e9c')
    axes.axvline(critical, color='#c2411c', linestyle='--', label=f'critical batch size {critical}')
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xlabel('batch size (all ranks)')
    axes.set_ylabel('training loss after equally many samples')
    axes.legend()
    return figure
