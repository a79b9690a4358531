"""Data loaders to pass to the Trainer instead of a ``DataLoader`` with worker processes."""

from composer_effalgos.loaders.device import DeviceDataLoader
from composer_effalgos.loaders.ffcv import FfcvDataLoader
from composer_effalgos.loaders.registry import GIVEN, LOADERS

__all__ = ['GIVEN', 'LOADERS', 'DeviceDataLoader', 'FfcvDataLoader']
