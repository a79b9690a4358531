from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

SETTINGS = {
    'seed': 17,
    'max_duration': '2ep',
    'save_interval': '2ep',
    'progress_bar': False,
    'device': 'cpu',
    'dataset': {'name': 'synthetic', 'num_samples': 64, 'eval_samples': 40, 'num_classes': 4, 'image_size': 8, 'batch_size': 16},
    'model': {'name': 'keskar_c1', 'image_size': 8, 'conv_stride': 2},
    'optimizer': {'name': 'adam', 'lr': 1e-3},
}


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of a small run that saves a checkpoint; keyword arguments replace its sections."""

    def write(name: str = 'small', **changes: object) -> Path:
        path = tmp_path / f'{name}.yaml'
        path.write_text(yaml.safe_dump(SETTINGS | {'run_name': name, 'save_folder': str(tmp_path / 'runs')} | changes))
        return path

    return write
