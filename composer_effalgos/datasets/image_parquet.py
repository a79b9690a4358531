"""Encoded images and labels in two Parquet files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pyarrow as pa
from PIL import Image
from torch import Tensor

from composer_effalgos.datasets.images import MOST_SIDE, StoredImages, check_at_least, data_folder, large_image_transform, limited
from composer_effalgos.datasets.parquet import read_class_names, read_images, read_labels
from composer_effalgos.utils.errors import InputError


class ParquetImages(StoredImages):
    """Encoded images held in memory, decoded on access.

    Args:
        file: The Parquet file, for messages.
        images: Encoded images, one per row of the file.
        rows: Rows that belong to the dataset, int64 ``[N]``.
        targets: Labels of these rows, int64 ``[N]``.
        classes: Class names.
        transform: PIL image to float32 ``[3, H, W]``.
        image_column: Column of the images.
    """

    unit = 'row'

    def __init__(
        self,
        file: Path,
        images: pa.ChunkedArray,
        rows: Tensor,
        targets: Tensor,
        classes: Sequence[str],
        transform: Callable[[Image.Image], Tensor],
        image_column: str,
    ) -> None:
        super().__init__(file, rows, targets, classes, transform)
        self.images, self.image_column = images, image_column

    def stored(self, index: int) -> bytes:
        """The encoded bytes of an image."""
        return self.images[int(self.rows[index])].as_py()


def image_parquet(
    split: Literal['train', 'eval'],
    path: str | None,
    *,
    augment: bool = True,
    image_size: int = 224,
    limit: int | None = None,
    image_column: str = 'image',
    label_column: str = 'label',
) -> ParquetImages:
    """Images of any size in ``path/train.parquet`` and ``path/test.parquet`` (or ``val.parquet``).

    The encoded images are held in memory and decoded on access.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Folder of the files. Class names are read from the schema metadata of ``train.parquet`` if present: the key ``classes``
            (comma-separated) or Hugging Face's description. Otherwise the classes are 0 to its largest label.
        augment: Random resized crop and flip of the training images; otherwise the centre crop used in evaluation.
        image_size: Height and width of the crop in pixels.
        limit: Train on a random subset of this size, which is the same in every run.
        image_column: Column of encoded images: binary, or a struct with a binary field ``bytes`` as written by Hugging Face datasets.
        label_column: Column of labels: integers from 0.

    Raises:
        InputError: A file or column is missing, or a label or option is out of range; on access, an image is corrupt.
    """
    check_at_least(1, most=MOST_SIDE, image_size=image_size)
    folder = data_folder('image_parquet', path, 'train.parquet and test.parquet (or val.parquet)')
    train_file = folder / 'train.parquet'
    names = read_class_names(train_file, label_column)
    classes = names or [str(index) for index in range(int(read_labels(train_file, label_column, None).max()) + 1)]
    file, limit = (train_file, limit) if split == 'train' else (_eval_file(folder), None)
    targets = read_labels(file, label_column, len(classes))
    rows = limited(len(targets), limit)
    transform = large_image_transform(split, image_size=image_size, augment=augment)
    return ParquetImages(file, read_images(file, image_column), rows, targets[rows], classes, transform, image_column)


def _eval_file(folder: Path) -> Path:
    for name in ('test.parquet', 'val.parquet'):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f'dataset.path: expected test.parquet or val.parquet beside train.parquet, got {folder} without them')
