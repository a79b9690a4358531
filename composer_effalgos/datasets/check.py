"""Finding broken images before training does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from composer_effalgos.datasets.images import with_transform
from composer_effalgos.utils.errors import InputError

PORTION = 64  # images


def check_images(dataset: Any, num_workers: int = 0) -> Iterator[list[str]]:
    """Read and decode every image of a dataset.

    Args:
        dataset: A dataset built by :func:`composer_effalgos.datasets.build_dataset`. Its ``transform`` is not applied.
        num_workers: Number of decoding processes.

    Yields:
        One list per batch of up to 64 images, in order: an error message with file or row and reason for each broken image.

    Raises:
        InputError: A worker process died, which a broken image can cause; the message gives the range of images.
    """
    tried = _Tried(with_transform(dataset, _nothing) if hasattr(dataset, 'transform') else dataset)
    done = 0
    try:
        for messages in DataLoader(tried, batch_size=PORTION, num_workers=num_workers, collate_fn=list):
            yield [message for message in messages if message is not None]
            done += len(messages)
    except RuntimeError as error:
        if 'DataLoader worker' not in str(error):
            raise
        ahead = done + 2 * num_workers * PORTION  # each worker prefetches two batches
        raise InputError(
            f'a process that decodes died, within images {done} to {min(ahead, len(dataset)) - 1} ({str(error).strip().splitlines()[0]}); '
            '`--workers 0` shows at which'
        ) from error


class _Tried(Dataset[str | None]):
    """Returns the error of an image instead of the image."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str | None:
        try:
            self.dataset[index]
        except InputError as error:
            return str(error)
        return None


def _nothing(image: Any) -> None:
    """Drops the image, so that workers do not send pixels between processes."""
