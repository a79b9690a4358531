"""Subset files: Parquet with the columns ``index`` and ``weight``, and metadata that identifies the dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from composer_effalgos.plan import class_labels
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.digest import labels_digest
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import whole_file

if TYPE_CHECKING:
    import pyarrow as pa

_KEY = b'composer_effalgos.subset'

_HEAVIEST = 3.4e38  # about the largest float32


@dataclass(frozen=True)
class SubsetFile:
    """The content of a subset file.

    Attributes:
        indices: Sample indices, int64 ``[k]``, ascending.
        weights: Their loss weights, float32 ``[k]``.
        facts: Metadata: ``num_samples`` and ``labels`` (a digest) of the dataset, and what the writer added.
    """

    indices: Tensor
    weights: Tensor
    facts: Mapping[str, Any]


def _fingerprint(dataset: Dataset[Any]) -> str | None:
    """Returns a digest of a dataset's labels; ``None`` if it has none."""
    labels = class_labels(dataset)
    return None if labels is None else labels_digest(labels)[:16]


def write_subset(path: Path, indices: Tensor, weights: Tensor, *, dataset: Dataset[Any], facts: Mapping[str, Any]) -> None:
    """Writes a subset atomically.

    Args:
        path: The file; an existing one is replaced.
        indices: Sample indices, int64 ``[k]``.
        weights: Their loss weights, float32 ``[k]``.
        dataset: The dataset that the indices refer to.
        facts: Additional metadata, serialisable as JSON.

    Raises:
        InputError: The file cannot be written.
    """
    pa, pq = _parquet()
    order = indices.argsort()
    table = pa.table({'index': indices[order].numpy(), 'weight': weights[order].numpy().astype(np.float32)})
    known = {**facts, 'num_samples': len(dataset), 'labels': _fingerprint(dataset)}  # type: ignore[arg-type]
    try:
        with whole_file(path) as unfinished:
            pq.write_table(table.replace_schema_metadata({_KEY: json.dumps(known)}), unfinished)
    except OSError as error:
        raise InputError(
            f'{path}: expected a path in a folder that exists, got one that cannot be written ({error.strerror or error})'
        ) from error


def read_subset(path: Path) -> SubsetFile:
    """Reads a subset.

    Args:
        path: A Parquet file with a column ``index`` and, unless all weights are one, a column ``weight``.

    Returns:
        The subset, with ascending indices.

    Raises:
        InputError: The file is missing or not Parquet, a column is missing or has another type, an index is repeated or negative, a weight
            is negative or not finite, all weights are zero, or the metadata is damaged.
    """
    _, pq = _parquet()
    if not path.is_file():  # reading a FIFO would block
        raise InputError(f'path: {path}: no such file; effalgos select writes one')
    try:
        table = pq.ParquetFile(path).read()
        table.validate(full=True)
        names = table.column_names
    except Exception as error:  # pyarrow does not specify what damaged files raise
        raise InputError(f'path: {path}: not a readable Parquet file ({" ".join(str(error).split())[:200]})') from error
    index = _column(path, table, 'index', 'whole numbers').astype(np.int64)
    if len(index) == 0:
        raise InputError(f'path: {path}: expected at least one sample, got no rows')
    if index.min() < 0:
        raise InputError(f'path: {path}: row {int(index.argmin())}: expected a sample number from 0, got index {index.min()}')
    values, counts = np.unique(index, return_counts=True)
    if counts.max() > 1:
        raise InputError(f'path: {path}: expected every sample once, got index {values[counts.argmax()]} {counts.max()} times')
    weight = np.ones(len(index), np.float32)
    if 'weight' in names:
        weight = _column(path, table, 'weight', 'numbers').astype(np.float64)
    wrong = ~((weight >= 0) & (weight <= _HEAVIEST))
    if wrong.any():
        check_number(f'path: {path}: row {int(wrong.argmax())}: weight', float(weight[wrong][0]), least=0, most=_HEAVIEST)
    weight = weight.astype(np.float32)
    if not weight.any():
        raise InputError(f'path: {path}: expected at least one weight above 0, got zeros alone')
    order = index.argsort()
    try:
        facts = json.loads((table.schema.metadata or {}).get(_KEY, b'{}'))
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise InputError(
            f'path: {path}: expected {_KEY.decode()} in its metadata as effalgos select writes it, or none, got something else'
        )
    return SubsetFile(torch.from_numpy(index[order]), torch.from_numpy(weight[order]), facts)


def check_subset(path: Path, subset: SubsetFile, dataset: Dataset[Any]) -> None:
    """Rejects a subset of another dataset.

    Raises:
        InputError: It was written for a dataset of another size or with other labels, or has an index out of range.
    """
    size = len(dataset)  # type: ignore[arg-type]
    written_for = subset.facts.get('num_samples', size)
    if written_for != size:
        raise InputError(f'path: {path}: is a subset of {written_for} samples, and this dataset has {size}; select from this one')
    if int(subset.indices[-1]) >= size:
        raise InputError(f'path: {path}: expected 0 to {size - 1}, the samples of this dataset, got index {int(subset.indices[-1])}')
    labels, ours = subset.facts.get('labels'), _fingerprint(dataset)
    if labels is not None and ours is not None and labels != ours:
        raise InputError(f'path: {path}: is a subset of another dataset: of the same size, but with other labels; select from this one')


def _parquet() -> tuple[Any, Any]:
    """Imports pyarrow lazily: only subset files need it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise InputError("path: expected pyarrow to be installed for subset files; pip install 'composer-effalgos[recipes]'") from error
    return pyarrow, pyarrow.parquet


def _column(path: Path, table: pa.Table, name: str, right: str) -> np.ndarray:
    if name not in table.column_names:
        raise InputError(f'path: {path}: expected columns index and weight, got no column {name!r} (found {", ".join(table.column_names)})')
    column = table.column(name)
    pa, _ = _parquet()
    allowed = pa.types.is_integer(column.type) or (right == 'numbers' and pa.types.is_floating(column.type))
    if column.null_count or not allowed:
        raise InputError(f'path: {path}: column {name!r}: expected {right}, none empty, got {column.type} with {column.null_count} empty')
    return column.to_numpy()
