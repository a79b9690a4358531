"""Reading encoded images and labels from Parquet files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from composer_effalgos.components import did_you_mean
from composer_effalgos.errors import InputError


def read_images(file: Path, column: str) -> pa.ChunkedArray:
    """Read a column of encoded images without decoding them.

    Args:
        file: A Parquet file.
        column: A binary column, or a struct with a binary field ``bytes`` as Hugging Face's data sets write it.

    Returns:
        The encoded images, one a row.

    Raises:
        InputError: No such file or column, or a column of another type.
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
        num_classes: Labels must be below it; None checks for negative ones alone.

    Returns:
        int64 ``[N]``.

    Raises:
        InputError: No such file or column, a column of another type, no rows, a missing label or one out of range (names the row).
    """
    labels = _read_column(file, column)
    if not pa.types.is_integer(labels.type):
        raise InputError(f'{file}: column {column!r} has type {labels.type}; expected integer class indices')
    if len(labels) == 0:
        raise InputError(f'{file}: has no rows; expected at least one image')
    if labels.null_count:
        row = labels.is_null().to_pylist().index(True)
        raise InputError(f'{file}: row {row}: {column!r} is missing; expected a class index')
    targets = torch.tensor(labels.to_numpy().astype('int64'))
    check_labels(targets, num_classes, str(file))
    return targets


def check_labels(targets: Tensor, num_classes: int | None, source: str) -> None:
    """Hold labels against the number of classes.

    Args:
        targets: int64 ``[N]``.
        num_classes: Labels must be below it; None checks for negative ones alone.
        source: Where the labels come from; begins the error message.

    Raises:
        InputError: A label is out of range; the message names the first such row.
    """
    wrong = targets < 0 if num_classes is None else (targets < 0) | (targets >= num_classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        right = 'no negative class index' if num_classes is None else f'a class index from 0 to {num_classes - 1}'
        raise InputError(f'{source}: row {row}: label {int(targets[row])}; expected {right}')


def read_class_names(file: Path, label_column: str) -> list[str] | None:
    """Find the class names in the metadata of a file's schema.

    They are under the key ``classes`` (names with commas between), or in the description that Hugging Face's data sets write for a
    ``ClassLabel`` column.

    Args:
        file: A Parquet file.
        label_column: Name of the label column.

    Returns:
        The names, or None where there are none.

    Raises:
        InputError: No such file.
    """
    metadata = {key.decode(): value.decode() for key, value in (_open(file).schema_arrow.metadata or {}).items()}
    if 'classes' in metadata:
        return metadata['classes'].split(',')
    return _hugging_face_names(metadata.get('huggingface', '{}'), label_column)


def _hugging_face_names(text: str, label_column: str) -> list[str] | None:
    value: Any = json.loads(text)
    for key in ('info', 'features', label_column, 'names'):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, list) and value else None


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except FileNotFoundError:
        raise InputError(f'{file}: no such file; expected a Parquet file of images and labels') from None
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f'{file}: not a readable Parquet file ({" ".join(str(error).split())})') from error


def _read_column(file: Path, column: str) -> pa.ChunkedArray:
    opened = _open(file)
    names = opened.schema_arrow.names
    if column not in names:
        raise InputError(f'{file}: no column {column!r}; {did_you_mean(column, names)}')
    try:
        return opened.read(columns=[column]).column(0)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f'{file}: column {column!r} cannot be read ({" ".join(str(error).split())})') from error
