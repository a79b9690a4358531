"""Batched image augmentation on the device that holds the images.

A torchvision pipeline such as ``RandomCrop, RandomHorizontalFlip, ToTensor, Normalize`` is split in two: deterministic leading steps
(resize, centre crop) run once, when the dataset is decoded; the rest becomes a :class:`BatchTransform`. Random numbers are drawn per
sample: in an epoch, sample *i* gets the same crop whatever the batch, rank, device or previous batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from composer_effalgos.datasets.images import Cutout, Pixels
from composer_effalgos.utils.errors import InputError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIXED = (transforms.Resize, transforms.CenterCrop, v2.Resize, v2.CenterCrop)
_PADDING_MODES = ('constant', 'reflect', 'edge')
DRAWS = 5  # random numbers per sample: crop row and column, flip, cutout row and column


def random_bits(seed: int, samples: np.ndarray, draws: int) -> np.ndarray:
    """Random numbers as a pure function of (seed, sample index, draw index).

    Applies the output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) to the sample index and then to the draw index.

    Args:
        seed: In [0, 2**64).
        samples: Sample indices, int64 ``[m]``.
        draws: Number of draws per sample.

    Returns:
        Uniform 32-bit numbers, uint64 ``[draws, m]``.
    """
    with np.errstate(over='ignore'):
        streams = _mix(np.uint64(seed) + (samples.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        return np.stack([_mix(streams + np.uint64(draw + 1) * _GOLDEN) >> np.uint64(32) for draw in range(draws)])


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class BatchTransform:
    """Batched transform from decoded images to network input: random crop, random flip, resize, normalise, cutout.

    Attributes:
        crop: Height and width of the crop in pixels; ``None`` for the whole image.
        padding: Padding before the crop in pixels: left, top, right, bottom.
        padding_mode: ``'constant'`` (black), ``'reflect'`` or ``'edge'``.
        flip: Probability of a horizontal flip.
        size: Height and width to resize to after the crop (bilinear, anti-aliased); ``None`` for no resize.
        mean: Channel means of pixels in [0, 1]; ``None`` leaves pixels in [0, 1].
        std: Channel standard deviations of pixels in [0, 1].
        cutout: Side in pixels of a square to blank in the normalised image; 0 for none.
    """

    crop: tuple[int, int] | None = None
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    padding_mode: str = 'constant'
    flip: float = 0.0
    size: tuple[int, int] | None = None
    mean: Pixels | None = None
    std: Pixels | None = None
    cutout: int = 0

    def draw(self, seed: int, indices: Tensor, height: int, width: int) -> Tensor:
        """Draw the random parameters of some samples.

        Args:
            seed: Seed of the epoch's random stream.
            indices: Sample indices, int64 ``[m]``, on the CPU.
            height: Height of the stored images in pixels.
            width: Width of the stored images in pixels.

        Returns:
            int16 ``[5, m]`` on the CPU: top and left edge of the crop relative to the unpadded image (may be negative), flip (0 or 1), row
            and column of the cutout centre.
        """
        left, top, right, bottom = self.padding
        crop_height, crop_width = self.crop or (height, width)
        final_height, final_width = self.size or (crop_height, crop_width)
        bits = random_bits(seed, indices.numpy(), DRAWS)

        def below(draw: int, count: int) -> np.ndarray:
            return (bits[draw] * np.uint64(count) >> np.uint64(32)).astype(np.int16)

        decisions = (
            below(0, height + top + bottom - crop_height + 1) - top if self.crop else below(0, 1),
            below(1, width + left + right - crop_width + 1) - left if self.crop else below(1, 1),
            bits[2] < np.uint64(round(self.flip * 2**32)),
            below(3, final_height),
            below(4, final_width),
        )
        return torch.from_numpy(np.stack(decisions).astype(np.int16))

    def __call__(self, images: Tensor, indices: Tensor, decisions: Tensor) -> Tensor:
        """Gather and transform images without synchronising with the device.

        Args:
            images: uint8 ``[N, H, W, 3]``, followed in memory by a black pixel, see :func:`with_black_pixel`.
            indices: Indices into ``images``, int64 ``[b]``, on the same device.
            decisions: Columns from :meth:`draw` for these samples, int16 ``[5, b]``, on the same device.

        Returns:
            float32 ``[b, 3, h, w]`` in channels-last memory.
        """
        total, height, width, _ = images.shape
        crop_height, crop_width = self.crop or (height, width)
        down, across, flip, cut_down, cut_across = (row.long()[:, None] for row in decisions)
        rows = torch.arange(crop_height, device=images.device)
        columns = torch.arange(crop_width, device=images.device)
        rows = rows + down
        columns = columns + (crop_width - 1 - 2 * columns) * flip + across
        rows_beside, columns_beside = (rows < 0) | (rows >= height), (columns < 0) | (columns >= width)
        if any(self.padding):
            rows, columns = self._into(rows, height), self._into(columns, width)
        pixels = ((indices[:, None] * height + rows) * width)[:, :, None] + columns[:, None, :]
        if any(self.padding) and self.padding_mode == 'constant':
            pixels.masked_fill_(rows_beside[:, :, None] | columns_beside[:, None, :], total * height * width)
        stored = images.as_strided((total * height * width + 1, 3), (3, 1))
        chosen = stored.index_select(0, pixels.view(-1)).view(len(indices), crop_height, crop_width, 3)
        if self.size is not None:
            resized = v2.functional.resize(chosen.permute(0, 3, 1, 2), list(self.size), antialias=True)
            chosen = resized.permute(0, 2, 3, 1).contiguous()
        # Normalise whole pixel rows: on a CPU, several times faster than broadcasting over 3 channels, with identical results
        batch, final_height, final_width, _ = chosen.shape
        result = chosen.view(batch * final_height, final_width * 3).float().div_(255)
        if self.mean is not None and self.std is not None:
            result.sub_(_pixel_row(self.mean, final_width, images.device)).div_(_pixel_row(self.std, final_width, images.device))
        result = result.view(batch, final_height, final_width, 3)
        if self.cutout:
            result.masked_fill_(self._cut(cut_down, cut_across, final_height, final_width), 0.0)
        return result.permute(0, 3, 1, 2)

    def _into(self, positions: Tensor, length: int) -> Tensor:
        """Map positions in the padding to positions in the image."""
        if self.padding_mode == 'reflect':
            positions = positions.abs()
            positions = length - 1 - (length - 1 - positions).abs()
        return positions.clamp(0, length - 1)

    def _cut(self, down: Tensor, across: Tensor, height: int, width: int) -> Tensor:
        """Mask of the cutout squares, bool ``[b, h, w, 1]``."""
        rows, columns = (torch.arange(length, device=down.device) for length in (height, width))
        low, high = self.cutout // 2, self.cutout - self.cutout // 2
        within_rows = (rows >= down - low) & (rows < down + high)
        within_columns = (columns >= across - low) & (columns < across + high)
        return (within_rows[:, :, None] & within_columns[:, None, :])[..., None]


@functools.lru_cache(maxsize=16)
def _pixel_row(values: Pixels, width: int, device: torch.device) -> Tensor:
    return torch.tensor(values * width, device=device)


def with_black_pixel(shape: Sequence[int]) -> Tensor:
    """Allocate a buffer for decoded images, followed in memory by a black pixel that zero-padding reads.

    Args:
        shape: ``(N, H, W, 3)``.

    Returns:
        Uninitialised uint8 ``[N, H, W, 3]``.
    """
    size = int(np.prod(shape))
    room = torch.empty(size + 3, dtype=torch.uint8)
    room[size:] = 0
    return room[:size].view(*shape)


def steps_of(transform: Any) -> list[Any]:
    """The flattened steps of a torchvision pipeline; ``[transform]`` for anything else."""
    if isinstance(transform, transforms.Compose | v2.Compose):
        return [step for part in transform.transforms for step in steps_of(part)]
    return [transform]


def split_transform(transform: Any) -> tuple[list[Callable[[Any], Any]], BatchTransform]:
    """Split a torchvision pipeline into the steps that run once per image and those that run on each batch.

    Args:
        transform: A pipeline from PIL images to float32 tensors: any of Resize and CenterCrop, then RandomCrop, RandomHorizontalFlip and
            Resize, then ToTensor (or ToImage and ToDtype), Normalize and :class:`~composer_effalgos.datasets.images.Cutout`, from
            ``torchvision.transforms`` or ``torchvision.transforms.v2``.

    Returns:
        The steps from a PIL image to the stored image, and the batched rest.

    Raises:
        InputError: The pipeline has another step or another order.
    """
    fixed: list[Callable[[Any], Any]] = []
    found = BatchTransform()
    stage = 0
    to_float = False
    for step in steps_of(transform):
        if isinstance(step, v2.Identity | transforms.PILToTensor | v2.PILToTensor | v2.ToImage):
            continue
        if isinstance(step, _FIXED) and stage == 0:
            fixed.append(step)
            continue
        rank, found = _add(found, step)
        to_float = to_float or rank == _TO_FLOAT
        if rank <= stage:
            raise _cannot(step)
        stage = rank
    if not to_float:
        raise InputError(
            'DeviceDataLoader: expected a transform with ToTensor or ToDtype(torch.float32, scale=True) at its end, got one without'
        )
    return fixed, found


_TO_FLOAT = 4


def _add(found: BatchTransform, step: Any) -> tuple[int, BatchTransform]:
    """Add a step to ``found``; also return the step's position in the order of a :class:`BatchTransform`."""
    if isinstance(step, transforms.RandomCrop | v2.RandomCrop):
        left, top, right, bottom = _padding_of(step)
        if step.padding_mode not in _PADDING_MODES or step.pad_if_needed or not _is_zero(step.fill):
            raise _cannot(step)
        return 1, replace(
            found, crop=(int(step.size[0]), int(step.size[1])), padding=(left, top, right, bottom), padding_mode=step.padding_mode
        )
    if isinstance(step, transforms.RandomHorizontalFlip | v2.RandomHorizontalFlip):
        return 2, replace(found, flip=float(step.p))
    if isinstance(step, transforms.Resize | v2.Resize):
        size = [step.size] if isinstance(step.size, int) else list(step.size or [])
        if len(size) != 2 or step.interpolation != transforms.InterpolationMode.BILINEAR or not step.antialias:
            raise _cannot(step)
        return 3, replace(found, size=(int(size[0]), int(size[1])))
    if isinstance(step, transforms.ToTensor) or (isinstance(step, v2.ToDtype) and step.dtype == torch.float32 and step.scale):
        return _TO_FLOAT, found
    if isinstance(step, transforms.Normalize | v2.Normalize) and len(step.mean) == len(step.std) == 3:
        mean, std = ((float(red), float(green), float(blue)) for red, green, blue in (step.mean, step.std))
        return 5, replace(found, mean=mean, std=std)
    if isinstance(step, Cutout):
        return 6, replace(found, cutout=step.size)
    raise _cannot(step)


def _padding_of(step: Any) -> tuple[int, int, int, int]:
    """Padding in pixels: left, top, right, bottom."""
    if step.padding is None:
        return 0, 0, 0, 0
    if isinstance(step, v2.RandomCrop):  # already parsed, but in the order left, right, top, bottom
        left, right, top, bottom = step.padding
        return left, top, right, bottom
    sides = [step.padding] if isinstance(step.padding, int) else list(step.padding)
    left, top, right, bottom = (sides * 4)[:4]
    return left, top, right, bottom


def _is_zero(fill: Any) -> bool:
    values = list(fill.values()) if isinstance(fill, dict) else [fill]
    return all(value is None or not np.any(value) for value in values)


def _cannot(step: Any) -> InputError:
    return InputError(
        'DeviceDataLoader: expected a transform of Resize and CenterCrop, then RandomCrop, RandomHorizontalFlip, Resize, ToTensor, '
        f'Normalize, Cutout, in this order, got {" ".join(repr(step).split())}; use worker processes (in a recipe `loader: workers`) '
        'for others'
    )
