"""The registry of data loaders by name."""

from __future__ import annotations

from collections.abc import Mapping

from composer_effalgos.loaders.device import DeviceDataLoader
from composer_effalgos.loaders.ffcv import FfcvDataLoader

LOADERS: Mapping[str, type[DeviceDataLoader] | type[FfcvDataLoader]] = {'device': DeviceDataLoader, 'ffcv': FfcvDataLoader}
"""Loaders: ``(dataset, *, shuffle, batch_size, drop_last, seed, device, num_workers, **options)``; ``batch_size`` is per rank."""

GIVEN = ('dataset', 'shuffle', 'batch_size', 'drop_last', 'seed', 'device', 'num_workers')
"""The arguments of a loader that do not come from the recipe's ``loader`` section."""
