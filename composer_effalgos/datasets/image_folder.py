"""Images in one folder per class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch
import torchvision
from PIL import Image

from composer_effalgos.datasets.images import (
    MOST_SIDE,
    check_at_least,
    data_folder,
    decode_image,
    large_image_transform,
    limited,
    one_size_transform,
)
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_bytes
from composer_effalgos.utils.text import did_you_mean


class ImageFolder(torchvision.datasets.ImageFolder):
    """torchvision's ImageFolder, with ``num_classes`` and errors that name the file.

    Args:
        root: Folder of one split.
        transform: PIL image to float32 ``[3, H, W]``.
        classes: Class names; an unknown folder is an error, a missing one is not. ``None`` uses the folder names.
        limit: Keep a random subset of this size, which is the same in every run.
    """

    samples: list[tuple[str, int]]

    def __init__(
        self, root: Path, transform: torchvision.transforms.Compose, *, classes: list[str] | None = None, limit: int | None = None
    ) -> None:
        self._expected = classes
        try:
            super().__init__(root, transform=transform, loader=_load_image, allow_empty=classes is not None)
        except FileNotFoundError as error:
            raise InputError(f'{root}: {error}; expected one folder of images per class') from error
        if not self.samples:
            raise InputError(f'{root}: no images in its class folders; expected one folder of images per class')
        rows = limited(len(self.samples), limit).tolist()
        self.samples = self.imgs = [self.samples[row] for row in rows]
        self.targets = torch.tensor([label for _, label in self.samples])
        self.num_classes = len(self.classes)

    def stored(self, index: int) -> bytes:
        """The bytes of an image file."""
        return _read_file(self.samples[index][0])

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        classes, class_to_idx = super().find_classes(directory)
        for name in classes:
            _check_links(Path(directory, name))
        if self._expected is None:
            return classes, class_to_idx
        for name in classes:
            if name not in self._expected:
                raise InputError(f'{directory}/{name}: no such class in the training split; {did_you_mean(name, self._expected)}')
        return self._expected, {name: index for index, name in enumerate(self._expected)}


def image_folder(
    split: Literal['train', 'eval'],
    path: str | None,
    *,
    augment: bool = True,
    image_size: int = 224,
    limit: int | None = None,
    padding: int | None = None,
) -> ImageFolder:
    """Images of any size in ``path/train/CLASS/`` and ``path/val/CLASS/``, decoded on access.

    Args:
        split: ``'train'`` or ``'eval'`` (the folder ``val``).
        path: The folder that holds ``train`` and ``val``. The classes are the folders in ``train``, sorted by name.
        augment: Random resized crop and flip of the training images; otherwise the centre crop used in evaluation.
        image_size: Height and width of the crop in pixels.
        limit: Train on a random subset of this size, which is the same in every run.
        padding: For datasets with a single image size, such as Tiny-ImageNet: ``augment`` pads the training images by this many reflected
            pixels, takes a random crop and flips with probability 0.5. Nothing else is cropped; images of another size are resized to
            ``image_size``, ignoring their aspect ratio. Null for the crops above. ``loader: device`` requires a number.

    Raises:
        InputError: A folder is missing or empty, the splits have different class folders, or an option is out of range; on access, an
            image is corrupt.
    """
    check_at_least(1, most=MOST_SIDE, image_size=image_size)
    check_at_least(0, most=MOST_SIDE, padding=padding)
    if padding is not None and padding >= image_size:
        raise InputError(f'dataset.padding: expected less than image_size {image_size}, got {padding}: pixels are reflected once')
    folder = data_folder('image_folder', path, 'train/CLASS/ and val/CLASS/')
    if padding is None:
        transform = large_image_transform(split, image_size=image_size, augment=augment)
    else:
        transform = one_size_transform(split, image_size=image_size, padding=padding, augment=augment)
    data_folder('image_folder', str(folder / 'train'), 'one folder of images per class')
    if split == 'train':
        return ImageFolder(folder / 'train', transform, limit=limit)
    data_folder('image_folder', str(folder / 'val'), 'one folder of images per class')
    classes = sorted(entry.name for entry in (folder / 'train').iterdir() if entry.is_dir())
    return ImageFolder(folder / 'val', transform, classes=classes)


def _check_links(folder: Path) -> None:
    """Reject symbolic links to a parent folder, which torchvision would follow in every combination."""
    with os.scandir(folder) as entries:
        folders = [entry for entry in entries if entry.is_dir()]
    for entry in folders:
        if entry.is_symlink() and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(entry.path)):
            raise InputError(f'{entry.path}: expected no symbolic link to a parent folder; remove it')
        _check_links(Path(entry.path))


def _load_image(path: str) -> Image.Image:
    return decode_image(_read_file(path), path)


def _read_file(path: str) -> bytes:
    try:
        return read_bytes(Path(path), most=2**30)
    except OSError as error:
        raise InputError(f'{path}: cannot be read ({error.strerror})') from error
    except ValueError as error:
        raise InputError(f'{path}: cannot be read ({error})') from error
