"""Checkpoints of a recipe: where they go, which one a run resumes from, and whether it fits."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.utils import dist
from torch.nn.parallel import DistributedDataParallel

from composer_effalgos.models.pretrained import differences
from composer_effalgos.recipes.schema import Recipe
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import one_line

__all__ = ['check_checkpoint', 'check_loading', 'check_weights', 'checkpoint_folder', 'trainer_arguments']


def checkpoint_folder(recipe: Recipe) -> Path:
    """Where a recipe's checkpoints go.

    Args:
        recipe: A checked recipe.

    Returns:
        ``<save_folder>/<run_name>/checkpoints``.
    """
    return recipe.run_folder / 'checkpoints'


def trainer_arguments(recipe: Recipe) -> dict[str, Any]:
    """The recipe's arguments of the Trainer, with what resuming needs."""
    arguments = dict(recipe.trainer)
    if not arguments.get('autoresume', False):
        return arguments
    latest = checkpoint_folder(recipe) / 'latest-rank0.pt'
    # A run killed between writing a checkpoint, be it the first, and marking it the latest writes that checkpoint again
    arguments.setdefault('save_overwrite', True)
    if dist.get_world_size() > dist.get_local_world_size():
        # Every node of Composer 0.32.1 would remove the same signal file from the folder that they share, and fail where it is gone
        arguments['autoresume'] = False
        if latest.exists():
            arguments |= {'load_path': str(latest), 'load_weights_only': False, 'load_ignore_keys': None, 'load_exclude_algorithms': None}
    return arguments


def check_loading(recipe: Recipe) -> bool:
    """Whether this run loads a checkpoint, after a look at the file."""
    load_path = recipe.trainer.get('load_path')
    if load_path is not None and '://' not in load_path and '{' not in load_path:
        check_checkpoint(f'{recipe.source}: load_path', Path(load_path))
    latest = checkpoint_folder(recipe) / 'latest-rank0.pt'
    resumes = recipe.trainer.get('autoresume', False) and latest.exists()
    if resumes:
        check_checkpoint(f'{recipe.source}: autoresume', latest)
    return resumes or load_path is not None


def check_checkpoint(key: str, path: Path) -> None:
    """See that a file is a whole checkpoint of Composer's.

    Args:
        key: Where the recipe says so; begins the error message.
        path: The file.

    Raises:
        InputError: The file is missing, cut off, or something else.
    """
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
        # The checksums are right; Composer reads it in the same way, and mmap leaves the tensors on the disk
        content = torch.load(path, map_location='cpu', mmap=True, weights_only=False)
    except Exception as error:  # there is no end to what damaged bytes lead to
        raise InputError(f'{key}: {path}: not a checkpoint ({one_line(error)[:200]})') from error
    if not isinstance(content, dict) or 'state' not in content:
        raise InputError(f"{key}: {path}: not a checkpoint of Composer's (it has no 'state'); expected one that this training wrote")


def check_weights(trainer: Trainer, key: str, path: Path) -> None:
    """Composer loads what fits and leaves the rest as it was: weights of another network must not pass for this one's."""
    model = trainer.state.model
    model = model.module if isinstance(model, DistributedDataParallel) else model
    content = torch.load(path, map_location='cpu', mmap=True, weights_only=False)  # as Composer has just read it
    found = differences(model.state_dict(), content['state'].get('model', {}))
    if found:
        trainer.close()
        raise InputError(f'{key}: {path}: the checkpoint is of another model ({found})')
