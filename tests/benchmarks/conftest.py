"""The benchmark scripts as modules."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a benchmark by name, as it finds its own neighbours when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def write_run() -> Callable[..., None]:
    """Writes a finished run of epochs of ``samples`` samples, 10 steps each."""
    return _write_run


def _write_run(folder: Path, method: str, seed: int, accuracy: float, epochs: int, algorithms: dict[str, Any], samples: int = 100) -> None:
    name = f'{method}_seed{seed}'
    measured = {'seconds': 2.0, 'samples': samples, 'batches': 10, 'batch_size': 10}
    entry: dict[str, Any] = {**measured, 'selection_seconds': 0.0, 'eval_accuracy': None}
    seen = samples * epochs
    totals = {'train_seconds': 2.0 * epochs, 'train_cpu_seconds': 1.0 * epochs, 'samples_seen': seen, 'samples_full': seen}
    totals |= {'samples_saved': 0, 'saved_fraction': 0.0, 'selection_seconds': 0.0, 'eval_accuracy': accuracy, 'peak_memory_bytes': 1}
    summary = {
        'run_name': name,
        'recipe': {'max_duration': f'{epochs}ep', 'algorithms': algorithms},
        'seed': seed,
        'world_size': 1,
        'device': 'cpu',
        'versions': {},
        'epochs': [entry | {'epoch': epoch, 'lr': 1 - epoch / epochs} for epoch in range(epochs)],
        'totals': totals,
    }
    (folder / name).mkdir(parents=True)
    (folder / name / 'summary.json').write_text(json.dumps(summary))
