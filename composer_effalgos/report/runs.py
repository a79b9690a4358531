"""Runs, read from their ``summary.json``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from composer_effalgos.monitor import SUMMARY
from composer_effalgos.utils.checks import Range
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_text
from composer_effalgos.utils.text import one_line

_NUMBERS = {
    'epochs': ('epoch', 'seconds', 'samples', 'batches', 'batch_size', 'lr', 'selection_seconds'),
    'totals': (
        'train_seconds',
        'train_cpu_seconds',
        'samples_seen',
        'samples_full',
        'samples_saved',
        'saved_fraction',
        'selection_seconds',
        'peak_memory_bytes',
    ),
}
_LATER = ('eval_loss', 'samples_full', 'tokens', 'tokens_seen', 'tokens_full')  # summaries of older versions lack some of these

# Dataset options that do not change the data; and datasets that are identified by their path, not their name
_BATCHING = ('batch_size', 'eval_batch_size', 'num_workers', 'drop_last', 'pin_memory', 'prefetch_factor', 'path')
_BY_PATH = ('beton', 'image_folder', 'image_parquet', 'mds')


@dataclass(frozen=True)
class Run:
    """One ``summary.json``.

    Attributes:
        folder: The run's folder, relative to the searched folder.
        summary: The content of the file, checked by :func:`read_runs`.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def method(self) -> str:
        """The run's name without its seed: ``digits_infobatch`` for ``digits_infobatch_seed17`` with seed 17."""
        name, seed = self.summary['run_name'], self.summary['seed']
        return re.sub(rf'[-_.](seed|s)?[-_=]?{seed}$', '', name, flags=re.IGNORECASE) or name

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe without settings that differ between runs of one method."""
        return {key: value for key, value in self.summary['recipe'].items() if key not in ('run_name', 'seed', 'save_folder')}

    @property
    def task(self) -> str:
        """Key of dataset with its options, model and duration, as far as the recipe has them; runs of one task share a baseline."""
        recipe = self.summary['recipe']
        model = recipe.get('model') if isinstance(recipe.get('model'), dict) else {}
        duration = recipe.get('max_duration')
        duration = f'{duration}ep' if isinstance(duration, int) else duration  # a plain number is in epochs
        return json.dumps([data_of(recipe), model.get('name'), duration], sort_keys=True)


def data_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a recipe's dataset that determine its data; runs with equal ones can be compared."""
    dataset = recipe.get('dataset')
    dataset = dataset if isinstance(dataset, dict) else {}
    kept = {key: value for key, value in dataset.items() if key not in _BATCHING and (key, value) != ('limit', None)}
    return kept | ({'path': dataset.get('path')} if dataset.get('name') in _BY_PATH else {})


def read_runs(folder: str | Path) -> tuple[list[Run], list[str]]:
    """Reads the ``summary.json`` of every run in a folder, or of a single run.

    ``folder`` is the runs' ``save_folder``, with one folder per run (deeper folders are not read), or a single run's folder. Returns the
    runs in the order of their paths, numbers in them by value, and one line for each unusable summary, with its path and the reason; at
    least one must be usable.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder; give one that holds runs, each with a {SUMMARY}')
    runs, problems = [], []
    own = folder / SUMMARY
    for path in [own] if own.exists() else sorted(folder.glob(f'*/{SUMMARY}'), key=_natural):
        try:
            runs.append(Run(path.parent.relative_to(folder), read_summary(path)))
        except InputError as error:
            problems.append(str(error))
    if not runs:
        deeper = next(folder.glob(f'*/*/{SUMMARY}'), None)
        hint = f'train a recipe with save_folder={folder} first' if deeper is None else f'its folder {deeper.parent.parent} holds runs'
        raise InputError(problems[0] if problems else f'{folder}: no {SUMMARY} in any folder in it; {hint}')
    return runs, problems


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key of a path by which a number comes before a larger one: ``baseline+8ep`` before ``baseline+15ep``."""
    return [(int(part), '') if part.isdecimal() else (-1, part) for part in re.split(r'(\d+)', path.parent.name)]


def read_summary(path: Path) -> dict[str, Any]:
    """Reads one ``summary.json`` and checks it for the table and the report."""
    try:
        summary = json.loads(read_text(path))
        check_summary(summary)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise InputError(f'{path}: not the summary of a run: {reason}') from error
    return summary


def first_above(run: Run, target: float) -> tuple[int, float] | None:
    """Finds the first epoch (from 1) at whose end the accuracy was above ``target``, and the training seconds until then; None if never."""
    epochs = run.summary['epochs']
    for entry, seconds in zip(epochs, accumulate(entry['seconds'] for entry in epochs), strict=True):
        if entry.get('eval_accuracy') is not None and entry['eval_accuracy'] > target:
            return entry['epoch'] + 1, seconds
    return None


def check_summary(summary: Any) -> None:
    """Checks that the table and the report can use the content of a ``summary.json``; raises a ``ValueError`` that says why not."""
    if not isinstance(summary, dict):
        raise ValueError('it holds no JSON object')
    kinds = {
        'run_name': str,
        'recipe': dict,
        'seed': int,
        'world_size': int,
        'device': str,
        'versions': dict,
        'epochs': list,
        'totals': dict,
    }
    for key, kind in kinds.items():
        if not isinstance(summary.get(key), kind):
            raise ValueError(f'{key!r} is missing or not {kind.__name__}')
    for section in ('dataset', 'model'):
        settings = summary['recipe'].get(section)
        if isinstance(settings, dict) and not isinstance(settings.get('name'), str | None):
            raise ValueError(f"'recipe': {section}.name must be a string")
    if 'score_histograms' in summary:
        _check_histograms(summary['score_histograms'])
    if not summary['epochs']:
        raise ValueError('no epoch has finished')
    for part, entries in (('epochs', summary['epochs']), ('totals', [summary['totals']])):
        for entry in entries:
            if not isinstance(entry, dict) or any(not _is_number(entry.get(key)) for key in _NUMBERS[part]):
                raise ValueError(f'{part!r}: each of {", ".join(_NUMBERS[part])} must be a number')
            if 'eval_accuracy' not in entry or not (entry['eval_accuracy'] is None or _is_number(entry['eval_accuracy'])):
                raise ValueError(f"{part!r}: 'eval_accuracy' must be a number or null")
            for key in _LATER:
                if entry.get(key) is not None and not _is_number(entry[key]):
                    raise ValueError(f'{part!r}: {key!r} must be a number or null')


def _check_histograms(histograms: Any) -> None:
    """Raises ValueError unless the score histograms, which only runs with InfoBatch have, can be drawn."""
    edges, entries = (histograms.get(key) if isinstance(histograms, dict) else None for key in ('edges', 'epochs'))
    if not isinstance(edges, list) or not isinstance(entries, list) or not all(_is_number(edge) and edge > 0 for edge in edges):
        raise ValueError("'score_histograms' must have 'edges' and 'epochs'")
    for entry in entries:
        counts = entry.get('counts') if isinstance(entry, dict) else None
        if not isinstance(counts, list) or len(counts) != len(edges) - 1 or not all(map(_is_number, [entry.get('epoch'), *counts])):
            raise ValueError("'score_histograms': each epoch needs its number and one count per bin")


def _is_number(value: Any) -> bool:
    return value in Range()
