"""Seeded synthetic images of any size and number, generated on access."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from composer_effalgos.datasets.images import MOST_SIDE, check_at_least
from composer_effalgos.utils.checks import MOST_CLASSES

GRID = 4
MOST_SAMPLES = 10**8  # a sampler lists all indices, at about 40 bytes each
# Separate random streams for the class patterns and the noise of each split
_STREAMS = {'train': 0, 'eval': 1, 'prototypes': 2}


class Synthetic(Dataset[tuple[Tensor, int]]):
    """One smooth pattern per class plus white noise: ``(pattern[label] + noise * n) / sqrt(1 + noise^2)``.

    Sample ``i`` has label ``i % num_classes`` and is a pure function of the options, the split and ``i``. Memory use does not depend on
    ``num_samples``.

    Args:
        split: ``'train'`` or ``'eval'``. Both have the same patterns, with different noise.
        num_samples: Length of the dataset.
        num_classes: Number of classes.
        image_size: Height and width in pixels.
        seed: Seed for patterns and noise.
        noise: Standard deviation of the noise. The patterns are 4x4 grids of standard deviation 1, upsampled to the image size.
    """

    def __init__(
        self, split: Literal['train', 'eval'], num_samples: int, num_classes: int, image_size: int, seed: int, noise: float
    ) -> None:
        self.num_samples = num_samples
        self.num_classes = num_classes
        self.classes = [str(index) for index in range(num_classes)]
        self.image_size = image_size
        self.noise = noise
        self._stream = (seed, _STREAMS[split])
        patterns = np.random.default_rng((seed, _STREAMS['prototypes'])).standard_normal((num_classes, 3, GRID, GRID), dtype=np.float32)
        self._patterns = torch.from_numpy(patterns)

    @property
    def targets(self) -> Tensor:
        """All labels, int64 ``[num_samples]``, recomputed on each access."""
        return torch.arange(self.num_samples) % self.num_classes

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.num_samples:
            raise IndexError(index)
        size, label = self.image_size, index % self.num_classes
        pattern = torch.nn.functional.interpolate(self._patterns[label : label + 1], (size, size), mode='bilinear')[0]
        noise = np.random.default_rng((*self._stream, index)).standard_normal((3, size, size), dtype=np.float32)
        return (pattern + self.noise * torch.from_numpy(noise)) / math.sqrt(1 + self.noise**2), label


def synthetic(
    split: Literal['train', 'eval'],
    path: str | None = None,
    *,
    num_samples: int = 5000,
    eval_samples: int = 1000,
    num_classes: int = 10,
    image_size: int = 32,
    seed: int = 0,
    noise: float = 1.0,
) -> Synthetic:
    """A learnable dataset of any size that needs no files; see :class:`Synthetic`.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Ignored.
        num_samples: Number of training samples.
        eval_samples: Number of evaluation samples.
        num_classes: Number of classes.
        image_size: Height and width in pixels.
        seed: Seed for patterns and noise.
        noise: Standard deviation of the noise, relative to that of the patterns.

    Raises:
        InputError: An option is out of range.
    """
    check_at_least(1, most=MOST_SAMPLES, num_samples=num_samples, eval_samples=eval_samples)
    check_at_least(1, most=MOST_CLASSES, num_classes=num_classes)
    check_at_least(1, most=MOST_SIDE, image_size=image_size)
    check_at_least(0, most=2**53, seed=seed)
    check_at_least(0, most=1e6, noise=noise)
    return Synthetic(split, num_samples if split == 'train' else eval_samples, num_classes, image_size, seed, noise)
