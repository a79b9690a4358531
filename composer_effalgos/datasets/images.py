"""What the image datasets share: pixels, decoding, transforms and subsets.

The pipelines are ``transforms.Compose`` lists around ``transforms.ToTensor``, and the datasets are torchvision ``VisionDataset``, because
that is where Composer's RandAugment, AugMix and ColOut look for the place to insert themselves.
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
"""What is decoded. Pillow knows others by the file's first bytes, whatever its name, and starts Ghostscript for EPS."""

MOST_PIXELS = 89_478_485
"""The largest image: 256 MiB of RGB, the size from which Pillow warns. A small file can hold a larger one and fill the memory."""

MOST_SIDE = 8192  # in pixels, of the images that training is given


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
        """An image as it is held: uint8 ``[H, W, 3]``."""
        return self.images[index]


class StoredImages(VisionDataset):
    """Images that lie together in a file or a folder, decoded when they are read; subclasses define :meth:`stored`.

    Args:
        file: Where they lie.
        rows: int64 ``[N]``: the samples in it that belong to the dataset.
        targets: int64 ``[N]``, their labels.
        classes: Class names.
        transform: PIL image to float32 ``[3, H, W]``.
    """

    unit = 'sample'  # what messages call an entry of the file

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
        """An image as it is held: an encoded file's bytes, or uint8 ``[H, W, 3]``."""
        raise NotImplementedError


def decode_image(data: bytes | None, source: str) -> Image.Image:
    """Decode one image.

    Args:
        data: An encoded image, e.g. a PNG or JPEG file's bytes.
        source: Where it comes from; begins the error message.

    Returns:
        An RGB image.

    Raises:
        InputError: Not an image of one of :data:`FORMATS`, a broken one, or one of more than :data:`MOST_PIXELS`.
    """
    with open_image(data, source) as image:
        return image.convert('RGB')


@contextmanager
def open_image(data: bytes | None, source: str) -> Iterator[Image.Image]:
    """Open an image as :func:`decode_image` does; its pixels are decoded when they are used.

    Args:
        data: An encoded image.
        source: Where it comes from; begins the error message.

    Raises:
        InputError: As :func:`decode_image`, whatever fails in the body too.
    """
    if not data:
        raise InputError(f'{source}: no image bytes; expected an encoded image such as a PNG or JPEG file')
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_pixels(image.width, image.height, source)
            yield image
    except InputError:
        raise
    except Exception as error:  # what a codec raises for broken bytes is not specified
        raise InputError(f'{source}: corrupt image ({one_line(error)[:200]}); expected one of {", ".join(FORMATS)}') from error


def check_pixels(width: int, height: int, source: str) -> None:
    """Refuse an image that would take too much memory.

    Raises:
        InputError: It has more than :data:`MOST_PIXELS`.
    """
    if width * height > MOST_PIXELS:
        raise InputError(f'{source}: expected an image of at most {MOST_PIXELS} pixels, got {width}x{height}; scale it down first')


class Cutout(torch.nn.Module):
    """Blanks a square of an image around a point drawn anywhere in it, so part of the square may lie outside.

    DeVries and Taylor 2017, arXiv 1708.04552. Composer's algorithm of this name draws one square a batch; this one, one an image.

    Args:
        size: Side of the square, in pixels.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, image: Tensor) -> Tensor:
        """Blanks a square.

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
    """The pipeline for small images of one size: random shift, horizontal flip, resize, normalise, cut out.

    Args:
        size: Height and width of the images, in pixels.
        image_size: Height and width wanted; another one than ``size`` resizes (bilinear, anti-aliased).
        mean: Channel means, of pixels in [0, 1].
        std: Channel standard deviations.
        padding: The image is padded by this many pixels on each side and cropped back at random; 0 for none.
        padding_mode: What is padded, ``'constant'`` (black) or ``'reflect'``.
        flip: Flip half of the images left to right.
        cutout: Side of the square to blank, in pixels of the final image; 0 for none.

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


def large_image_transform(split: Literal['train', 'eval'], *, image_size: int, augment: bool) -> transforms.Compose:
    """The usual ImageNet pipeline: random resized crop and flip to train, resize and centre crop (ratio 256/224) otherwise.

    Args:
        split: ``'train'`` or ``'eval'``.
        image_size: Height and width wanted, in pixels.
        augment: False trains on the centre crop as well.

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
    """The same dataset with another transform; the one given stays as it is.

    Args:
        dataset: A dataset with an attribute ``transform``, or a ``Subset`` of one.
        transform: The new one.
    """
    same = copy.copy(dataset)
    if isinstance(dataset, Subset):
        same.dataset = with_transform(dataset.dataset, transform)
    else:
        same.transform = transform
    return same


def limited(count: int, limit: int | None) -> Tensor:
    """Choose ``limit`` of ``count`` samples at random, the same ones every time; a smaller limit chooses among those of a larger one.

    Args:
        count: Samples there are.
        limit: Samples wanted, or None for all.

    Returns:
        int64 ``[limit]`` indices in rising order.

    Raises:
        InputError: Fewer than one wanted, or more than there are.
    """
    if limit is None:
        return torch.arange(count)
    check_number('dataset.limit', limit, least=1, most=count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit].sort().values


def data_folder(name: str, path: str | None, contents: str) -> Path:
    """The folder of a dataset.

    Args:
        name: Name of the dataset, for the message.
        path: The folder.
        contents: What is expected in it, for the message.

    Raises:
        InputError: No path, no such folder, or an empty one.
    """
    if path is None:
        raise InputError(f'dataset.path: expected a folder with {contents} for {name}, got none')
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f'dataset.path: expected a folder with {contents} for {name}, got {path}, which is no folder')
    if not any(folder.iterdir()):
        raise InputError(f'dataset.path: expected a folder with {contents} for {name}, got {path}, which is empty')
    return folder


def check_at_least(minimum: float, *, most: float = math.inf, **options: float | None) -> None:
    """Range checks for numeric options; None passes.

    Raises:
        InputError: One is below ``minimum`` or above ``most``; the message names it.
    """
    for key, value in options.items():
        if value is not None:
            check_number(f'dataset.{key}', value, least=minimum, most=most)
