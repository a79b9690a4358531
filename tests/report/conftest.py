import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write_run(tmp_path) -> Callable[..., Path]:
    """Writes a run's summary as EfficiencyMonitor does, below ``tmp_path / 'runs'``."""

    def write(
        run_name: str,
        seed: int = 17,
        accuracies: tuple[float | None, ...] = (0.5, 0.8, 0.9),
        samples: int = 100,
        seconds: float = 2.0,
        dataset: str = 'digits',
        device: str = 'cpu',
        settings: dict | None = None,
        **changes,
    ) -> Path:
        epochs = [
            {
                'epoch': epoch,
                'seconds': seconds,
                'samples': samples,
                'batches': math.ceil(samples / 10),
                'batch_size': 10 * 2**epoch,
                'lr': 0.1 * (1 - epoch / len(accuracies)),
                'train_loss': 1 / (epoch + 1),
                'eval_accuracy': accuracy,
                'selection_seconds': 0.25,
            }
            for epoch, accuracy in enumerate(accuracies)
        ]
        full, seen = 100 * len(epochs), samples * len(epochs)
        recipe = {'run_name': run_name, 'seed': seed, 'dataset': {'name': dataset}, 'model': {'name': 'resnet8'}, **(settings or {})}
        summary = {
            'run_name': run_name,
            'recipe': recipe,
            'seed': seed,
            'world_size': 1,
            'device': device,
            'versions': {'python': '3.11.7', 'torch': '2.7.0'},
            'epochs': epochs,
            'totals': {
                'train_seconds': seconds * len(epochs),
                'train_cpu_seconds': seconds * len(epochs),
                'samples_seen': seen,
                'samples_full': full,
                'samples_saved': full - seen,
                'saved_fraction': 1 - seen / full,
                'selection_seconds': 0.25 * len(epochs),
                'eval_accuracy': accuracies[-1],
                'peak_memory_bytes': 1000,
            },
            **changes,
        }
        number = len(list((tmp_path / 'runs').glob('*')))
        folder = tmp_path / 'runs' / f'{number:02d}'
        folder.mkdir(parents=True)
        (folder / 'summary.json').write_text(json.dumps(summary))
        return folder

    return write
