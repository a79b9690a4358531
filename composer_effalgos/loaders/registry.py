"""The names under which recipes find the data paths."""

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
    """``loader: device``: decoded once, batched and augmented on the device.

    Args:
        dataset: The dataset.
        train: Whether the order is drawn again each epoch.
        batch_size: Samples per rank and batch.
        drop_last: Leave the last, smaller batch of an epoch out.
        seed: The run's seed.
        num_workers: Processes that decode.
        cache: Folder for decoded images; null decodes them in each run.
    """
    loader = DeviceDataLoader(
        dataset, batch_size=batch_size, shuffle=train, drop_last=drop_last, seed=seed, cache=cache, num_workers=num_workers
    )
    loader.load()  # what is wrong with the images shows before a run begins
    return loader


def ffcv(
    dataset: Beton, *, train: bool, batch_size: int, drop_last: bool, seed: int, num_workers: int, batches_ahead: int = 2
) -> FfcvDataLoader:
    """``loader: ffcv``: decoded by ffcv's threads, augmented on the device.

    Args:
        dataset: The dataset, ``dataset: beton``.
        train: Whether the order is drawn again each epoch.
        batch_size: Samples per rank and batch.
        drop_last: Leave the last, smaller batch of an epoch out.
        seed: The run's seed.
        num_workers: Threads that decode; at least one.
        batches_ahead: Batches decoded ahead.
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
