"""Batches of changing size from loaders whose samples have no indices. Every sample is read once.

A *stream* has one method, ``read(epoch, size_of)``, which yields an epoch's batches. ``size_of(k)`` returns the size of batch ``k`` and is
called before every batch, so sizes may change between any two.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from composer_effalgos.plan.epoch import stream_seed
from composer_effalgos.plan.randomness import RandomStream
from composer_effalgos.plan.readers import Tasks, worker_loader
from composer_effalgos.utils.errors import InputError

SizeOf = Callable[[int], int | None]
"""Samples of an epoch's batch on this rank; ``None`` past the last batch."""


class _Task(NamedTuple):
    """A request to a worker for the next ``size`` samples of its share.

    A new ``reading`` starts the dataset from the beginning. The first task of a new ``generation`` signals that sizes have changed: samples
    read for tasks from number ``back_to`` on were not trained on and must be read again.
    """

    number: int
    size: int
    epoch: int
    reading: int
    generation: int
    back_to: int


class _Reader(Dataset):
    """Reads an ``IterableDataset`` in requested sizes; in a worker process, that worker's share.

    Args:
        dataset: The dataset.
        collate_fn: Makes a batch from samples.
        drop_last: Drops the last samples if there are fewer than requested.
        ahead: Number of tasks that may be answered before their batch is trained on.
        seed: Seeds the random numbers of each epoch, together with the worker's number.
    """

    _generation: int
    _random: RandomStream
    _iterator: Iterator[Any]
    _again: deque[Any]  # samples that were put back
    _taken: int  # number of samples read so far

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any], drop_last: bool, ahead: int, seed: int) -> None:
        self.dataset, self._collate, self._drop_last, self._seed = dataset, collate_fn, drop_last, seed
        self._recent: deque[tuple[int, list[Any]]] = deque(maxlen=ahead + 2)
        self._reading = -1

    def __getitems__(self, task: _Task) -> tuple[_Task, int, Any]:
        """Returns the task, the number of samples found for it, and their batch (``None`` at the end of the share)."""
        info = torch.utils.data.get_worker_info()
        worker = 0 if info is None else info.id
        if task.reading != self._reading:
            self._begin(task, worker)
        if task.generation != self._generation:
            self._put_back(task)
        if task.size == 0:
            return task, 0, None
        with self._random:
            samples = list(itertools.islice(itertools.chain(self._drain(), self._iterator), task.size))
        self._recent.append((task.number, samples))
        start, self._taken = self._taken, self._taken + len(samples)
        if not samples or (self._drop_last and len(samples) < task.size):
            return task, len(samples), None
        # seeded by position: making a batch again in another size must not change the random numbers of later ones
        with RandomStream(stream_seed(self._seed, 1, task.epoch, worker, start)):
            return task, len(samples), self._collate(samples)

    def _begin(self, task: _Task, worker: int) -> None:
        self._reading, self._generation, self._taken = task.reading, 0, 0
        self._random = RandomStream(stream_seed(self._seed, 0, task.epoch, worker))
        self._again = deque()
        self._recent.clear()
        with self._random:
            self._iterator = iter(self.dataset)

    def _put_back(self, task: _Task) -> None:
        self._generation = task.generation
        while self._recent and self._recent[-1][0] >= task.back_to:
            samples = self._recent.pop()[1]
            self._taken -= len(samples)
            self._again.extendleft(reversed(samples))

    def _drain(self) -> Iterator[Any]:
        while self._again:
            yield self._again.popleft()


class WorkerStream:
    """Reads a ``DataLoader`` over an ``IterableDataset``, with its collate function, workers and memory settings.

    As in a ``DataLoader``, batches come from the workers in turn, each with the worker's next samples; at the original batch size they are
    the loader's own batches in its order. When the size changes, samples that workers have prefetched are put back at the front of their
    share, so order and sizes equal those of a run without prefetching.

    Args:
        loader: The user's loader.
        seed: Seeds the random numbers of reading; must differ between ranks.

    Attributes:
        keeps_dataset: Whether every epoch reads the same dataset object, which may count its epochs.
    """

    def __init__(self, loader: DataLoader, seed: int) -> None:
        self._workers = max(1, loader.num_workers)
        self._batch_size = loader.batch_size
        self.keeps_dataset = loader.num_workers == 0 or loader.persistent_workers
        self._readings = 0
        self._tasks = Tasks()
        ahead = (loader.prefetch_factor or 0) if loader.num_workers else 0
        reader = _Reader(loader.dataset, loader.collate_fn, loader.drop_last, ahead, seed)
        self._inner = worker_loader(loader, reader, self._tasks, seed=seed % 2**63, persistent=loader.persistent_workers)

    def read(self, epoch: int, size_of: SizeOf) -> Iterator[Any]:
        """Yields an epoch's batches."""
        sending = _Sending(epoch, self._readings, size_of, self._batch_size, self._workers)
        self._readings += 1
        self._tasks.tasks = iter(sending)
        ended: set[int] = set()  # workers whose share is exhausted
        batch = 0
        for task, left, content in self._inner:
            size = size_of(batch)
            if size is None:
                return
            if task.size == 0 or task.generation != sending.generation:
                continue
            if content is None and left < size:
                ended.add(task.number % self._workers)
                sending.batch -= 1  # another worker must make this batch
                if len(ended) == self._workers:
                    return
            elif task.size != size:
                sending.begin_again(task.number, batch)
                ended.clear()
            else:
                batch += 1
                yield content
                if size_of(batch) is None:
                    return


class _Sending:
    """An endless iterator over the tasks of an epoch, round-robin over the workers.

    Attributes:
        generation: How often sizes have changed unexpectedly.
        batch: The batch that the next task is expected to be for.
    """

    def __init__(self, epoch: int, reading: int, size_of: SizeOf, batch_size: int | None, workers: int) -> None:
        assert batch_size is not None
        self._epoch, self._reading = epoch, reading
        self._size_of, self._size, self._workers = size_of, batch_size, workers
        self.generation = self.batch = 0
        self._number = self._back_to = self._idle = 0

    def __iter__(self) -> Iterator[_Task]:
        while True:
            size = 0
            if self._idle:
                self._idle -= 1
            else:
                size = self._size = self._size_of(self.batch) or self._size
                self.batch += 1
            self._number += 1
            yield _Task(self._number - 1, size, self._epoch, self._reading, self.generation, self._back_to)

    def begin_again(self, number: int, batch: int) -> None:
        """Requests all batches from ``batch`` on again, the first of them from the worker that had task ``number``."""
        self.generation, self._back_to, self.batch = self.generation + 1, number, batch
        self._idle = (number - self._number) % self._workers  # empty tasks until it is this worker's turn


class BatchStream:
    """Concatenates whole batches of a loader that makes batches itself.

    Args:
        loader: An iterable of batches, with an attribute ``batch_size``.
    """

    keeps_dataset = True

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def read(self, epoch: int, size_of: SizeOf) -> Iterator[Any]:
        """Yields an epoch's batches.

        Args:
            epoch: Epoch number.
            size_of: Returns the batch sizes, which must be multiples of the loader's.

        Raises:
            InputError: For another size, or for batches that cannot be concatenated.
        """
        for sampler in (getattr(self._loader, 'sampler', None), getattr(self._loader, 'batch_sampler', None)):
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
        batches, one = iter(self._loader), self._loader.batch_size
        for number in itertools.count():
            size = size_of(number)
            if size is None:
                return
            if size % one:
                raise InputError(
                    f'train_dataloader: {type(self._loader).__name__} makes batches of {one} by itself, expected a multiple of it as the '
                    f'batch size, got {size}; use a whole growth factor, or a torch.utils.data.DataLoader'
                )
            parts = list(itertools.islice(batches, size // one))
            if not parts:
                return
            yield put_together(parts)


def put_together(batches: Sequence[Any]) -> Any:
    """Concatenates batches; the inverse of Composer's ``default_split_batch``.

    Args:
        batches: Batches of the same structure: tensors, mappings, or pairs and lists of tensors.

    Raises:
        InputError: If it is unclear how to concatenate them.
    """
    first = batches[0]
    if len(batches) == 1:
        return first
    if isinstance(first, Mapping):
        return type(first)({key: _joined([batch[key] for batch in batches]) for key in first})  # type: ignore[call-arg]
    if isinstance(first, list | tuple) and not all(isinstance(item, int | float | str | bool) for item in first):
        return type(first)(_joined(list(items)) for items in zip(*batches, strict=True))
    return _joined(batches)


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor) and first.ndim and all(part.shape[1:] == first.shape[1:] and part.dtype == first.dtype for part in parts):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return put_together(parts)
    if isinstance(first, list | tuple):
        return type(first)(itertools.chain.from_iterable(parts))
    if isinstance(first, int | float | str | bool) and all(part == first for part in parts):
        return first
    kind = f'tensors of shapes {tuple(first.shape)} and others' if isinstance(first, Tensor) else type(first).__name__
    raise InputError(
        f'train_dataloader: expected batches that can be concatenated, got {kind}; use a torch.utils.data.DataLoader with batch_size, '
        'whose collate_fn makes batches of any size'
    )
