"""The interface between plan and data. The same plan works with every data path.

A *path* turns sample indices into batches. It has one method, ``read_batches(reading)``; a :class:`Reading` contains the samples in order,
the batch boundaries and the seed. :class:`PlannedDataLoader` is the same for every path: it holds the epoch's plan, divides it over the
ranks, skips finished batches after a resume without reading them, and serves the selection pass. Algorithms only use this loader. There are
two kinds of path:

* ``torch.utils.data.DataLoader``, the user's own: read by worker processes with its dataset, collate function and memory settings;
* a :class:`BatchReader`, a loader that implements reading itself, such as ``DeviceDataLoader``. It is passed to the Trainer instead of a
  ``DataLoader``; without a plan it iterates like a ``DataLoader`` with a ``DistributedSampler``.

To add a path, subclass :class:`BatchReader` with ``read_batches``, and add a name in ``composer_effalgos.loaders`` for recipes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from composer_effalgos.plan.epoch import stream_seed
from composer_effalgos.plan.order import check_collate, check_together, is_due
from composer_effalgos.plan.randomness import RandomStream
from composer_effalgos.plan.samples import full_dataset
from composer_effalgos.utils.errors import InputError


@dataclass(frozen=True)
class Reading:
    """The samples that a path reads on this rank, in order and divided into batches.

    Attributes:
        indices: Sample indices in reading order, int64 ``[m]``, on the CPU.
        offsets: Batch boundaries in ``indices``, ascending, one more than batches.
        seed: Seeds random augmentation; the same on every rank, different in each epoch and pass. Together with a sample's index it seeds a
            random stream per sample, which is independent of the number of ranks and of resumption.
        batch_seeds: One seed per batch, for paths that cannot seed samples; it depends on rank and batch.
        by_position: Whether samples are identified by their position in a batch, so that its order matters.
    """

    indices: Tensor
    offsets: Sequence[int]
    seed: int
    batch_seeds: Iterable[int]
    by_position: bool = False

    @classmethod
    def of_batches(cls, batches: Iterable[Sequence[int]], *keys: int, by_position: bool = False) -> Reading:
        """Creates a reading from batches.

        Args:
            batches: Sample numbers, batch by batch.
            *keys: Non-negative integers that identify the random stream.
            by_position: See the attribute.
        """
        batches = list(batches)
        offsets = np.cumsum([0, *map(len, batches)]).tolist()
        indices = torch.tensor(list(itertools.chain.from_iterable(batches)), dtype=torch.int64)
        return cls(indices, offsets, stream_seed(*keys), (stream_seed(*keys, start) for start in offsets[:-1]), by_position)

    @property
    def batches(self) -> Iterator[Tensor]:
        """The sample numbers of each batch, int64 ``[b]``."""
        return (self.indices[start:stop] for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True))


class BatchReader(DataLoader):
    """A loader that reads given samples; subclasses define :meth:`read_batches`.

    Args:
        dataset: Has a length; subclasses may require more. ``InfoBatch(class_balanced=True)`` reads its ``targets``.
        batch_size: Samples per rank and batch.
        shuffle: Draws a new order each epoch.
        drop_last: Drops an incomplete last batch.
        seed: Seeds order and augmentation if there is no plan; a plan uses the run's seed.
    """

    def __init__(self, dataset: Dataset, *, batch_size: int, shuffle: bool = False, drop_last: bool = False, seed: int = 0) -> None:
        # With several ranks Composer requires this sampler, sets its epoch, and removes its padding from evaluation.
        sampler = dist.get_sampler(dataset, shuffle=shuffle, drop_last=drop_last, seed=seed)
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, drop_last=drop_last)
        self.seed = seed

    def read_batches(self, reading: Reading) -> Iterator[Any]:
        """Reads samples.

        Args:
            reading: The samples, batch boundaries and seeds.

        Yields:
            The batches of ``reading`` in order, each with the given number of samples, on the host or on the training device.
        """
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert isinstance(self.sampler, DistributedSampler)
        assert self.batch_sampler is not None
        return self.read_batches(Reading.of_batches(self.batch_sampler, self.seed, 4, self.sampler.epoch))


class _Task(NamedTuple):
    """A batch that a worker is to make."""

    seed: int
    indices: list[int]
    check: bool  # whether to check that collating keeps the order


class _BatchMaker(Dataset):
    """Reads and collates a batch with its own random stream.

    Random augmentations and collate functions then depend only on (seed, epoch, rank, batch), not on the number of workers, on what a
    persistent worker read before, or on resumption.
    """

    def __init__(self, dataset: Dataset, collate_fn: Callable[[Any], Any]) -> None:
        self.dataset, self._collate = dataset, collate_fn
        own = getattr(full_dataset(dataset), '__getitems__', None)  # a Subset has one anyway, but keeps the order
        self._reads_together = callable(own)

    def __getitems__(self, task: _Task) -> Any:
        """The batch, or an error as a value: PyTorch would add the worker's traceback to the message of a raised one."""
        with RandomStream(task.seed):
            together: Any = getattr(self.dataset, '__getitems__', None)
            samples = together(task.indices) if callable(together) else [self.dataset[index] for index in task.indices]
            if task.check:
                try:
                    check_collate(self._collate, samples, len(task.indices), task.seed)
                    if self._reads_together:
                        check_together(together, self._collate, task.indices, task.seed)
                except InputError as error:
                    return error
            return self._collate(samples)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


def init_worker(users: Callable[[int], None] | None, worker: int) -> None:
    """Shows the user's ``worker_init_fn`` the user's dataset instead of the wrapper around it.

    Args:
        users: The user's ``worker_init_fn``.
        worker: The worker's number.
    """
    info = torch.utils.data.get_worker_info()
    object.__setattr__(info, 'dataset', info.dataset.dataset)  # type: ignore[union-attr]
    if users is not None:
        users(worker)


class Tasks:
    """A batch sampler that yields the tasks set last."""

    tasks: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tasks)


def _as_it_is(batch: Any) -> Any:
    return batch


def worker_loader(loader: DataLoader, dataset: Dataset, tasks: Tasks, *, seed: int, persistent: bool) -> DataLoader:
    """A loader with the user's workers and memory settings, whose dataset turns a task into a whole batch.

    Args:
        loader: The user's loader.
        dataset: Maps a task to a batch; has the user's dataset as its attribute ``dataset``.
        tasks: The tasks to read.
        seed: Seed of the generator from which PyTorch draws the workers' base seed, so that starting workers does not advance the training
            generator.
        persistent: Whether the workers persist between readings.
    """
    return DataLoader(
        dataset,
        batch_sampler=tasks,  # type: ignore[arg-type]
        num_workers=loader.num_workers,
        collate_fn=_as_it_is,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=functools.partial(init_worker, loader.worker_init_fn),
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(seed),
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=persistent,
        pin_memory_device=loader.pin_memory_device,
    )


class WorkerReader:
    """Reads with the user's dataset, collate function, workers and memory settings.

    With ``persistent_workers=True`` the worker processes persist for the whole run, while the samples, their order and the batch size
    change. Otherwise they end with each epoch and each pass over the data; new ones see what has changed in the dataset.

    Args:
        loader: The user's loader.
        seed: As for :func:`worker_loader`.
        indices: Indices of the samples in the dataset, int64 ``[N]``; ``None`` if they are the same.
    """

    def __init__(self, loader: DataLoader, seed: int, indices: Tensor | None = None) -> None:
        self._indices = indices
        self._tasks = Tasks()
        self._checked = 0  # batches read by position so far
        maker = _BatchMaker(loader.dataset, loader.collate_fn)
        self._inner = worker_loader(loader, maker, self._tasks, seed=seed, persistent=loader.num_workers > 0)
        self._persistent, self._seed = loader.persistent_workers, -1

    def read_batches(self, reading: Reading) -> Iterator[Any]:
        self._tasks.tasks = self._tasks_of(reading)
        if reading.seed != self._seed:  # another epoch or pass, not the rest of an epoch in another batch size
            self.end_workers()
        self._seed = reading.seed
        for batch in self._inner:
            if isinstance(batch, InputError):
                raise batch
            yield batch

    def end_workers(self) -> None:
        """Ends the worker processes, unless they are persistent."""
        if not self._persistent:
            self._inner._iterator = None

    def _tasks_of(self, reading: Reading) -> Iterator[_Task]:
        for seed, batch in zip(reading.batch_seeds, reading.batches, strict=True):
            self._checked += reading.by_position
            indices = batch if self._indices is None else self._indices[batch]
            yield _Task(seed, indices.tolist(), reading.by_position and is_due(self._checked))
