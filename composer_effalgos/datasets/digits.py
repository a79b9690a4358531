"""scikit-learn's handwritten digits: real data without a download."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torchvision import transforms

from composer_effalgos.datasets.images import MOST_SIDE, ImageArray, check_at_least, limited, small_image_transform

SIZE = 8
EVAL_SAMPLES = 360
# Channel statistics of the training split
MEAN, STD = (0.305,) * 3, (0.376,) * 3


def digits_transform(
    name: str, split: Literal['train', 'eval'], *, augment: bool = True, image_size: int | None = None
) -> transforms.Compose:
    """The pipeline of :func:`digits`; without ``image_size`` images keep their size.

    Returns:
        PIL image to float32 ``[3, image_size, image_size]``.
    """
    return small_image_transform(size=SIZE, image_size=image_size or SIZE, mean=MEAN, std=STD, padding=int(split == 'train' and augment))


def digits(
    split: Literal['train', 'eval'], path: str | None = None, *, augment: bool = True, image_size: int = SIZE, limit: int | None = None
) -> ImageArray:
    """Handwritten digits (Alpaydin and Kaynak 1998, UCI): 8x8 greyscale images, repeated on 3 channels, in 10 classes.

    1437 training and 360 evaluation images, in a fixed stratified split.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Ignored; the data ships with scikit-learn.
        augment: Randomly shift the training images by up to one of the 8 pixels in each direction. No flips: a mirrored digit is not a
            digit.
        image_size: Output height and width in pixels; the images are resized.
        limit: Train on a random subset of this size, which is the same in every run.

    Raises:
        InputError: ``limit`` or ``image_size`` is out of range.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_at_least(1, most=MOST_SIDE, image_size=image_size)
    data = load_digits()
    rows = np.arange(len(data.target))
    train_rows, eval_rows = train_test_split(rows, test_size=EVAL_SAMPLES, stratify=data.target, random_state=0)
    train = split == 'train'
    rows = train_rows[limited(len(train_rows), limit).numpy()] if train else eval_rows
    grey = np.round(data.images[rows] * (255 / 16)).astype(np.uint8)  # source values are 0 to 16
    return ImageArray(
        np.repeat(grey[..., None], 3, axis=-1),
        torch.as_tensor(data.target[rows], dtype=torch.int64),
        [str(digit) for digit in range(10)],
        digits_transform('digits', split, augment=augment, image_size=image_size),
    )
