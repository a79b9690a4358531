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
    """Encoded images in memory, decoded when they are read.

    Args:
        file: The Parquet file, for messages.
        images: Encoded images, one a row of the file.
        rows: int64 ``[N]``, the rows that belong to the dataset.
        targets: int64 ``[N]``, the labels of these rows.
        classes: Class names.
        transform: PIL image to float32 ``[3, H, W]``.
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
    ) -> None:
        super().__init__(file, rows, targets, classes, transform)
        self.images = images

    def stored(self, index: int) -> bytes:
        """An image as it is held: an encoded file's bytes."""
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

    The encoded files are held in memory and decoded when they are read.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: The folder of the files. Class names come from the schema metadata of ``train.parquet``, where they are given: the key
            ``classes`` (names with commas between) or Hugging Face's description. Otherwise the classes are 0 to its largest label.
        augment: Random resized crop and flip of the training images; otherwise the centre crop, as in evaluation.
        image_size: Height and width of the crop, in pixels.
        limit: Train on this many images, chosen at random, the same ones every time.
        image_column: Column of the encoded images: binary, or a struct with binary ``bytes`` as Hugging Face's datasets write it.
        label_column: Column of the labels: integers from 0.

    Raises:
        InputError: Missing files or columns, labels out of range, an option out of range; when an item is read, a corrupt image.
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
    return ParquetImages(file, read_images(file, image_column), rows, targets[rows], classes, transform)


def _eval_file(folder: Path) -> Path:
    for name in ('test.parquet', 'val.parquet'):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f'dataset.path: expected test.parquet or val.parquet beside train.parquet, got {folder} without them')
