"""Limits of a recipe's values that no signature states: Composer and torch accept such values and fail later, or train wrongly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.core import Time, TimeUnit, ensure_time

from composer_effalgos.datasets.registry import LABELLED_TEXT, TEXT
from composer_effalgos.recipes.settings import MOST_CHARACTERS, MOST_LEVELS, TOO_DEEP
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import shown

_FLOAT32_MAX = 3.4e38
_LATEST = 'latest-rank{rank}.pt'  # Composer's default
_LONGEST_NAME = 200  # bytes; file systems allow 255, and suffixes are added


def check_values(key: str, value: Any, levels: int = MOST_LEVELS) -> None:
    """Reject NaN and numbers beyond float32 at any depth, with which a run would train without learning, and malformed strings.

    Lists and mappings may be nested ``levels`` deep. As in all these checks, ``key`` or ``source`` starts the message.
    """
    if levels == 0:
        raise InputError(f'{key.split(".")[0]}: {TOO_DEEP}')
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_values(f'{key}.{name}', item, levels - 1)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            check_values(f'{key}[{number}]', item, levels - 1)
    elif isinstance(value, str) and ('\0' in value or len(value) > MOST_CHARACTERS or value.encode(errors='replace').decode() != value):
        raise InputError(f'{key}: expected valid Unicode of at most {MOST_CHARACTERS} characters without null, got {shown(value)}')
    elif isinstance(value, (int, float)) and not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:
        raise InputError(f'{key}: expected a finite number that fits into 32 bits, got {shown(value)}')


def check_trainer(source: str, trainer: Mapping[str, Any]) -> None:
    """Reject arguments, of the types that the Trainer declares, with which it fails later, or that make the run useless."""
    microbatch = trainer.get('device_train_microbatch_size')
    if microbatch not in (None, 'auto') and (not isinstance(microbatch, int) or microbatch < 1):
        raise InputError(f'{source}: device_train_microbatch_size: expected a whole number of samples from 1, or auto, got {microbatch!r}')
    name = trainer.get('save_filename')
    if name is not None and (Path(name).is_absolute() or '..' in Path(name).parts):
        raise InputError(
            f'{source}: save_filename: expected a name inside the folder of checkpoints, got {name!r}; set save_folder instead'
        )
    if trainer.get('save_latest_filename', _LATEST) != _LATEST:  # resuming, sweeps and frontier look for this one
        raise InputError(
            f'{source}: save_latest_filename: expected {_LATEST}, which names the checkpoint to resume from, '
            f'got {shown(trainer["save_latest_filename"])}; leave it out'
        )
    for key in ('train_subset_num_batches', 'eval_subset_num_batches'):
        batches = trainer.get(key)
        if batches is not None and batches < 1 and batches != -1:
            raise InputError(f'{source}: {key}: expected a number of batches from 1, or -1 for all, got {batches!r}')
    for key, otherwise in (('eval_interval', 'or 0 for no evaluation'), ('save_interval', 'or no such key for no checkpoints')):
        interval = '1ep' if trainer.get(key) is None else trainer[key]
        if not (interval == 0 and key == 'eval_interval') and ensure_time(interval, TimeUnit.EPOCH).value <= 0:
            raise InputError(f"{source}: {key}: expected a time above 0 such as '1ep', {otherwise}, got {interval!r}")


def check_run_name(source: str, run_name: str) -> None:
    """Reject a run name that is not a plain file name, because it becomes a folder in ``save_folder``."""
    plain = run_name.isprintable() and run_name.strip() and run_name not in ('.', '..') and not any(char in run_name for char in '/\\{}')
    if not plain or len(run_name.encode()) > _LONGEST_NAME:
        raise InputError(
            f'{source}: run_name: expected a plain folder name of at most {_LONGEST_NAME} bytes, got {run_name[:80]!r} '
            f'({len(run_name)} characters)'
        )


def check_save_folder(source: str, folder: str) -> None:
    """Reject the address of an object store."""
    if re.match(r'[A-Za-z][A-Za-z0-9+.-]*:/', folder):  # Path would collapse the // of a URL
        raise InputError(f'{source}: save_folder: expected a folder of this machine, got the address {shown(folder)}; copy the run there')


def check_duration(key: str, duration: str | int, dataset: str) -> None:
    """Reject a length of training (a time string, or epochs) that is not positive, or in a unit that the dataset does not count."""
    try:
        time: Time[Any] = ensure_time(duration, TimeUnit.EPOCH)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{key}: expected a time string such as '10ep' or '500ba', got {duration!r}") from error
    counted = dataset in (*TEXT, *LABELLED_TEXT)  # image runs count no tokens and would never end
    if time.value <= 0 or time.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE, *[TimeUnit.TOKEN] * counted):
        units = 'epochs, batches, samples or tokens' if counted else 'epochs, batches or samples'
        raise InputError(f"{key}: expected a positive number of {units} such as '10ep', got {duration!r}")
