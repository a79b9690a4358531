"""A data loader for image datasets that fit into memory: decoded once, kept and batched on the device."""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from composer.utils import dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from composer_effalgos.datasets.images import with_transform
from composer_effalgos.loaders import cache as disk
from composer_effalgos.loaders.augment import split_transform, with_black_pixel
from composer_effalgos.loaders.on_device import OnDevice
from composer_effalgos.plan import Reading
from composer_effalgos.utils.errors import InputError

# On a GPU, launching a dozen small kernels per batch costs more than running them: build several batches at once, up to this size
TOGETHER = 64 * 2**20  # bytes


class DeviceDataLoader(OnDevice):
    """Keeps decoded images on the device and augments them there in batches.

    The images are decoded once, as uint8, on first iteration (or by :meth:`load`), and stay in GPU memory, or in host memory without a GPU;
    each process has its own copy. A batch is gathered, cropped, flipped, resized, normalised and cut out with a few batched operations,
    without synchronising with the device. Augmentation depends only on (seed, epoch, sample): it is the same for any number of ranks, on
    any device, and in a resumed run.

    Args:
        dataset: A map-style dataset of ``(image, label)`` whose attribute ``transform`` is a torchvision pipeline over PIL images, as in
            ``torchvision.datasets`` and this package, or a ``Subset`` of one. See
            :func:`~composer_effalgos.loaders.augment.split_transform` for the supported steps. Before the random steps, all images must
            have the same size.
        batch_size: Samples per rank and batch.
        shuffle: Draw a new order each epoch.
        drop_last: Drop an incomplete last batch.
        seed: Seed for order and augmentation if no epoch plan is used; a plan uses the run's seed.
        device: Device that holds the images; by default this rank's GPU, or else the CPU.
        cache: Folder for decoded images; ``None`` decodes them in each run. Damaged files and those of other datasets are ignored.
        num_workers: Number of decoding processes.

    Raises:
        InputError: The dataset or transform is not supported; on :meth:`load`, the images differ in size or do not fit into memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        device: str | torch.device | None = None,
        cache: str | os.PathLike[str] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(dataset, device=device, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed)
        self.cache = None if cache is None else Path(cache).expanduser()
        self.decoders = num_workers
        self._once, self._transform = split_transform(self.images.transform)
        self._images: Tensor | None = None
        self._labels: Tensor | None = None

    def load(self) -> None:
        """Decode the images or read them from the cache; later calls do nothing."""
        if self._images is not None:
            return
        # One process per node decodes and writes the cache, the others read it
        with dist.run_local_rank_zero_first() if self.cache is not None and dist.is_initialized() else contextlib.nullcontext():
            images, labels = self._decoded()
        if self.device.type == 'cuda':
            free, total = torch.cuda.mem_get_info(self.device)
            _check_room(images.nbytes, free, f'{total / 1e9:.0f} GB of GPU memory')
        # Copy the black pixel behind the images too
        room = images.as_strided((images.numel() + 3,), (1,)).to(self.device)
        self._images, self._labels = room[: images.numel()].view(images.shape), labels.to(self.device)

    def read_batches(self, reading: Reading) -> Iterator[list[Tensor]]:
        """Build batches; see :meth:`BatchReader.read_batches`.

        Yields:
            ``[images, labels]`` on the device: float32 ``[b, 3, h, w]`` in channels-last memory and int64 ``[b]``.
        """
        self.check_transform()
        self.load()
        images, labels = self._images, self._labels
        assert images is not None
        assert labels is not None
        decisions = self._transform.draw(reading.seed, reading.indices, *images.shape[1:3])
        indices, decisions = self.to_device(reading.indices), self.to_device(decisions)
        offsets = reading.offsets
        for first, last in _together(offsets, TOGETHER // (4 * images[0].numel()) if self.device.type == 'cuda' else 0):
            start, stop = offsets[first], offsets[last]
            chosen = indices[start:stop]
            inputs, targets = self._transform(images, chosen, decisions[:, start:stop]), labels.index_select(0, chosen)
            if last == first + 1:
                yield [inputs, targets]
                continue
            for batch in range(first, last):
                here = slice(offsets[batch] - start, offsets[batch + 1] - start)
                # Composer deep-copies each batch, and deep-copying a view copies its whole storage
                yield [inputs[here].clone(), targets[here].clone()]

    def _decoded(self) -> tuple[Tensor, Tensor]:
        """Images, uint8 ``[N, H, W, 3]`` followed by a black pixel, and labels, int64 ``[N]``."""
        if self.cache is None:
            return self._decode()
        identity = disk.identity_of(self.dataset, *map(repr, self._once))
        found = disk.load(self.cache, identity)
        if found is not None:
            images = with_black_pixel(found[0].shape)
            images.copy_(found[0])
            return images, found[1]
        images, labels = self._decode()
        disk.save(self.cache, identity, images, labels)
        return images, labels

    def _decode(self) -> tuple[Tensor, Tensor]:
        size = len(self.dataset)  # type: ignore[arg-type]
        labels = torch.empty(size, dtype=torch.int64)
        images: Tensor | None = None
        stored = with_transform(self.dataset, _ToStore(self._once))
        done = 0
        # Without its own generator, the DataLoader would draw from torch's global one and a resumed run would differ
        generator = torch.Generator()
        for items in DataLoader(stored, batch_size=256, num_workers=self.decoders, collate_fn=list, generator=generator):
            for image, label in items:
                if images is None:
                    _check_room(size * image.size, psutil.virtual_memory().available, 'memory')
                    images = with_black_pixel((size, *image.shape))
                if image.shape != images.shape[1:]:
                    height, width = images.shape[1:3]
                    raise InputError(
                        f'DeviceDataLoader: expected images of one size, {width}x{height}, got {image.shape[1]}x{image.shape[0]} for '
                        f'sample {done}; resize them first (a Resize at the head of the transform)'
                    )
                images[done] = torch.from_numpy(image)
                labels[done] = int(label)
                done += 1
        assert images is not None, 'a DataLoader has no empty dataset'
        return images, labels


def _together(offsets: Sequence[int], samples: int) -> Iterator[tuple[int, int]]:
    """Ranges of batches to build together: at most ``samples`` samples, but at least one batch. A CPU gets one, which fits its cache."""
    first = 0
    while first < len(offsets) - 1:
        last = max(first + 1, bisect.bisect_right(offsets, offsets[first] + samples) - 1)
        yield first, last
        first = last


class _ToStore:
    """Applies the steps that run once to a PIL image and returns uint8 ``[H, W, 3]``."""

    def __init__(self, steps: list[Any]) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> np.ndarray:
        for step in self.steps:
            image = step(image)
        if not isinstance(image, Image.Image):
            raise InputError(f'DeviceDataLoader: expected PIL images before the transform, got {type(image).__name__}')
        return np.array(image.convert('RGB'))


def _check_room(needed: int, free: int, what: str) -> None:
    if needed > free:
        raise InputError(
            f'DeviceDataLoader: the decoded images take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of {what} are free; use worker '
            'processes (in a recipe `loader: workers`), or smaller images'
        )
