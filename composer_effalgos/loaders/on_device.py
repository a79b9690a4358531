"""What the loaders that augment images on the training device share."""

from __future__ import annotations

from typing import Any

import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import Dataset

from composer_effalgos.loaders.augment import steps_of
from composer_effalgos.plan import BatchReader, full_dataset
from composer_effalgos.utils.errors import InputError


class OnDevice(BatchReader):
    """A loader whose batches are on the training device, augmented there by the steps of the dataset's ``transform``.

    Args:
        dataset: Has an attribute ``transform``, or is a ``Subset`` of a dataset that has it.
        device: Device of the batches; by default this rank's GPU, or else the CPU.
        **settings: As for :class:`~composer_effalgos.plan.BatchReader`.

    Raises:
        InputError: The dataset has no transform.
    """

    def __init__(self, dataset: Dataset, *, device: str | torch.device | None, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        if device is None:
            device = f'cuda:{dist.get_local_rank()}' if torch.cuda.is_available() else 'cpu'
        self.device = torch.device(device)
        self._steps = steps_of(self.images.transform)  # the objects themselves: the id of a deleted one may be used again

    @property
    def images(self) -> Any:
        """The dataset that has the transform: ``dataset``, or the one that it is a ``Subset`` of."""
        dataset = full_dataset(self.dataset)
        if getattr(dataset, 'transform', None) is None:
            raise InputError(
                f'{type(self).__name__}: expected a dataset whose attribute `transform` is a torchvision pipeline over PIL images, got '
                f'{type(dataset).__name__} without one; use worker processes (in a recipe `loader: workers`)'
            )
        return dataset

    def check_transform(self) -> None:
        """Check that the transform is still the one of the construction.

        Raises:
            InputError: It was changed since.
        """
        if list(map(id, steps_of(self.images.transform))) != list(map(id, self._steps)):
            raise InputError(
                f'{type(self).__name__}: the transform of {type(self.images).__name__} was changed after it had been read, by an algorithm '
                'such as RandAugment; use worker processes (in a recipe `loader: workers`) with it'
            )

    def to_device(self, values: Tensor) -> Tensor:
        """Copy a host tensor to the device, without waiting for a GPU."""
        if self.device.type != 'cuda':
            return values
        return values.contiguous().pin_memory().to(self.device, non_blocking=True)
