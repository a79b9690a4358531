"""Data paths besides worker processes: loaders that are given to the Trainer in place of a ``DataLoader``."""

from composer_effalgos.loaders.device import DeviceDataLoader
from composer_effalgos.loaders.ffcv import FfcvDataLoader
from composer_effalgos.loaders.registry import GIVEN, LOADERS

__all__ = ['GIVEN', 'LOADERS', 'DeviceDataLoader', 'FfcvDataLoader']
