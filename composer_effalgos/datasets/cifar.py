"""CIFAR-10 and CIFAR-100 in memory, from torchvision's files or from Parquet."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision import transforms

from composer_effalgos.datasets.altered import long_tail, noisy_labels
from composer_effalgos.datasets.images import (
    MOST_SIDE,
    ImageArray,
    Pixels,
    check_at_least,
    data_folder,
    decode_image,
    limited,
    small_image_transform,
)
from composer_effalgos.datasets.parquet import read_class_names, read_images, read_labels
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import one_line

SIZE = 32
MOST_IMBALANCE = 1e6


@dataclass(frozen=True)
class _Cifar:
    name: str
    source: type[torchvision.datasets.CIFAR10]
    num_classes: int
    # Channel statistics of the training images
    mean: Pixels
    std: Pixels


_CIFAR10 = _Cifar('cifar10', torchvision.datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100 = _Cifar('cifar100', torchvision.datasets.CIFAR100, 100, (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762))


def cifar_transform(
    name: str, split: Literal['train', 'eval'], *, augment: bool = True, image_size: int | None = None, cutout: int = 0
) -> transforms.Compose:
    """The pipeline of :func:`cifar`; without ``image_size`` images keep their size.

    Returns:
        PIL image to float32 ``[3, image_size, image_size]``.
    """
    kind = {'cifar10': _CIFAR10, 'cifar100': _CIFAR100}[name]
    randomly = split == 'train' and augment
    return small_image_transform(
        size=SIZE,
        image_size=image_size or SIZE,
        mean=kind.mean,
        std=kind.std,
        padding=4 if randomly else 0,
        padding_mode='reflect',
        flip=randomly,
        cutout=cutout if randomly else 0,
    )


@dataclass(frozen=True)
class _Altered:
    """Changes to the training set, applied in this order: limit, class imbalance, label noise."""

    limit: int | None = None
    label_noise: float = 0.0
    imbalance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(0, most=1, label_noise=self.label_noise)
        check_at_least(1, most=MOST_IMBALANCE, imbalance=self.imbalance)
        check_at_least(0, label_seed=self.seed)

    def rows(self, targets: Tensor, num_classes: int) -> Tensor:
        """Indices of the samples to keep."""
        rows = limited(len(targets), self.limit)
        return rows if self.imbalance == 1 else rows[long_tail(targets[rows], num_classes, self.imbalance, self.seed)]

    def labels(self, targets: Tensor, num_classes: int) -> Tensor:
        """Labels of the kept samples, with label noise."""
        return noisy_labels(targets, num_classes, self.label_noise, self.seed) if self.label_noise else targets


def cifar(
    kind: _Cifar,
    split: Literal['train', 'eval'],
    path: str | None,
    *,
    augment: bool = True,
    image_size: int = SIZE,
    limit: int | None = None,
    download: bool = False,
    cutout: int = 0,
    label_noise: float = 0.0,
    imbalance: float = 1.0,
    label_seed: int = 0,
) -> ImageArray:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 images of 32x32 pixels in 10 or 100 classes.

    Args:
        kind: Which of the two.
        split: ``'train'`` or ``'eval'``.
        path: A folder with ``train.parquet`` and ``test.parquet`` (columns ``image``, encoded, and ``label``), or the torchvision folder
            that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        augment: Random crop of the training images after reflection padding by 4 pixels, and horizontal flip with probability 0.5.
        image_size: Output height and width in pixels; the images are resized.
        limit: Train on a random subset of this size, which is the same in every run; with Parquet, only these images are decoded.
        download: Let torchvision download missing files to ``path``. If several processes share ``path``, build in one of them first.
        cutout: Side in pixels of a square blanked in each training image (DeVries and Taylor 2017 use 16); 0 for none. Applied only with
            ``augment``.
        label_noise: Exact fraction of the training labels to replace with another class, drawn uniformly.
        imbalance: Size of the first class divided by the size of the last in the training set; class sizes decay exponentially.
        label_seed: Seed for the label noise and for the samples kept under ``imbalance``.

    Raises:
        InputError: The data is missing, corrupt or mislabelled, or an option is out of range.
    """
    altered = _Altered(limit, label_noise, imbalance, label_seed)  # checks the options of both splits
    check_at_least(1, most=MOST_SIDE, image_size=image_size)
    check_at_least(0, most=MOST_SIDE, cutout=cutout)
    train = split == 'train'
    altered = altered if train else _Altered()
    files = {name: Path(path or '', f'{name}.parquet').expanduser() for name in ('train', 'test')}
    if path is not None and all(file.is_file() for file in files.values()):
        images, targets, classes = _from_parquet(kind, files['train'], files['train' if train else 'test'], altered)
    else:
        images, targets, classes = _from_torchvision(kind, path, train, altered, download)
    targets = altered.labels(targets, kind.num_classes)
    transform = cifar_transform(kind.name, split, augment=augment, image_size=image_size, cutout=cutout)
    return ImageArray(images, targets, classes, transform)


cifar10 = functools.partial(cifar, _CIFAR10)
cifar100 = functools.partial(cifar, _CIFAR100)


def _from_parquet(kind: _Cifar, train_file: Path, file: Path, altered: _Altered) -> tuple[np.ndarray, Tensor, list[str]]:
    classes = read_class_names(train_file, 'label') or [str(index) for index in range(kind.num_classes)]
    if len(classes) != kind.num_classes:
        raise InputError(f'{train_file}: its schema names {len(classes)} classes; expected {kind.num_classes} for {kind.name}')
    targets = read_labels(file, 'label', kind.num_classes)
    encoded = read_images(file, 'image')
    rows = altered.rows(targets, kind.num_classes)
    images = np.empty((len(rows), SIZE, SIZE, 3), np.uint8)
    for image, row in zip(images, rows.tolist(), strict=True):
        decoded = decode_image(encoded[row].as_py(), f'{file}: row {row}')
        if decoded.size != (SIZE, SIZE):
            raise InputError(f'{file}: row {row}: image of {decoded.width}x{decoded.height} pixels; expected {SIZE}x{SIZE}')
        image[:] = np.asarray(decoded)
    return images, targets[rows], classes


def _from_torchvision(
    kind: _Cifar, path: str | None, train: bool, altered: _Altered, download: bool
) -> tuple[np.ndarray, Tensor, list[str]]:
    contents = f'train.parquet and test.parquet, or with {kind.source.base_folder} (torchvision; `download: true` fetches it)'
    if not (download and path is not None):
        data_folder(kind.name, path, contents)
    try:
        data = kind.source(path, train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise InputError(f'dataset.path: expected a folder with {contents} for {kind.name}, got {path} ({one_line(error)})') from error
    targets = torch.tensor(data.targets)
    rows = altered.rows(targets, kind.num_classes)
    return data.data[rows.numpy()], targets[rows], list(data.classes)
