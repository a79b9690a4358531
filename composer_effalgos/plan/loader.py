"""The data loader that reads an epoch's plan with the user's own data set, collate function and workers."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from composer_effalgos.errors import InputError
from composer_effalgos.plan.epoch import EpochPlan, split_batches, stream_seed


class _SeededDataset(Dataset):
    """Reads a batch under random numbers of its own.

    Random augmentations then depend on (seed, epoch, rank, batch) alone: not on the number of workers, on what a worker that lives
    across epochs read before, or on where a run was resumed.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitems__(self, seeded_batch: tuple[int, list[int]]) -> list[Any]:
        seed, indices = seeded_batch
        in_worker = torch.utils.data.get_worker_info() is not None
        before = None if in_worker else (torch.get_rng_state(), np.random.get_state(), random.getstate())
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPUs too
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            if callable(getattr(self.dataset, '__getitems__', None)):
                return self.dataset.__getitems__(indices)  # type: ignore[attr-defined]
            return [self.dataset[index] for index in indices]
        finally:
            if before is not None:
                torch.set_rng_state(before[0])
                np.random.set_state(before[1])
                random.setstate(before[2])

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


def _init_worker(users: Callable[[int], None] | None, worker: int) -> None:
    """Lets the user's ``worker_init_fn`` find the user's data set."""
    info = torch.utils.data.get_worker_info()
    object.__setattr__(info, 'dataset', info.dataset.dataset)  # type: ignore[union-attr]
    if users is not None:
        users(worker)


class _BatchList:
    """A batch sampler that yields the batches it was last given."""

    def __init__(self) -> None:
        self.batches: Iterable[tuple[int, list[int]]] = ()

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(self.batches)


def _check(loader: Any) -> DataLoader:
    """Refuses loaders whose samples a plan cannot name, with the reason and the way out."""
    if not isinstance(loader, DataLoader):
        raise InputError(f'train_dataloader: must be a torch.utils.data.DataLoader to be planned, got {type(loader).__name__}')
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise InputError(
            f'train_dataloader: {type(loader).__name__} iterates in a way of its own, which the plan would replace; use a '
            'torch.utils.data.DataLoader, with collate_fn or a DataSpec for what it does to batches'
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, '__len__') or not hasattr(loader.dataset, '__getitem__'):
        raise InputError(
            f'train_dataloader: {type(loader.dataset).__name__} has no indices; pruning and selection need a map-style data set '
            'with __getitem__ and __len__, not an IterableDataset'
        )
    if loader.batch_size is None or not isinstance(loader.batch_sampler, BatchSampler):
        raise InputError('train_dataloader: give batch_size instead of a batch_sampler of your own; the plan decides the batches')
    if not isinstance(loader.sampler, RandomSampler | SequentialSampler | DistributedSampler):
        raise InputError(
            f'train_dataloader: sampler {type(loader.sampler).__name__} would be replaced by the plan; use shuffle=True or '
            'composer.utils.dist.get_sampler, and torch.utils.data.Subset to train on some samples only'
        )
    if isinstance(loader.sampler, RandomSampler) and (
        loader.sampler.replacement or loader.sampler.num_samples != len(loader.sampler.data_source)
    ):
        raise InputError(
            'train_dataloader: a RandomSampler with replacement or num_samples would be replaced by the plan; use shuffle=True'
        )
    return loader


class PlannedDataLoader(DataLoader):
    """Yields the batches of an :class:`EpochPlan`, in place of the user's ``DataLoader``.

    It reads with the user's data set, collate function, workers and memory settings. One set of worker processes serves the whole run:
    they live on while the samples, their order and the batch size change.

    Args:
        loader: The user's loader over a map-style data set. Its sampler only decides whether the order is shuffled.
        seed: The run's seed, the same on every rank.
        rank: This process's global rank.
        world_size: Number of ranks.

    Attributes:
        num_samples: Samples of the data set.
        full_samples: Samples, over all ranks, of an epoch that trains on everything at the initial batch size.
        full_batches: Its number of batches.
        facts: What the algorithms want logged about the epoch; ``EfficiencyMonitor`` logs each as ``efficiency/<name>``.

    Raises:
        InputError: For a loader that cannot be planned, or whose batch is larger than its data set.
    """

    def __init__(self, loader: DataLoader, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        _check(loader)
        super().__init__(loader.dataset, batch_size=loader.batch_size, drop_last=loader.drop_last, collate_fn=loader.collate_fn)
        self.num_samples = len(loader.dataset)  # type: ignore[arg-type]
        assert loader.batch_size is not None
        self.initial_batch_size: int = loader.batch_size
        if world_size * self.initial_batch_size > self.num_samples:
            raise InputError(
                f'train_dataloader: batch_size {self.initial_batch_size} on {world_size} rank(s) is larger than the data set of '
                f'{self.num_samples} samples; at most {self.num_samples // world_size} would do'
            )
        self.seed, self.rank, self.world_size = seed, rank, world_size
        sampler = loader.sampler
        self.shuffle = sampler.shuffle if isinstance(sampler, DistributedSampler) else isinstance(sampler, RandomSampler)
        self.limit(None)
        self.facts: dict[str, float] = {}
        self.plan: EpochPlan | None = None
        self._epoch = 0
        self._batch_list = _BatchList()
        self._inner = DataLoader(
            _SeededDataset(loader.dataset),
            batch_sampler=self._batch_list,  # type: ignore[arg-type]
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=functools.partial(_init_worker, loader.worker_init_fn),
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator().manual_seed(stream_seed(seed, 1, rank)),  # starting workers leaves the training generator alone
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.num_workers > 0,
            pin_memory_device=loader.pin_memory_device,
        )

    @property  # DataLoader forbids setting batch_size; ours follows the plan
    def batch_size(self) -> int:  # type: ignore[override]
        """Samples per rank and batch now."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._batch_size = value

    def set_plan(self, plan: EpochPlan, epoch: int) -> None:
        """Takes the plan that the next iteration yields.

        Args:
            plan: The epoch's plan, for all ranks.
            epoch: The epoch's number, which seeds the augmentations.
        """
        self.plan, self._epoch = plan, epoch
        self.rank_order = plan.rank_order(self.rank, self.world_size)
        self.rank_offsets = plan.rank_offsets(self.rank, self.world_size)

    def set_batch_size(self, batch_size: int) -> None:
        """Says what the batch size per rank is now, for whoever asks the loader."""
        self._batch_size = batch_size

    def limit(self, max_batches: int | None) -> None:
        """Limits every epoch, the full one too.

        Args:
            max_batches: Batches an epoch at most (``train_subset_num_batches``); ``None`` for no limit.
        """
        self.max_batches = max_batches
        full = split_batches(self.num_samples, self.initial_batch_size, self.world_size, self.drop_last)[:max_batches]
        self.full_samples, self.full_batches = sum(full), len(full)

    def rank_orders(self) -> list[Tensor]:
        """The samples of every rank in the current plan, each int64 ``[m]``."""
        assert self.plan is not None
        return [self.plan.rank_order(rank, self.world_size) for rank in range(self.world_size)]

    def batch_slice(self, batch: int) -> slice:
        """Where batch number ``batch`` of the epoch lies in ``rank_order``."""
        assert self.plan is not None
        position = batch - self.plan.first_batch
        return slice(self.rank_offsets[position], self.rank_offsets[position + 1])

    def __len__(self) -> int:
        return self.full_batches if self.plan is None else self.plan.num_batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the epoch's batches.

        Batches that were trained before a resume come as ``None``: the trainer skips them by number without looking, so nothing is read
        or decoded for them. The same holds before there is a plan, when the trainer spins its loaders.
        """
        if self.plan is None:
            yield None
            return
        first, order, offsets = self.plan.first_batch, self.rank_order, self.rank_offsets
        for _ in range(first):
            yield None
        yield from self._read(
            (stream_seed(self.seed, 2, self._epoch, self.rank, first + b), order[offsets[b] : offsets[b + 1]].tolist())
            for b in range(len(offsets) - 1)
        )

    def read(self, indices: Sequence[int], batch_size: int, seed: int = 0) -> Iterator[Any]:
        """Reads some samples in the order given, through the same workers, outside the epoch's plan.

        Args:
            indices: Sample indices.
            batch_size: Samples a batch; the last may have fewer.
            seed: Seeds what random augmentation the data set does.

        Yields:
            Collated batches on the host.
        """
        yield from self._read(
            (stream_seed(self.seed, 3, seed, start), list(indices[start : start + batch_size]))
            for start in range(0, len(indices), batch_size)
        )

    def _read(self, batches: Iterable[tuple[int, list[int]]]) -> Iterator[Any]:
        self._batch_list.batches = batches
        yield from self._inner
