"""The registry of data loaders by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.utils.data import Dataset

from composer_effalgos.datasets.beton import Beton
from composer_effalgos.loaders.device import DeviceDataLoader
from composer_effalgos.loaders.ffcv import FfcvDataLoader
from composer_effalgos.plan import BatchReader
from composer_effalgos.utils.checks import check_number


def device(
    dataset: Dataset, *, train: bool, batch_size: int, drop_last: bool, seed: int, num_workers: int, cache: str | None = None
) -> DeviceDataLoader:
    """``loader: device``: images are decoded once, then batched and augmented on the device.

    Args:
        dataset: The dataset.
        train: Whether to shuffle, with a new order each epoch.
        batch_size: Samples per rank and batch.
        drop_last: Drop an incomplete last batch.
        seed: The run's seed.
        num_workers: Number of decoding processes.
        cache: Folder for decoded images; null decodes them in each run.
    """
    loader = DeviceDataLoader(
        dataset, batch_size=batch_size, shuffle=train, drop_last=drop_last, seed=seed, cache=cache, num_workers=num_workers
    )
    loader.load()  # report broken images before training starts
    return loader


def ffcv(
    dataset: Beton, *, train: bool, batch_size: int, drop_last: bool, seed: int, num_workers: int, batches_ahead: int = 2
) -> FfcvDataLoader:
    """``loader: ffcv``: images are decoded by ffcv's threads and augmented on the device.

    Args:
        dataset: The dataset, ``dataset: beton``.
        train: Whether to shuffle, with a new order each epoch.
        batch_size: Samples per rank and batch.
        drop_last: Drop an incomplete last batch.
        seed: The run's seed.
        num_workers: Number of decoding threads; at least one is used.
        batches_ahead: Number of batches to decode ahead.
    """
    check_number('loader.batches_ahead', batches_ahead, least=1, most=1024)
    return FfcvDataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=train,
        drop_last=drop_last,
        seed=seed,
        num_threads=num_workers,
        batches_ahead=batches_ahead,
    )


LOADERS: Mapping[str, Callable[..., BatchReader]] = {'device': device, 'ffcv': ffcv}
"""Builders: ``(dataset, *, train, batch_size, drop_last, seed, num_workers, **options)``; ``batch_size`` is per rank."""

GIVEN = ('dataset', 'train', 'batch_size', 'drop_last', 'seed', 'num_workers')
"""The arguments of a builder that do not come from the recipe's ``loader`` section."""
