"""scikit-learn's handwritten digits: real data that needs no download."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torchvision import transforms

from composer_effalgos.datasets.images import MOST_SIDE, ImageArray, check_at_least, limited, small_image_transform

SIZE = 8
EVAL_SAMPLES = 360
# Of the training split
MEAN, STD = (0.305,) * 3, (0.376,) * 3


def digits_transform(
    name: str, split: Literal['train', 'eval'], *, augment: bool = True, image_size: int | None = None
) -> transforms.Compose:
    """The pipeline of :func:`digits`.

    Args:
        name: ``'digits'``.
        split: ``'train'`` or ``'eval'``.
        augment: As for :func:`digits`.
        image_size: Height and width wanted, in pixels; ``None`` for that of the images.

    Returns:
        PIL image to float32 ``[3, image_size, image_size]``.
    """
    return small_image_transform(size=SIZE, image_size=image_size or SIZE, mean=MEAN, std=STD, padding=int(split == 'train' and augment))


def digits(
    split: Literal['train', 'eval'], path: str | None = None, *, augment: bool = True, image_size: int = SIZE, limit: int | None = None
) -> ImageArray:
    """Handwritten digits (Alpaydin and Kaynak 1998, UCI), 8x8 grey pixels repeated on 3 channels, in 10 classes.

    1437 images to train and 360 to evaluate, in a fixed split with equal class shares.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Ignored: the data comes with scikit-learn.
        augment: Shift the training images by up to one of the 8 pixels each way. No flips: a mirrored digit is another sign.
        image_size: Height and width wanted, in pixels; the images are resized.
        limit: Train on this many images, chosen at random, the same ones every time.

    Raises:
        InputError: ``limit`` or ``image_size`` out of range.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_at_least(1, most=MOST_SIDE, image_size=image_size)
    data = load_digits()
    rows = np.arange(len(data.target))
    train_rows, eval_rows = train_test_split(rows, test_size=EVAL_SAMPLES, stratify=data.target, random_state=0)
    train = split == 'train'
    rows = train_rows[limited(len(train_rows), limit).numpy()] if train else eval_rows
    grey = np.round(data.images[rows] * (255 / 16)).astype(np.uint8)  # from 0..16
    return ImageArray(
        np.repeat(grey[..., None], 3, axis=-1),
        torch.as_tensor(data.target[rows], dtype=torch.int64),
        [str(digit) for digit in range(10)],
        digits_transform('digits', split, augment=augment, image_size=image_size),
    )
