"""Reading encoded images and labels from Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from composer_effalgos.utils.checks import MOST_CLASSES
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean, one_line


def read_images(file: Path, column: str) -> pa.ChunkedArray:
    """Read a column of encoded images without decoding them.

    Args:
        file: A Parquet file.
        column: A binary column, or a struct with a binary field ``bytes`` as written by Hugging Face datasets.

    Returns:
        The encoded images, one per row.

    Raises:
        InputError: The file or column is missing, or the column has another type.
    """
    images = _read_column(file, column)
    if pa.types.is_struct(images.type) and images.type.get_field_index('bytes') >= 0:
        images = pc.struct_field(images, 'bytes')
    if not (pa.types.is_binary(images.type) or pa.types.is_large_binary(images.type)):
        raise InputError(
            f'{file}: column {column!r} has type {images.type}; expected encoded images: binary, or a struct with binary `bytes`'
        )
    return images


def read_labels(file: Path, column: str, num_classes: int | None) -> Tensor:
    """Read a column of labels.

    Args:
        file: A Parquet file.
        column: An integer column.
        num_classes: Upper bound (exclusive) on labels; ``None`` for :data:`MOST_CLASSES`.

    Returns:
        int64 ``[N]``.

    Raises:
        InputError: The file or column is missing, the column is empty or has another type, or a label is null or out of range (the message
            names the row).
    """
    labels = _read_column(file, column)
    if not pa.types.is_integer(labels.type):
        raise InputError(f'{file}: column {column!r} has type {labels.type}; expected integer class indices')
    if len(labels) == 0:
        raise InputError(f'{file}: has no rows; expected at least one image')
    if labels.null_count:
        row = labels.is_null().to_pylist().index(True)
        raise InputError(f'{file}: row {row}: {column!r} is missing; expected a class index')
    targets = torch.tensor(labels.to_numpy().astype('int64'))  # a uint64 label that overflows becomes negative and fails the check
    check_labels(targets, num_classes, str(file))
    return targets


def check_labels(targets: Tensor, num_classes: int | None, source: str) -> None:
    """Check labels against the number of classes.

    Args:
        targets: int64 ``[N]``.
        num_classes: Upper bound (exclusive) on labels; ``None`` for :data:`MOST_CLASSES`.
        source: Where the labels come from; starts the error message.

    Raises:
        InputError: A label is out of range; the message names the first such row.
    """
    most = MOST_CLASSES if num_classes is None else num_classes
    wrong = (targets < 0) | (targets >= most)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise InputError(f'{source}: row {row}: label {int(targets[row])}; expected a class index from 0 to {most - 1}')


def read_class_names(file: Path, label_column: str) -> list[str] | None:
    """Read the class names from a file's schema metadata.

    They are under the key ``classes`` (comma-separated) or in the description that Hugging Face datasets write for a ``ClassLabel``.

    Returns:
        The class names; ``None`` if the metadata has none.

    Raises:
        InputError: The file is missing or unreadable.
    """
    with _reading(file, 'metadata of its schema'):
        metadata = _open(file).schema_arrow.metadata or {}
        if b'classes' in metadata:
            return metadata[b'classes'].decode().split(',')
        value: Any = json.loads(metadata.get(b'huggingface', b'{}'))
    for key in ('info', 'features', label_column, 'names'):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, list) and value and all(isinstance(name, str) for name in value) else None


@contextmanager
def _reading(file: Path, what: str) -> Iterator[None]:
    """Turn any exception into a one-line ``InputError``, because damaged bytes can make Arrow raise anything."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f'{file}: {what} cannot be read ({one_line(error)[:200]}); expected a whole Parquet file') from error


def _open(file: Path) -> pq.ParquetFile:
    if not file.is_file():  # opening a FIFO would block
        raise InputError(f'{file}: no such file; expected a Parquet file of images and labels')
    try:
        return pq.ParquetFile(file)
    except Exception as error:
        raise InputError(f'{file}: not a readable Parquet file ({one_line(error)[:200]})') from error


def _read_column(file: Path, column: str) -> pa.ChunkedArray:
    with _reading(file, f'column {column!r}'):
        opened = _open(file)
        names = opened.schema_arrow.names
        if names.count(column) != 1:
            raise InputError(f'{file}: no column {column!r}; {did_you_mean(column, names)}')
        needed, free = 8 * opened.metadata.num_rows, psutil.virtual_memory().available
        if needed > free:
            raise InputError(
                f'{file}: claims {opened.metadata.num_rows} rows, more than {free / 1e9:.1f} GB of memory hold; split the file'
            )
        values = opened.read(columns=[column]).column(0)
        values.validate(full=True)
        return values
