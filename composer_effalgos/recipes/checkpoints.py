"""Checkpoints of a recipe: where they are saved, which one a run starts from, and whether it is valid."""

from __future__ import annotations

import datetime
import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.core import State
from composer.utils import dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from composer_effalgos.models.pretrained import differences
from composer_effalgos.monitor import SUMMARY
from composer_effalgos.recipes.faults import modules
from composer_effalgos.recipes.schema import Recipe
from composer_effalgos.recipes.settings import first_difference
from composer_effalgos.utils.errors import CheckpointError, InputError
from composer_effalgos.utils.files import read_text
from composer_effalgos.utils.text import one_line, shown

# State required to resume. Composer ignores missing entries, so a run would silently restart them from scratch.
_STATE: dict[str, type | tuple[type, ...]] = {
    'model': dict,
    'optimizers': dict,
    'schedulers': dict,
    'algorithms': (list, dict),
    'callbacks': dict,
    'timestamp': dict,
    'rank_zero_seed': int,
}
_COUNTS = ('epoch', 'batch', 'sample', 'token', 'batch_in_epoch', 'sample_in_epoch', 'token_in_epoch')
# Settings that may change when a run is resumed: its length, what is measured, logged and saved, where data is, and how it is computed
_FREE = {
    'run_name', 'max_duration', 'autoresume', 'device', 'dist_timeout', 'device_train_microbatch_size', 'compile_config',
    'parallelism_config', 'ddp_sync_strategy', 'deterministic_mode', 'progress_bar', 'load_progress_bar', 'python_log_level',
    'auto_log_hparams', 'model.train_metrics', 'dataset.path', 'dataset.remote', 'dataset.download', 'dataset.num_workers',
    'dataset.pin_memory', 'dataset.prefetch_factor',
}  # fmt: skip
_FREE_SECTIONS = (
    'eval_', 'save_', 'log_', 'console_', 'callbacks', 'loggers', 'dataset.eval_', 'compile_config.', 'parallelism_config.',
)  # fmt: skip
_LOADERS = ('composer.utils.checkpoint', 'composer.utils.file_helpers', 'composer.utils.object_store')


def checkpoint_folder(recipe: Recipe) -> Path:
    """The folder of a recipe's checkpoints, ``<save_folder>/<run_name>/checkpoints``."""
    return recipe.run_folder / 'checkpoints'


def trainer_arguments(recipe: Recipe) -> dict[str, Any]:
    """The recipe's Trainer arguments, adjusted for autoresume."""
    arguments = dict(recipe.trainer)
    if not arguments.get('autoresume', False):
        return arguments
    latest = checkpoint_folder(recipe) / 'latest-rank0.pt'
    # A run killed after writing a checkpoint but before linking it as the latest writes that checkpoint again
    arguments.setdefault('save_overwrite', True)
    if dist.get_world_size() > dist.get_local_world_size():
        # In Composer 0.32.1, every node removes the same signal file from the shared folder, and all but the first fail
        arguments['autoresume'] = False
        if latest.exists():
            arguments |= {'load_path': str(latest), 'load_weights_only': False, 'load_ignore_keys': None, 'load_exclude_algorithms': None}
    return arguments


def check_settings(recipe: Recipe) -> None:
    """Check that ``autoresume`` continues a run with the settings it was trained with, as far as they decide what is trained.

    The earlier settings are those in the summary; a run stopped before its first epoch ended has none.
    """
    path = recipe.run_folder / SUMMARY
    try:
        before = json.loads(read_text(path))['recipe']
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return  # the run will write it anew
    if not isinstance(before, dict) or not before:  # a script wrote it
        return
    differs = first_difference(before, recipe.settings, lambda key: key in _FREE or key.startswith(_FREE_SECTIONS))
    if differs is not None:
        key, there, now = differs
        raise InputError(
            f'{recipe.source}: autoresume: {path}: {key}: {shown(there)} there, {shown(now)} now; '
            f'set it back, choose another run_name, or remove {recipe.run_folder}'
        )


@dataclass(frozen=True)
class Loading:
    """A checkpoint that a run starts from.

    Attributes:
        key: The recipe key, e.g. ``recipe.yaml: load_path``; starts every error message.
        path: Path or URL of the file.
        weights_only: Whether only the weights are loaded.
        partly: Whether the recipe excludes parts of the checkpoint.
    """

    key: str
    path: str
    weights_only: bool = False
    partly: bool = False

    @property
    def is_local(self) -> bool:
        """Whether the file is local and can be read before Composer loads it."""
        return '://' not in self.path and not self.path.startswith('dbfs:')

    @property
    def is_autoresume(self) -> bool:
        """Whether this is the run's own latest checkpoint."""
        return self.key.endswith('autoresume')

    def check(self) -> None:
        """Check the file if it is local; raises as :func:`check_checkpoint`."""
        if self.is_local:
            check_checkpoint(self.key, Path(self.path), weights_only=self.weights_only)

    def refused(self, error: Exception, model: nn.Module | None = None) -> InputError | None:
        """Turn an error from loading the checkpoint, or from resuming with it, into an ``InputError``.

        The message lists the differences of ``model`` from the checkpoint. Returns ``None`` if the error is not about the checkpoint.
        """
        if isinstance(error, CheckpointError):
            return InputError(f'{self.key}: {error.reason}')
        if isinstance(error, MemoryError) or not any(module.startswith(_LOADERS) for module in modules(error)):
            return None
        other = '' if model is None or not self.is_local else self._differences(model)
        kind = '' if isinstance(error, (InputError, ValueError, RuntimeError)) else f'{type(error).__name__}: '
        reason = f'of another model ({other})' if other else f'not one that this run can resume from ({kind}{one_line(error)[:300]})'
        return InputError(f'{self.key}: {self.path}: the checkpoint is {reason}')

    def check_weights(self, model: nn.Module) -> None:
        """Reject weights of another model; Composer would load the matching ones and ignore the rest.

        ``model`` is the model after all changes by algorithms.
        """
        other = self._differences(model) if self.is_local and not self.partly else ''
        if other:
            raise InputError(f'{self.key}: {self.path}: the checkpoint is of another model ({other})')

    def check_state(self, state: State) -> None:
        """Check that the checkpoint held the state to resume; Composer at most warns about missing state and initialises it.

        ``state`` is the trainer's state after loading. With autoresume, the state of each of our algorithms must be there; the optimizer
        must have state, with the same entries for every parameter.
        """
        if not self.is_local or self.weights_only or self.partly:
            return
        saved = _content(Path(self.path))['state']
        names = {name for name, _ in _pairs(saved['algorithms'])}
        ours = [type(algorithm).__name__ for algorithm in state.algorithms if type(algorithm).__module__.startswith('composer_effalgos.')]
        lost = [name for name in ours if name not in names]
        if lost and self.is_autoresume:
            raise InputError(
                f'{self.key}: {self.path}: state.algorithms: expected {lost[0]}, which the recipe has, '
                f'got {", ".join(sorted(names)) or "none"}; another run_name starts from scratch'
            )
        for optimizer in state.optimizers if int(state.timestamp.batch) else ():
            entries = [set(entry) for entry in optimizer.state.values()]
            remembers = bool(optimizer.defaults.get('momentum')) or 'betas' in optimizer.defaults
            if (remembers and not entries) or any(entry != entries[0] for entry in entries):
                raise InputError(
                    f'{self.key}: {self.path}: state.optimizers: expected the state of {type(optimizer).__name__} for every parameter '
                    f'alike, got {"entries that some of them lack" if entries else "none"}; load_weights_only: true takes the weights alone'
                )

    def _differences(self, model: nn.Module) -> str:
        model = model.module if isinstance(model, DistributedDataParallel) else model
        return differences(model.state_dict(), _content(Path(self.path))['state']['model'])


def loading(recipe: Recipe) -> Loading | None:
    """The checkpoint that a run starts from: with ``autoresume`` the latest, if there is one, else that of ``load_path``, else ``None``."""
    latest = checkpoint_folder(recipe) / 'latest-rank0.pt'
    load_path = recipe.trainer.get('load_path')
    if recipe.trainer.get('autoresume', False) and latest.exists():
        return Loading(f'{recipe.source}: autoresume', str(latest))
    if load_path is not None:
        try:
            path = load_path.format(run_name=recipe.run_name, rank=0, local_rank=0, node_rank=0)
        except (LookupError, ValueError, AttributeError) as error:
            raise InputError(
                f'{recipe.source}: load_path: expected a path with no other braces than {{run_name}}, {{rank}}, {{local_rank}} and '
                f'{{node_rank}}, got {shown(load_path)}'
            ) from error
        partly = bool(recipe.trainer.get('load_ignore_keys')) or recipe.trainer.get('load_strict_model_weights') is False
        return Loading(f'{recipe.source}: load_path', path, bool(recipe.trainer.get('load_weights_only', False)), partly)
    return None


def check_checkpoint(key: str, path: Path, *, weights_only: bool = False) -> None:
    """Check that a file is a complete Composer checkpoint that has the state to resume or, with ``weights_only``, the weights."""
    if not path.is_file():
        raise InputError(f'{key}: {path}: no such checkpoint')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f'{key}: {path}: not a checkpoint, or cut off ({one_line(error)})') from error
    if damaged is not None:
        raise InputError(f'{key}: {path}: damaged checkpoint (in {damaged})')
    try:
        content = _content(path)
    except Exception as error:  # damaged bytes can raise anything
        raise InputError(f'{key}: {path}: not a checkpoint ({one_line(error)[:200]})') from error
    wrong = _wrong(content, weights_only=weights_only)
    if wrong:
        raise InputError(f'{key}: {path}: not a Composer checkpoint to resume from: {wrong}; expected one that this training wrote')


def only_weights(path: Path) -> bool:
    """Whether a checkpoint was saved with ``save_weights_only``; raises what ``torch.load`` raises.

    The file is unpickled, so check it first (:func:`~composer_effalgos.models.pretrained.read_checkpoint`).
    """
    content = _content(path)
    state = content.get('state') if isinstance(content, dict) else None
    return isinstance(state, dict) and set(state) == {'model'}


def _content(path: Path) -> Any:
    # weights_only=False, as Composer itself loads it next; mmap leaves the tensors on disk
    return torch.load(path, map_location='cpu', mmap=True, weights_only=False)


def _wrong(content: Any, *, weights_only: bool) -> str:
    """Describe what is missing in a checkpoint or has the wrong type; empty if it is complete."""
    state = content.get('state') if isinstance(content, dict) else None
    if not isinstance(state, dict):
        return "it has no 'state'"
    for name in ('model',) if weights_only else _STATE:
        if not isinstance(state.get(name), _STATE[name]):
            return f'state.{name} is {f"of type {type(state[name]).__name__}" if name in state else "missing"}'
    odd = [name for name, value in state['model'].items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)]
    if odd:
        return f'state.model: {shown(odd[0])} is not a tensor'
    if weights_only:
        return ''
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in _pairs(state['algorithms'])):
        return 'state.algorithms: names and states are not in pairs'
    ranks = content.get('rng')
    if not isinstance(ranks, list) or not ranks or not all(isinstance(rank, dict) for rank in ranks):
        return 'rng is not a list of random states'
    return _wrong_time(state['timestamp'].get('Timestamp'))


def _pairs(saved: Any) -> Iterable[Any]:
    """(name, state) pairs of a checkpoint's algorithms; older Composer versions saved a dict."""
    return saved.items() if isinstance(saved, dict) else saved


def _wrong_time(timestamp: Any) -> str:
    if not isinstance(timestamp, dict):
        return 'state.timestamp has no Timestamp'
    for name in (*_COUNTS, *timestamp):
        value = timestamp.get(name)
        good = isinstance(value, datetime.timedelta) if str(name).endswith('_wct') else type(value) is int and 0 <= value < 2**63
        if not good:
            return f'state.timestamp: {name} is {shown(value)}'
    ahead = [name for name in ('batch', 'sample', 'token') if timestamp[f'{name}_in_epoch'] > timestamp[name]]
    return f'state.timestamp: {ahead[0]}_in_epoch is greater than {ahead[0]}' if ahead else ''
