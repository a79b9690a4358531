"""Cost and quality of a run: ``efficiency/*`` metrics and ``summary.json``."""

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Callback, Logger, State, Timestamp
from composer.utils import dist

from composer_effalgos.plan import EpochMetrics, EpochPlanner
from composer_effalgos.plan.sharded import pack, unpack
from composer_effalgos.utils.errors import CheckpointError, InputError
from composer_effalgos.utils.files import read_text, whole_file
from composer_effalgos.utils.machine import cpu_seconds, peak_memory_bytes, versions
from composer_effalgos.utils.restore import check_entries, restored

SUMMARY = 'summary.json'
SCORE_EDGES = np.logspace(-6, 2, 65)  # edges of the histogram bins, eight per decade; scores beyond go to the first and last bin


@dataclass
class _Epoch:
    """One epoch in ``summary.json``, and the cost of the unpruned epoch."""

    epoch: int
    seconds: float
    samples: int
    batches: int
    batch_size: int
    lr: float
    train_loss: float
    eval_accuracy: float | None
    selection_seconds: float
    samples_full: int
    cpu_seconds: float = 0.0
    eval_loss: float | None = None
    tokens: int | None = None


@dataclass
class _Running:
    """State of the current epoch that is not in the timestamps."""

    loss_sum: float = 0.0
    loss_samples: int = 0
    batch_size: int = 0
    eval_accuracy: float | None = None
    eval_loss: float | None = None
    metrics: EpochMetrics = field(default_factory=EpochMetrics)
    cpu_seconds: float = 0.0


@dataclass
class _Scores:
    """The distribution of sample scores at the end of an epoch."""

    epoch: int
    mean: float
    counts: list[int]


def quality_text(totals: dict[str, Any]) -> str:
    """The quality of a run in words.

    Args:
        totals: The totals of a summary.

    Returns:
        Its accuracy, otherwise its held-out loss, if one was measured.
    """
    if totals['eval_accuracy'] is not None:
        return f'accuracy {totals["eval_accuracy"]:.4f}'
    loss = totals.get('eval_loss')  # missing in summaries written before eval_loss was recorded
    return 'no evaluation' if loss is None else f'held-out loss {loss:.4f} (perplexity {perplexity(loss):.2f})'


def perplexity(loss: float) -> float:
    """The exponential of a held-out loss in nats; finite for any loss."""
    return math.exp(min(loss, 700))


class EfficiencyMonitor(Callback):
    """Logs the cost of each epoch and writes ``<save_folder>/<run_name>/summary.json``.

    After every epoch the monitor logs, through Composer's loggers, ``efficiency/samples_seen`` (global, since the start of the run),
    ``efficiency/samples_full`` (the same for these epochs without pruning), ``efficiency/saved_fraction``
    (``1 - samples_seen / samples_full``), ``efficiency/batch_size`` (the epoch's largest global batch), ``efficiency/lr`` (at the end of
    the epoch), ``efficiency/epoch_seconds`` (training only, without evaluation; measured on rank 0), ``efficiency/selection_seconds``,
    ``efficiency/peak_memory_bytes``, and if the batches have tokens ``efficiency/tokens_seen``, ``efficiency/tokens_saved_fraction`` and
    ``efficiency/tokens_per_second`` (of the epoch). The algorithms log their own decisions (``infobatch/*``, ``pruning/*``, ``adabatch/*``,
    ``subset_selection/*``).

    Each epoch in the summary also has ``samples_full``, its samples without pruning, and ``cpu_seconds``: CPU time of rank 0 and its child
    processes (data workers, compilers), without evaluation. On a machine with other load it varies less than ``seconds``.

    Global rank 0 replaces the summary as a whole after every epoch, after every evaluation and at the end of ``fit``; an epoch that
    ``max_duration`` cut short is included. All of it is part of the checkpoint: a resumed run continues the same list of epochs. Work lost
    since the last checkpoint is excluded.

    ``eval_accuracy`` is the last value measured in the epoch or at its end: ``MulticlassAccuracy``, or the evaluator's first metric whose
    name ends in ``Accuracy``; ``eval_loss`` is likewise the first whose name ends in ``CrossEntropy``, in nats. Missing values are null; if
    both are missing, a warning is issued once. Of several evaluators, the one labelled ``eval`` is used, otherwise the first that has one
    of these metrics.

    Tokens are those that Composer's timestamp counts, over all ranks: every position of ``input_ids``, including padding, or the result of
    ``DataSpec(get_num_tokens_in_batch=...)``, which may exclude padding. ``tokens_full`` is the number for full epochs: exact if all
    samples have the same number of tokens, otherwise estimated from the run's full epochs. Without tokens all of these are null.

    If samples are scored, the summary also has ``score_histograms``: ``edges`` (64 bins from 1e-6 to 100, evenly spaced on a logarithmic
    scale) and, for epochs 1, 2, 4, 8, ... and the last, ``epoch`` (counted from 0), ``mean`` and ``counts`` of the finite scores.

    Args:
        recipe: Settings to copy into the summary, as plain JSON types.
        save_folder: Folder with one subfolder per run.

    Raises:
        InputError: If ``recipe`` cannot be converted to JSON, or, at the start of the run, if the summary's folder is not writable.
    """

    _state: State  # from INIT on

    def __init__(self, recipe: dict[str, Any] | None = None, save_folder: str | os.PathLike[str] = 'runs') -> None:
        try:
            self.recipe = json.loads(json.dumps(recipe or {}))
        except TypeError as error:
            raise InputError(
                f'recipe: expected plain dicts, lists, strings, numbers, booleans and None, got something else ({error})'
            ) from error
        self.save_folder = Path(save_folder)
        self._epochs: dict[int, _Epoch] = {}
        self._running = _Running()
        self._evaluated: dict[str, tuple[float | None, float | None]] = {}  # accuracy and loss by evaluator
        self._no_quality_warned = False
        self._ends_run = False  # whether a standalone evaluation is that of the end of the run
        self._peak_memory = 0
        self._scores: dict[int, _Scores] = {}
        self._cpu_mark: float | None = None  # CPU time already included in _running; None outside training

    def state_dict(self) -> dict[str, Any]:
        self._count_cpu()
        saved = {
            'epochs': [asdict(entry) for entry in self._epochs.values()],
            'running': asdict(self._running),
            'peak_memory': self._peak_memory,
            'scores': [asdict(entry) for entry in self._scores.values()],
        }
        return pack(self._state, saved)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = check_entries(unpack(state), {'epochs': list, 'running': dict, 'peak_memory': int, 'scores': list})
        self._epochs = {entry.epoch: entry for entry in (restored(_Epoch, saved) for saved in state['epochs'])}
        running = dict(state['running'])
        metrics = restored(EpochMetrics, running.pop('metrics', {}))
        self._running = restored(_Running, running | {'metrics': metrics})
        self._peak_memory = state['peak_memory']
        self._scores = {entry.epoch: entry for entry in (restored(_Scores, saved) for saved in state['scores'])}

    def init(self, state: State, logger: Logger) -> None:
        self._state = state
        if dist.get_global_rank() == 0:
            folder = self._folder(state)
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f'save_folder: expected a folder that can be created, got {folder} ({error.strerror})') from error
            if not os.access(folder, os.W_OK):
                raise InputError(f'save_folder: expected a writable folder, got {folder}')

    def fit_start(self, state: State, logger: Logger) -> None:
        # After fit(reset_time=True) epochs count from 0 again: later records belong to another run.
        within = int(state.timestamp.batch_in_epoch) > 0
        self._epochs = {epoch: entry for epoch, entry in self._epochs.items() if epoch < int(state.timestamp.epoch) + within}
        self._scores = {epoch: entry for epoch, entry in self._scores.items() if epoch in self._epochs}
        if not within:
            self._running = _Running()
        self._cpu_mark = cpu_seconds()

    def eval_before_all(self, state: State, logger: Logger) -> None:
        self._count_cpu()
        self._cpu_mark = None

    def _count_cpu(self) -> None:
        if self._cpu_mark is not None:
            now = cpu_seconds()
            self._running.cpu_seconds += now - self._cpu_mark
            self._cpu_mark = now

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.previous_timestamp is not None, 'the trainer has just advanced the timestamp'
        samples = int(state.timestamp.sample - state.previous_timestamp.sample)
        running = self._running
        # total_loss_dict is the mean over the ranks, and already on the host.
        if 'loss/train/total' in state.total_loss_dict:
            running.loss_sum += state.total_loss_dict['loss/train/total'] * samples
            running.loss_samples += samples
        running.batch_size = max(running.batch_size, samples)
        running.metrics = getattr(state.dataloader, 'metrics', running.metrics)

    def epoch_end(self, state: State, logger: Logger) -> None:
        assert state.previous_timestamp is not None, 'the trainer has just advanced the timestamp'
        self._observe_scores(state, int(state.previous_timestamp.epoch))
        self._record(state, logger, state.previous_timestamp)
        self._running = _Running()

    def fit_end(self, state: State, logger: Logger) -> None:
        batches = int(state.timestamp.batch_in_epoch)
        if batches > 0:  # max_duration cut the epoch short
            plan = getattr(state.dataloader, 'plan', None)
            share = 1.0 if plan is None else int(state.timestamp.sample_in_epoch) / plan.num_samples
            self._record(state, logger, state.timestamp, share)
        self._cpu_mark = None

    def eval_end(self, state: State, logger: Logger) -> None:
        label = str(state.dataloader_label)
        names = list(state.eval_metrics.get(label, {}))
        accuracies = sorted((name for name in names if name.endswith('Accuracy')), key=lambda name: name != 'MulticlassAccuracy')
        losses = [name for name in names if name.endswith('CrossEntropy')]
        accuracy, loss = (float(state.eval_metric_values[found[0]]) if found else None for found in (accuracies, losses))
        if accuracies or losses:
            self._evaluated[label] = accuracy, loss

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._cpu_mark = cpu_seconds()
        evaluated, self._evaluated = self._evaluated, {}
        if not evaluated:
            self._warn_of_no_quality(state)
            return
        accuracy, loss = evaluated.get('eval', next(iter(evaluated.values())))
        # Evaluation at the end of an epoch runs after EPOCH_END, when the timestamp is already in the next epoch.
        within = int(state.timestamp.batch_in_epoch) > 0
        epoch = int(state.timestamp.epoch) - (not within)
        if within:
            self._running.eval_accuracy, self._running.eval_loss = accuracy, loss
        if epoch in self._epochs:
            self._epochs[epoch].eval_accuracy, self._epochs[epoch].eval_loss = accuracy, loss
            self._write(state)

    def _warn_of_no_quality(self, state: State) -> None:
        if self._no_quality_warned or dist.get_global_rank() != 0:
            return
        self._no_quality_warned = True
        names = ', '.join(dict.fromkeys(name for metrics in state.eval_metrics.values() for name in metrics)) or 'none'
        warnings.warn(
            f'EfficiencyMonitor: no metric of the evaluation has a name that ends in Accuracy or CrossEntropy (there are: {names}); '
            f'eval_accuracy and eval_loss in {SUMMARY} stay null',
            stacklevel=2,
        )

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        if self._ends_run:
            self.eval_after_all(state, logger)
            self._cpu_mark = None
        self._evaluated = {}  # trainer.eval() is not part of the run

    def lacks_end(self, state: State, *, evaluated: bool, by_epoch: bool) -> bool:
        """Whether the summary of a run that was resumed at its end lacks its last epoch, or the evaluation after it.

        Args:
            state: The trainer's state after loading.
            evaluated: Whether the run is evaluated.
            by_epoch: Whether it is evaluated at the ends of epochs only. Otherwise a value equal to that in the checkpoint may be older.

        Returns:
            The same on every rank. False for a damaged summary.
        """
        found: list[Any] = [self._lacks_end(state, evaluated, by_epoch) if dist.get_global_rank() == 0 else None]
        dist.broadcast_object_list(found)
        lacks, entry = found[0]
        if lacks and entry is not None:
            self._epochs[entry.epoch] = entry
        return lacks

    def _lacks_end(self, state: State, evaluated: bool, by_epoch: bool) -> tuple[bool, _Epoch | None]:
        """Also returns the summary's entry of a last epoch that was cut short, as the checkpoint was written before it."""
        batches = int(state.timestamp.batch_in_epoch)
        epoch = int(state.timestamp.epoch) - (batches == 0)
        try:
            summary = json.loads(read_text(self._folder(state) / SUMMARY))
            entry = {entry['epoch']: entry for entry in summary['epochs']}.get(epoch)
            if entry is None or batches not in (0, entry['batches']):
                return True, None
            written = entry['eval_accuracy'], entry['eval_loss']
            cut = None
            if batches:
                full = summary['totals']['samples_full'] - sum(
                    other.samples_full for other in self._epochs.values() if other.epoch != epoch
                )
                loss = float('nan') if entry['train_loss'] is None else entry['train_loss']
                cut = restored(_Epoch, entry | {'samples_full': full, 'train_loss': loss})
        except FileNotFoundError:
            return True, None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError):
            return False, None
        saved = self._running if batches else self._epochs.get(epoch, self._running)
        lacks = evaluated and (written == (None, None) or (not by_epoch and written == (saved.eval_accuracy, saved.eval_loss)))
        return lacks, cut

    def record_end(self, state: State, logger: Logger, evaluate: Callable[[], None] | None) -> None:
        """Records the last epoch of a run that was resumed at its end, after ``evaluate``, a standalone evaluation by the trainer.

        Raises:
            InputError: The run ended within a planned epoch that is not in the summary; its plan, and so the samples saved in it, exists in
                training only.
        """
        if int(state.timestamp.batch_in_epoch) > 0 and int(state.timestamp.epoch) not in self._epochs:
            if EpochPlanner.find(state) is not None:
                raise InputError(
                    f'{self._folder(state) / SUMMARY}: the run was stopped in its last evaluation, within an epoch, which cannot be made '
                    f'up for; give a larger max_duration, or remove {self._folder(state)} to train it anew'
                )
            self.fit_end(state, logger)
        self._ends_run = True
        try:
            if evaluate is not None:
                evaluate()
        finally:
            self._ends_run = False
        self._write(state)

    def _observe_scores(self, state: State, epoch: int) -> None:
        """Records the score histogram. Composer runs callbacks after algorithms, so the epoch's scores are complete here."""
        planner = EpochPlanner.find(state)
        scores = None if planner is None or dist.get_global_rank() > 0 else planner.selectors.sample_scores
        if scores is not None:
            # keep epochs 1, 2, 4, ... (counted from 1); replace the last entry if it is not one of them
            self._scores = {number: entry for number, entry in self._scores.items() if (number + 1) & number == 0}
            self._scores[epoch] = _histogram(epoch, scores.numpy())

    def _record(self, state: State, logger: Logger, timestamp: Timestamp, share: float = 1.0) -> None:
        """Adds the epoch that ends at ``timestamp``, of which ``share`` was run, to the list, the log and the summary."""
        self._count_cpu()
        running = self._running
        samples = int(timestamp.sample_in_epoch)
        # Without a plan nothing is pruned, so the full cost is what ran, including drop_last and padding over the ranks. A stream of
        # unknown length has a plan, but no full epoch (0).
        full = getattr(state.dataloader, 'full_samples', None)
        entry = _Epoch(
            epoch=int(timestamp.epoch),
            seconds=timestamp.epoch_wct.total_seconds(),
            samples=samples,
            batches=int(timestamp.batch_in_epoch),
            batch_size=running.batch_size,
            lr=float(state.optimizers[0].param_groups[0]['lr']),
            train_loss=running.loss_sum / running.loss_samples if running.loss_samples else float('nan'),
            eval_accuracy=running.eval_accuracy,
            selection_seconds=running.metrics.selection_seconds,
            samples_full=round(full * share) if full else samples,
            cpu_seconds=running.cpu_seconds,
            eval_loss=running.eval_loss,
            tokens=int(timestamp.token_in_epoch) or None,
        )
        self._epochs[entry.epoch] = entry
        self._peak_memory = max(self._peak_memory, peak_memory_bytes(state))
        self._write(state)
        totals = self._totals()
        values = {
            'samples_seen': totals['samples_seen'],
            'samples_full': totals['samples_full'],
            'saved_fraction': totals['saved_fraction'],
            'batch_size': entry.batch_size,
            'lr': entry.lr,
            'epoch_seconds': entry.seconds,
            'selection_seconds': entry.selection_seconds,
            'peak_memory_bytes': self._peak_memory,
        }
        if entry.tokens is not None and entry.seconds > 0:
            values |= {
                'tokens_seen': totals['tokens_seen'],
                'tokens_saved_fraction': totals['tokens_saved_fraction'],
                'tokens_per_second': entry.tokens / entry.seconds,
            }
        logger.log_metrics({f'efficiency/{name}': value for name, value in values.items()})

    def _totals(self) -> dict[str, Any]:
        epochs = list(self._epochs.values())
        seen, full = sum(entry.samples for entry in epochs), sum(entry.samples_full for entry in epochs)
        accuracies = [entry.eval_accuracy for entry in epochs if entry.eval_accuracy is not None]
        losses = [entry.eval_loss for entry in epochs if entry.eval_loss is not None]
        return {
            'train_seconds': sum(entry.seconds for entry in epochs),
            'train_cpu_seconds': sum(entry.cpu_seconds for entry in epochs),
            'samples_seen': seen,
            'samples_full': full,
            'samples_saved': full - seen,
            'saved_fraction': 1 - seen / full if full else 0.0,
            'selection_seconds': sum(entry.selection_seconds for entry in epochs),
            'eval_accuracy': accuracies[-1] if accuracies else None,
            'eval_loss': losses[-1] if losses else None,
            'peak_memory_bytes': self._peak_memory,
            **_token_totals(epochs),
        }

    def _folder(self, state: State) -> Path:
        return self.save_folder / state.run_name

    def _write(self, state: State) -> None:
        if dist.get_global_rank() != 0:
            return
        summary = {
            'run_name': state.run_name,
            'recipe': self.recipe,
            'seed': state.rank_zero_seed,
            'world_size': dist.get_world_size(),
            'device': torch.cuda.get_device_name() if state.device.name == 'gpu' else state.device.name,
            'versions': versions(),
            'epochs': [asdict(entry) for entry in self._epochs.values()],
            'totals': self._totals(),
        }
        if self._scores:
            entries = [asdict(self._scores[epoch]) for epoch in sorted(self._scores)]
            summary['score_histograms'] = {'edges': SCORE_EDGES.tolist(), 'epochs': entries}
        target = self._folder(state) / SUMMARY
        with whole_file(target) as unfinished:
            unfinished.write_text(json.dumps(_without_nan(summary), indent=2, allow_nan=False) + '\n', encoding='utf-8')


def _token_totals(epochs: list[_Epoch]) -> dict[str, Any]:
    """Tokens of the run, and of its epochs without pruning.

    The tokens of skipped samples are unknown, so a pruned epoch is extrapolated with the tokens per sample of the run's full epochs, or of
    all its epochs if none was full. This is exact if all samples have the same number of tokens.
    """
    counted = [(entry.tokens, entry) for entry in epochs if entry.tokens is not None]
    if not counted:
        return dict.fromkeys(('tokens_seen', 'tokens_full', 'tokens_saved_fraction', 'tokens_per_second'))
    whole = [(tokens, entry) for tokens, entry in counted if entry.samples == entry.samples_full] or counted
    per_sample = sum(tokens for tokens, _ in whole) / sum(entry.samples for _, entry in whole)
    seen = sum(tokens for tokens, _ in counted)
    full = sum(tokens if entry.samples == entry.samples_full else round(per_sample * entry.samples_full) for tokens, entry in counted)
    seconds = sum(entry.seconds for _, entry in counted)
    return {
        'tokens_seen': seen,
        'tokens_full': full,
        'tokens_saved_fraction': 1 - seen / full,
        'tokens_per_second': seen / seconds if seconds else None,
    }


def _histogram(epoch: int, scores: np.ndarray) -> _Scores:
    finite = scores[np.isfinite(scores)]
    counts, _ = np.histogram(np.clip(finite, SCORE_EDGES[0], SCORE_EDGES[-1]), SCORE_EDGES)
    return _Scores(epoch, float(finite.mean(dtype=np.float64)) if len(finite) else float('nan'), counts.tolist())


def _without_nan(value: Any) -> Any:
    """Replaces each float that JSON cannot represent, such as the loss of a diverged run, by ``None``."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not float('-inf') < value < float('inf'):
        return None
    return value
