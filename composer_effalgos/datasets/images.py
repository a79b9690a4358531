"""Shared code of the image datasets: storage, decoding, transforms and subsets.

The pipelines are ``transforms.Compose`` lists around ``transforms.ToTensor``, and the datasets are torchvision ``VisionDataset``, because
Composer's RandAugment, AugMix and ColOut only insert themselves there.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import VisionDataset
from torchvision.transforms import v2

from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import one_line

Pixels = tuple[float, float, float]

IMAGENET_MEAN: Pixels = (0.485, 0.456, 0.406)
IMAGENET_STD: Pixels = (0.229, 0.224, 0.225)

FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')
"""The formats that are decoded. Pillow detects formats by content, not by file name, and would run Ghostscript for EPS."""

MOST_PIXELS = 89_478_485
"""The largest image allowed: 256 MiB of RGB, where Pillow starts to warn. A small file can decode to a larger image and fill memory."""

MOST_SIDE = 8192  # pixels; the largest side of a training image


class ImageArray(VisionDataset):
    """Decoded images in memory.

    Args:
        images: uint8 ``[N, H, W, 3]``.
        targets: int64 ``[N]``, in ``[0, len(classes))``.
        classes: Class names.
        transform: PIL image to float32 ``[3, H, W]``.
    """

    def __init__(self, images: np.ndarray, targets: Tensor, classes: Sequence[str], transform: Callable[[Image.Image], Tensor]) -> None:
        super().__init__(transform=transform)
        self.images = images
        self.targets = targets
        self.classes = list(classes)
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])

    def stored(self, index: int) -> np.ndarray:
        """The stored form of an image: uint8 ``[H, W, 3]``."""
        return self.images[index]


class StoredImages(VisionDataset):
    """Images in one file or folder, decoded on access. Subclasses implement :meth:`stored`.

    Args:
        file: The file or folder.
        rows: Rows of the file that belong to the dataset, int64 ``[N]``.
        targets: Labels of these rows, int64 ``[N]``.
        classes: Class names.
        transform: PIL image to float32 ``[3, H, W]``.
    """

    unit = 'sample'  # what error messages call an entry of the file

    def __init__(
        self, file: Path, rows: Tensor, targets: Tensor, classes: Sequence[str], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        super().__init__(transform=transform)
        self.file = file
        self.rows = rows
        self.targets = targets
        self.classes = list(classes)
        self.num_classes = len(self.classes)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.stored(index)
        if isinstance(image, np.ndarray):
            return self.transform(Image.fromarray(image)), int(self.targets[index])
        return self.transform(decode_image(image, f'{self.file}: {self.unit} {int(self.rows[index])}')), int(self.targets[index])

    def stored(self, index: int) -> bytes | np.ndarray:
        """The stored form of an image: encoded bytes, or uint8 ``[H, W, 3]``."""
        raise NotImplementedError


def decode_image(data: bytes | None, source: str) -> Image.Image:
    """Decode one image.

    Returns:
        An RGB image.

    Raises:
        InputError: The data is not one of :data:`FORMATS`, is corrupt, has more than :data:`MOST_PIXELS`, or is one channel of more than 8
            bits.
    """
    with open_image(data, source) as image:
        return image.convert('RGB')


@contextmanager
def open_image(data: bytes | None, source: str) -> Iterator[Image.Image]:
    """Open an image lazily: its pixels are decoded when they are used.

    Raises:
        InputError: As :func:`decode_image`, and for any exception in the body of the ``with`` statement.
    """
    if not data:
        raise InputError(f'{source}: no image bytes; expected an encoded image such as a PNG or JPEG file')
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_pixels(image.width, image.height, source)
            check_depth(image.mode, source)
            yield image
    except InputError:
        raise
    except Exception as error:  # codecs can raise anything for broken bytes
        raise InputError(f'{source}: corrupt image ({one_line(error)[:200]}); expected one of {", ".join(FORMATS)}') from error


def check_pixels(width: int, height: int, source: str) -> None:
    """Reject an image that would take too much memory.

    Raises:
        InputError: The image has more than :data:`MOST_PIXELS`.
    """
    if width * height > MOST_PIXELS:
        raise InputError(f'{source}: expected an image of at most {MOST_PIXELS} pixels, got {width}x{height}; scale it down first')


def check_depth(mode: str, source: str) -> None:
    """Reject Pillow's modes of 16 and 32 bits, whose values above 255 it clips in the conversion to RGB.

    Raises:
        InputError: The mode is F, I, or I;16 in any byte order.
    """
    if mode == 'F' or mode.startswith('I'):
        raise InputError(f'{source}: expected 8 bits per channel, got an image of mode {mode}; convert it first')


class Cutout(torch.nn.Module):
    """Blanks a square centred on a random point of the image; part of the square may lie outside the image.

    DeVries and Taylor 2017, arXiv 1708.04552. Composer's CutOut draws one square per batch; this transform draws one per image.

    Args:
        size: Side of the square in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        """Blank a random square.

        Args:
            image: float32 ``[C, H, W]``, normalised, so that 0 is the mean.
        """
        height, width = image.shape[-2:]
        top, left = (int(torch.randint(length, ())) - self.size // 2 for length in (height, width))
        image = image.clone()
        image[..., max(top, 0) : max(top + self.size, 0), max(left, 0) : max(left + self.size, 0)] = 0
        return image

    def __repr__(self) -> str:
        return f'Cutout(size={self.size})'


def small_image_transform(
    *,
    size: int,
    image_size: int,
    mean: Pixels,
    std: Pixels,
    padding: int = 0,
    padding_mode: str = 'constant',
    flip: bool = False,
    cutout: int = 0,
) -> transforms.Compose:
    """The pipeline for small images of one size: random crop, horizontal flip, resize, normalise, cutout.

    Args:
        size: Height and width of the images in pixels.
        image_size: Output height and width in pixels; resized (bilinear, anti-aliased) if different from ``size``.
        mean: Channel means of pixels in [0, 1].
        std: Channel standard deviations of pixels in [0, 1].
        padding: Pixels of padding on each side before a random crop back to ``size``; 0 for no crop.
        padding_mode: ``'constant'`` (black) or ``'reflect'``.
        flip: Flip horizontally with probability 0.5.
        cutout: Side of the square to blank, in pixels of the output image; 0 for none.

    Returns:
        PIL image to float32 ``[3, image_size, image_size]``.
    """
    steps: list[Any] = []
    if padding:
        steps.append(v2.RandomCrop(size, padding=padding, padding_mode=padding_mode))
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if image_size != size:
        steps.append(v2.Resize((image_size, image_size)))
    steps += [transforms.ToTensor(), v2.Normalize(mean, std)]
    return transforms.Compose([*steps, Cutout(cutout)] if cutout else steps)


def one_size_transform(split: Literal['train', 'eval'], *, image_size: int, padding: int, augment: bool) -> transforms.Compose:
    """The pipeline for folders of images of one size: resize, then for training a padded random crop and flip.

    Args:
        split: ``'train'`` or ``'eval'``.
        image_size: Output height and width in pixels.
        padding: Reflected pixels on each side before the random crop.
        augment: Augment the training images.

    Returns:
        PIL image to float32 ``[3, image_size, image_size]``, normalised by ImageNet's mean and standard deviation.
    """
    randomly = split == 'train' and augment
    transform = small_image_transform(
        size=image_size,
        image_size=image_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        padding=padding if randomly else 0,
        padding_mode='reflect',
        flip=randomly,
    )
    transform.transforms.insert(0, v2.Resize((image_size, image_size)))
    return transform


def large_image_transform(split: Literal['train', 'eval'], *, image_size: int, augment: bool) -> transforms.Compose:
    """The usual ImageNet pipeline: random resized crop and flip for training, resize and centre crop (ratio 256/224) otherwise.

    Args:
        split: ``'train'`` or ``'eval'``.
        image_size: Output height and width in pixels.
        augment: Augment the training images; if false, they get the centre crop too.

    Returns:
        PIL image to float32 ``[3, image_size, image_size]``, normalised by ImageNet's mean and standard deviation.
    """
    steps: list[Any] = (
        [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
        if split == 'train' and augment
        else [v2.Resize(round(image_size * 256 / 224)), v2.CenterCrop(image_size)]
    )
    return transforms.Compose([*steps, transforms.ToTensor(), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def with_transform(dataset: Any, transform: Callable[[Any], Any]) -> Any:
    """Return a shallow copy of a dataset with another transform."""
    same = copy.copy(dataset)
    if isinstance(dataset, Subset):
        same.dataset = with_transform(dataset.dataset, transform)
    else:
        same.transform = transform
    return same


def limited(count: int, limit: int | None) -> Tensor:
    """Choose ``limit`` of ``count`` samples at random with a fixed seed. A smaller limit chooses a subset of a larger one.

    Args:
        count: Number of samples.
        limit: Number of samples to choose; ``None`` for all.

    Returns:
        int64 ``[limit]`` indices in ascending order.

    Raises:
        InputError: ``limit`` is below 1 or above ``count``.
    """
    if limit is None:
        return torch.arange(count)
    check_number('dataset.limit', limit, least=1, most=count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit].sort().values


def data_folder(name: str, path: str | None, contents: str) -> Path:
    """Check the folder of a dataset.

    Returns:
        The folder, with ``~`` expanded.

    Raises:
        InputError: ``path`` is ``None``, or the folder is missing or empty.
    """
    if path is None:
        raise InputError(f'dataset.path: expected a folder with {contents} for {name}, got none')
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f'dataset.path: expected a folder with {contents} for {name}, got {path}, which is not a folder')
    if not any(folder.iterdir()):
        raise InputError(f'dataset.path: expected a folder with {contents} for {name}, got {path}, which is empty')
    return folder


def check_at_least(minimum: float, *, most: float = math.inf, **options: float | None) -> None:
    """Check the range of numeric options; ``None`` passes.

    Raises:
        InputError: An option is below ``minimum`` or above ``most``; the message names it.
    """
    for key, value in options.items():
        if value is not None:
            check_number(f'dataset.{key}', value, least=minimum, most=most)
