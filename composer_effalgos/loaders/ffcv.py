"""A data loader with ffcv's compiled, threaded decoding, for the ``.beton`` files that ``effalgos convert`` writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import v2

from composer_effalgos.datasets.beton import Beton, import_ffcv
from composer_effalgos.loaders.augment import BatchTransform, random_bits, split_transform, steps_of, with_black_pixel
from composer_effalgos.loaders.on_device import OnDevice
from composer_effalgos.plan import Reading, stream_seed
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError

TRIES = 10  # as in torchvision's RandomResizedCrop

Boxes = Callable[[int, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""``(seed, sample indices, heights, widths) -> int64 [m, 4]``: top, left, height and width of the box to decode from each image."""


class FfcvDataLoader(OnDevice):
    """Decodes with ffcv's threads and augments in batches on the device.

    ffcv decodes, crops to a box and resizes in compiled code, ahead of training. It takes the plan's batches of any size without
    recompiling. The output is copied out of ffcv's reused buffers, and the rest of the pipeline (random crop, flip, normalisation) runs on
    the whole batch on the device. As in :class:`~composer_effalgos.loaders.DeviceDataLoader`, augmentation depends only on (seed, epoch,
    sample).

    Args:
        dataset: A :class:`~composer_effalgos.datasets.beton.Beton`. Its transform must start with RandomResizedCrop, or Resize and
            CenterCrop, unless the stored images have one size; see :func:`~composer_effalgos.loaders.augment.split_transform` for what may
            follow.
        batch_size: Samples per rank and batch.
        shuffle: Draw a new order each epoch.
        drop_last: Drop an incomplete last batch.
        seed: Seed for order and augmentation if no epoch plan is used; a plan uses the run's seed.
        device: Device of the batches; by default this rank's GPU, or else the CPU.
        num_workers: Number of decoding threads; at least one is used.
        batches_ahead: Number of batches to decode ahead, 1 to 1024.

    Raises:
        InputError: The dataset or transform is not supported, an argument is out of range, ffcv is not installed, or the file is truncated.
    """

    def __init__(
        self,
        dataset: Beton,
        *,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        device: str | torch.device | None = None,
        num_workers: int = 1,
        batches_ahead: int = 2,
    ) -> None:
        if not isinstance(dataset, Beton):
            raise InputError(
                f'FfcvDataLoader: expected a .beton file (in a recipe `dataset: {{name: beton, ...}}`), got {type(dataset).__name__}; '
                'effalgos convert --to ffcv writes them'
            )
        check_number('batches_ahead', batches_ahead, least=1, most=1024)
        super().__init__(dataset, device=device, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed)
        self._decoding, self._transform = _split(dataset)
        import_ffcv('loader: ffcv')
        from composer_effalgos.loaders.ffcv_parts import images_of

        self._loader = images_of(dataset, self._decoding.size, num_workers, batches_ahead)

    def read_batches(self, reading: Reading) -> Iterator[list[Tensor]]:
        """Decode batches; see :meth:`BatchReader.read_batches`.

        Yields:
            ``[images, labels]`` on the device: float32 ``[b, 3, h, w]`` in channels-last memory and int64 ``[b]``.
        """
        self.check_transform()
        dataset = self.dataset
        assert isinstance(dataset, Beton)
        if len(reading.offsets) < 2:
            return
        heights, widths = dataset.sizes[reading.indices].T.numpy()
        boxes = self._decoding.boxes(stream_seed(reading.seed, 1), reading.indices.numpy(), heights, widths)
        decisions = self._transform.draw(reading.seed, reading.indices, *self._decoding.size)
        labels = dataset.targets[reading.indices]
        cut = list(pairwise(reading.offsets))
        rows = dataset.rows[reading.indices].numpy().astype(np.uint64)
        from composer_effalgos.loaders.ffcv_parts import Epoch

        epoch = Epoch(dataset, self._loader, [rows[start:stop] for start, stop in cut], [boxes[start:stop] for start, stop in cut])
        try:
            for (start, stop), (decoded,) in zip(cut, epoch, strict=True):
                images = self._copied(decoded)
                here = torch.arange(stop - start, device=self.device)
                inputs = self._transform(images, here, self.to_device(decisions[:, start:stop]))
                yield [inputs, self.to_device(labels[start:stop])]
        finally:
            epoch.stop()

    def _copied(self, decoded: np.ndarray) -> Tensor:
        """Copy ffcv's buffer to the device, followed by the black pixel that :class:`BatchTransform` needs."""
        room = with_black_pixel(decoded.shape)
        room.copy_(torch.from_numpy(decoded))
        return self.to_device(room.as_strided((room.numel() + 3,), (1,)))[: room.numel()].view(room.shape)


# ------------------------------------------------------------------ decoding boxes


@dataclass(frozen=True)
class Decoding:
    """The part of the pipeline that ffcv runs: decode a box of each image and resize it.

    Attributes:
        size: Output height and width in pixels.
        boxes: Computes the boxes.
    """

    size: tuple[int, int]
    boxes: Boxes


def _split(dataset: Beton) -> tuple[Decoding, BatchTransform]:
    """Split a pipeline into the part that ffcv runs while decoding and the part that runs on batches."""
    steps = steps_of(dataset.transform)
    first = steps[0]
    if isinstance(first, transforms.RandomResizedCrop | v2.RandomResizedCrop):
        fixed, rest = split_transform(transforms.Compose(steps[1:]))
        if fixed:
            raise _cannot(dataset.transform)
        scale, ratio = (float(first.scale[0]), float(first.scale[1])), (float(first.ratio[0]), float(first.ratio[1]))

        def random_boxes(seed: int, samples: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
            return random_resized_boxes(seed, samples, heights, widths, scale, ratio)

        return Decoding((int(first.size[0]), int(first.size[1])), random_boxes), rest
    fixed, rest = split_transform(dataset.transform)
    if len(fixed) == 2 and isinstance(fixed[0], _RESIZE) and isinstance(fixed[1], _CENTER):
        shorter, crop = _sides(fixed[0].size), _sides(fixed[1].size) * 2
        if len(shorter) == 1 and max(crop[:2]) <= shorter[0]:
            height, width = crop[:2]
            return Decoding((height, width), lambda _, __, heights, widths: center_boxes(heights, widths, shorter[0], height, width)), rest
    if len(fixed) == 1 and isinstance(fixed[0], _RESIZE) and rest.crop is None and rest.size is None:
        size = _sides(fixed[0].size)
        if len(size) == 2:
            fixed, rest = [], replace(rest, size=(size[0], size[1]))
    if fixed:
        raise _cannot(dataset.transform)
    if not (dataset.sizes == dataset.sizes[0]).all():
        raise InputError(
            'FfcvDataLoader: expected a transform that begins with RandomResizedCrop, or Resize and CenterCrop, for images of several '
            f'sizes, got another for {dataset.file}'
        )
    height, width = dataset.sizes[0].tolist()
    return Decoding((height, width), lambda _, samples, __, ___: np.tile(np.array([0, 0, height, width]), (len(samples), 1))), rest


_RESIZE, _CENTER = transforms.Resize | v2.Resize, transforms.CenterCrop | v2.CenterCrop


def _sides(size: int | Sequence[int]) -> list[int]:
    return [size] if isinstance(size, int) else [int(side) for side in size]


def _cannot(transform: Any) -> InputError:
    return InputError(
        'FfcvDataLoader: expected RandomResizedCrop, or Resize(shorter side) and CenterCrop, and then what DeviceDataLoader takes, got '
        f'{" ".join(repr(transform).split())}; use worker processes (in a recipe `loader: workers`) for others'
    )


def center_boxes(heights: np.ndarray, widths: np.ndarray, shorter: int, height: int, width: int) -> np.ndarray:
    """The box of each image that remains after resizing the shorter side to ``shorter`` and a centre crop to ``height`` x ``width``.

    Args:
        heights: Image heights in pixels, int64 ``[m]``.
        widths: Image widths in pixels, int64 ``[m]``.
        shorter: Length of the shorter side after the resize in pixels.
        height: Height of the crop in pixels.
        width: Width of the crop in pixels.

    Returns:
        int64 ``[m, 4]``: top, left, height, width in the original image.
    """
    boxes = []
    for lengths, others, side in ((heights, widths, height), (widths, heights, width)):
        resized = np.where(lengths <= others, shorter, shorter * lengths // others)
        start = np.round((resized - side) / 2)  # torchvision rounds in the resized image
        first, last = (np.round(place * lengths / resized).astype(np.int64) for place in (start, start + side))
        boxes.append((first, np.maximum(last - first, 1)))
    (top, tall), (left, wide) = boxes
    return np.stack([top, left, tall, wide], axis=1)


def random_resized_boxes(
    seed: int, samples: np.ndarray, heights: np.ndarray, widths: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """The boxes of torchvision's RandomResizedCrop (Szegedy et al. 2015, arXiv 1409.4842), with one random stream per sample.

    Args:
        seed: Seed of the epoch's random stream.
        samples: Sample indices, int64 ``[m]``.
        heights: Image heights in pixels, int64 ``[m]``.
        widths: Image widths in pixels, int64 ``[m]``.
        scale: Minimum and maximum fraction of the image area.
        ratio: Minimum and maximum aspect ratio, width over height.

    Returns:
        int64 ``[m, 4]``: top, left, height, width.
    """
    draws = random_bits(seed, samples, 2 * TRIES + 2) / 2**32
    area = heights * widths * (scale[0] + (scale[1] - scale[0]) * draws[:TRIES])
    aspect = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * draws[TRIES : 2 * TRIES])
    wide, tall = np.round(np.sqrt(area * aspect)).astype(np.int64), np.round(np.sqrt(area / aspect)).astype(np.int64)
    fits = (wide > 0) & (wide <= widths) & (tall > 0) & (tall <= heights)
    first = fits.argmax(axis=0)
    columns = np.arange(len(samples))
    # Fallback if no try fits, as in torchvision: the largest centred box with an allowed aspect ratio
    shape = widths / heights
    whole_wide = np.where(shape > ratio[1], np.round(heights * ratio[1]).astype(np.int64), widths)
    whole_tall = np.where(shape < ratio[0], np.round(widths / ratio[0]).astype(np.int64), heights)
    found = fits.any(axis=0)
    wide, tall = np.where(found, wide[first, columns], whole_wide), np.where(found, tall[first, columns], whole_tall)
    top = np.where(found, (draws[-2] * (heights - tall + 1)).astype(np.int64), (heights - tall) // 2)
    left = np.where(found, (draws[-1] * (widths - wide + 1)).astype(np.int64), (widths - wide) // 2)
    return np.stack([top, left, tall, wide], axis=1)
