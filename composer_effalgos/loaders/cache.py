"""Disk cache of decoded images, so that a dataset is decoded once and not in every run."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor
from torch.utils.data import Subset

from composer_effalgos.datasets.image_parquet import ParquetImages
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import whole_file
from composer_effalgos.utils.text import one_line

_FORMAT = 'decoded images 1'


def identity_of(dataset: Any, *how: str) -> str:
    """Cache key for the decoded images of a dataset.

    Two datasets have the same key only if they hold the same samples in the same order. Files are identified by path, size and modification
    time, arrays by their contents.

    Args:
        dataset: A dataset of image files (with torchvision's attribute ``samples``), of arrays (``data`` or ``images``), of Parquet images,
            a ``Subset`` of one of these, or any dataset with a method ``fingerprint() -> str``.
        *how: Anything else that the images depend on.

    Returns:
        64 hexadecimal digits (SHA-256).

    Raises:
        InputError: The dataset is of another kind, or a file is missing.
    """
    digest = hashlib.sha256()
    for part in (_FORMAT, PIL.__version__, *how, *_parts(dataset)):
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, 'little'))
        digest.update(part)
    return digest.hexdigest()


def _parts(dataset: Any) -> Iterator[str | bytes]:
    yield f'{type(dataset).__qualname__} of {len(dataset)}'
    if callable(getattr(dataset, 'fingerprint', None)):
        yield dataset.fingerprint()
    elif isinstance(dataset, Subset):
        yield np.asarray(dataset.indices).tobytes()
        yield from _parts(dataset.dataset)
    elif getattr(dataset, 'target_transform', None) is not None:
        raise InputError(
            f'cache: the labels of {type(dataset).__name__} cannot be identified, because it has a target_transform; '
            'give the dataset a method fingerprint() -> str, or leave cache out'
        )
    elif isinstance(dataset, ParquetImages):
        yield from (_file(dataset.file), dataset.image_column, dataset.rows.numpy().tobytes(), dataset.targets.numpy().tobytes())
    elif isinstance(getattr(dataset, 'samples', None), list):
        yield from (f'{_file(path)} {label}' for path, label in dataset.samples)
    else:
        pixels = getattr(dataset, 'images', getattr(dataset, 'data', None))
        labels = getattr(dataset, 'targets', getattr(dataset, 'labels', None))
        if not isinstance(pixels, np.ndarray | Tensor) or labels is None:
            raise InputError(
                f'cache: the contents of {type(dataset).__name__} cannot be identified; give it a method fingerprint() -> str, '
                'or leave cache out'
            )
        yield f'{pixels.dtype} {tuple(pixels.shape)}'
        yield np.ascontiguousarray(pixels).tobytes()
        yield np.asarray(labels).tobytes()


def _file(path: str | os.PathLike[str]) -> str:
    try:
        found = Path(path).stat()
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error.strerror})') from error
    return f'{path} {found.st_size} {found.st_mtime_ns}'


def load(folder: Path, identity: str) -> tuple[Tensor, Tensor] | None:
    """Read decoded images written by :func:`save`.

    Returns:
        Images, uint8 ``[N, H, W, 3]``, and labels, int64 ``[N]``. ``None`` if there is no file, or, with a warning, if it is truncated,
        damaged or of another dataset.
    """
    path = _path(folder, identity)
    if not path.exists():
        return None
    try:
        if not path.is_file():
            raise ValueError('it is not a regular file')
        with np.load(path, allow_pickle=False) as found:
            _check_claims(found.zip)
            if str(found['identity']) != identity:
                raise ValueError("it holds another dataset's images")
            images, labels = torch.from_numpy(found['images']), torch.from_numpy(found['labels'])  # reading verifies the zip checksums
        if images.dtype != torch.uint8 or labels.dtype != torch.int64 or images.shape != (*labels.shape, *images.shape[1:3], 3):
            raise ValueError('it holds no images and labels')
    except Exception as error:  # damaged bytes can raise anything
        warnings.warn(f'{path}: not used ({one_line(error)}); the images are decoded again', stacklevel=2)
        return None
    return images, labels


def _check_claims(archive: zipfile.ZipFile) -> None:
    """Check the sizes claimed by the array headers against the file, because numpy allocates them before it reads."""
    for info in archive.infolist():
        with archive.open(info) as member:
            read_header = {(1, 0): np.lib.format.read_array_header_1_0}[np.lib.format.read_magic(member)]  # the version that savez writes
            shape, _, dtype = read_header(member)
        if info.compress_type != zipfile.ZIP_STORED or math.prod(shape) * dtype.itemsize > info.file_size:
            raise ValueError(f'{info.filename} claims {math.prod(shape)} values')


def save(folder: Path, identity: str, images: Tensor, labels: Tensor) -> None:
    """Write decoded images atomically. A failed write is only a warning, because the images are in memory anyway.

    Args:
        folder: The cache folder; created if missing.
        identity: Key of the dataset, from :func:`identity_of`.
        images: uint8 ``[N, H, W, 3]``.
        labels: int64 ``[N]``.
    """
    path = _path(folder, identity)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as unfinished, unfinished.open('wb') as file:
            np.savez(file, identity=np.array(identity), images=images.numpy(), labels=labels.numpy())  # a zip archive, with checksums
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        warnings.warn(f'{path}: not written ({error.strerror}); the images will be decoded again next time', stacklevel=2)


def _path(folder: Path, identity: str) -> Path:
    return folder / f'{identity[:32]}.npz'
