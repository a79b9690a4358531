"""The seam between the plan and the data: one plan drives every data path, and nothing above this module knows which one runs.

A *path* turns sample numbers into batches. It has one method, ``read_batches(reading)``, where a :class:`Reading` says which samples, in
which order, cut where into batches, and under which seed. :class:`PlannedDataLoader` is the same on every path: it holds the epoch's plan,
deals it out over the ranks, skips what was trained before a resume without reading it, and serves the selection pass; algorithms talk to
it alone. There are two kinds of path:

* ``torch.utils.data.DataLoader``, the user's own: read by worker processes with its data set, collate function and memory settings;
* a :class:`DataPath`, a loader that reads by itself, such as ``DeviceDataLoader``. It is given to the Trainer in the place of a
  ``DataLoader``; without a plan it iterates as a ``DataLoader`` with a ``DistributedSampler`` would.

A new path is a subclass of :class:`DataPath` with ``read_batches``, and a name in ``composer_effalgos.loaders`` for recipes.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

from composer_effalgos.errors import InputError
from composer_effalgos.plan.epoch import EpochPlan, split_batches, stream_seed
from composer_effalgos.plan.samples import samples_of
from composer_effalgos.plan.selector import EpochMetrics


def class_labels(dataset: Any) -> Tensor | None:
    """The class indices that a data set carries beside its samples.

    Args:
        dataset: A map-style data set.

    Returns:
        Its ``targets`` or ``labels``, or the second tensor of a ``TensorDataset``, int64 ``[N]``; ``None`` where that is not one whole
        number a sample: class names, several labels a sample, numbers to predict, a method.
    """
    if isinstance(dataset, Subset):
        labels = class_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        found = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    else:
        found = getattr(dataset, 'targets', getattr(dataset, 'labels', None))
    try:
        labels = torch.as_tensor(found)
    except (RuntimeError, TypeError, ValueError):
        return None
    whole = labels.shape == (len(dataset),) and not labels.is_floating_point() and not labels.is_complex()
    return labels.long().cpu() if whole else None


@dataclass(frozen=True)
class Reading:
    """What a path is asked to read on this rank: samples in an order, cut into batches.

    Attributes:
        indices: Sample numbers in the order of reading, int64 ``[m]``, on the CPU.
        offsets: Where the batches begin and end in ``indices``: ascending, one more than there are batches.
        seed: Seeds random augmentation; the same on every rank, another one in each epoch and pass. With a sample's number it names a
            stream of that sample's own, which depends neither on the number of ranks nor on where a run was resumed.
        batch_seeds: One seed a batch, for paths that cannot seed samples; it depends on rank and batch.
    """

    indices: Tensor
    offsets: Sequence[int]
    seed: int
    batch_seeds: Iterable[int]

    @classmethod
    def of_batches(cls, batches: Iterable[Sequence[int]], *keys: int) -> Reading:
        """A reading of given batches.

        Args:
            batches: Sample numbers, batch by batch.
            *keys: Non-negative integers that name its random stream.
        """
        batches = list(batches)
        offsets = np.cumsum([0, *map(len, batches)]).tolist()
        indices = torch.tensor(list(itertools.chain.from_iterable(batches)), dtype=torch.int64)
        return cls(indices, offsets, stream_seed(*keys), (stream_seed(*keys, start) for start in offsets[:-1]))

    @property
    def batches(self) -> Iterator[Tensor]:
        """The batches' sample numbers, each int64 ``[b]``."""
        return (self.indices[start:stop] for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True))


class DataPath(DataLoader):
    """A loader that reads the samples it is told to, by itself; subclasses define :meth:`read_batches`.

    Args:
        dataset: Has a length; what else is needed of it is the subclass's affair. ``InfoBatch(class_balanced=True)`` asks it for
            ``targets``.
        batch_size: Samples per rank and batch.
        shuffle: Draws a new order each epoch.
        drop_last: Drops a last batch that is not full.
        seed: Seeds order and augmentation where no plan does, which brings the run's seed.
    """

    def __init__(self, dataset: Dataset, *, batch_size: int, shuffle: bool = False, drop_last: bool = False, seed: int = 0) -> None:
        # Composer asks for this sampler where there are several ranks, tells it the epoch, and leaves its padding out of evaluation
        sampler = dist.get_sampler(dataset, shuffle=shuffle, drop_last=drop_last, seed=seed)
        super().__init__(dataset, batch_size=batch_size, sampler=sampler, drop_last=drop_last)
        self.seed = seed

    def read_batches(self, reading: Reading) -> Iterator[Any]:
        """Reads samples.

        Args:
            reading: Which samples, in which batches, under which seed.

        Yields:
            ``reading``'s batches in their order, each with as many samples as it says; on the host or on the device of training.
        """
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        assert isinstance(self.sampler, DistributedSampler)
        assert self.batch_sampler is not None
        return self.read_batches(Reading.of_batches(self.batch_sampler, self.seed, 4, self.sampler.epoch))


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


class _WorkerPath:
    """Reads with the user's data set, collate function, workers and memory settings.

    One set of worker processes serves the whole run: they live on while the samples, their order and the batch size change.

    Args:
        loader: The user's loader.
        seed: Of the generator from which PyTorch draws the workers' base seed: starting workers leaves the training generator alone.
        indices: What the dataset calls the samples, int64 ``[N]``; ``None`` for the same numbers.
    """

    def __init__(self, loader: DataLoader, seed: int, indices: Tensor | None = None) -> None:
        self._indices = indices
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
            generator=torch.Generator().manual_seed(seed),
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.num_workers > 0,
            pin_memory_device=loader.pin_memory_device,
        )

    def read_batches(self, reading: Reading) -> Iterator[Any]:
        batches = ((batch if self._indices is None else self._indices[batch]).tolist() for batch in reading.batches)
        self._batch_list.batches = zip(reading.batch_seeds, batches, strict=True)
        yield from self._inner


class PlannedDataLoader(DataLoader):
    """Yields the batches of an :class:`EpochPlan`, in place of the user's loader and on its data path.

    Args:
        loader: The user's loader over a map-style dataset or a ``StreamingDataset``: a ``DataLoader`` or a :class:`DataPath`. Its sampler
            says which samples there are and whether their order is shuffled.
        seed: The run's seed, the same on every rank.
        rank: This process's global rank.
        world_size: Number of ranks.

    Attributes:
        dataset: The samples that the user's loader reads, by number; the user's dataset where it reads all of it.
        indices: What the user's dataset calls these samples, int64 ``[N]``, ascending; ``None`` for the same numbers.
        num_samples: Number of these samples.
        full_samples: Samples, over all ranks, of an epoch that trains on everything at the initial batch size.
        full_batches: Its number of batches.
        shard_starts: First sample of every shard, int64 ``[S]``, where the dataset has an attribute of this name or is a
            ``StreamingDataset``. A new order then goes shard by shard.
        shuffle_block: Samples that such an order mixes with each other, at least a shard.
        given: The user's loader.
        metrics: What the selectors measured of the epoch.

    Raises:
        InputError: For a loader that cannot be planned, or that reads fewer samples than there are ranks.
    """

    def __init__(self, loader: DataLoader, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        samples = samples_of(loader, rank=rank, world_size=world_size)
        super().__init__(samples.dataset, batch_size=samples.batch_size, drop_last=samples.drop_last, collate_fn=loader.collate_fn)
        self.num_samples = len(samples)
        self.initial_batch_size = samples.batch_size
        if self.num_samples < world_size:
            raise InputError(f'train_dataloader: expected at least one sample for each of {world_size} ranks, got {self.num_samples}')
        if self.drop_last and world_size * self.initial_batch_size > self.num_samples:
            raise InputError(
                f'train_dataloader: drop_last drops the only batch: batch_size {self.initial_batch_size} on {world_size} rank(s) is more '
                f'than the {self.num_samples} samples; leave it out, or use a batch_size of at most {self.num_samples // world_size}'
            )
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.shuffle, self.shard_starts, self.shuffle_block = samples.shuffle, samples.shard_starts, samples.shuffle_block
        self.indices = samples.indices
        self.limit(None)
        self.metrics = EpochMetrics()
        self.plan: EpochPlan | None = None
        self._epoch = 0
        self.given = loader
        self._path = loader if isinstance(loader, DataPath) else _WorkerPath(loader, stream_seed(seed, 1, rank), samples.indices)

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
        full = split_batches(self.num_samples, self.initial_batch_size, self.world_size, self.drop_last, max_batches)
        self.full_samples, self.full_batches = sum(full), len(full)

    def reads_as(self, other: PlannedDataLoader) -> bool:
        """Whether the samples are those of another planned loader.

        Args:
            other: The other loader.
        """
        if self.given.dataset is not other.given.dataset or self.num_samples != other.num_samples:
            return False
        return self.indices is None or other.indices is None or torch.equal(self.indices, other.indices)

    def samples_before(self, batch: int) -> int:
        """Samples over all ranks that the epoch trains on before batch number ``batch``, which must not be one trained before a resume."""
        assert self.plan is not None
        return self.plan.start + self.world_size * self.rank_offsets[batch - self.plan.first_batch]

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
        or decoded for them, on any path. The same holds before there is a plan, when the trainer spins its loaders. A plan whose rest
        changes between two batches (:func:`~composer_effalgos.plan.epoch.resize_rest`) holds from the next batch on, whatever was
        prefetched.
        """
        if self.plan is None:
            yield None
            return
        batch = self.plan.first_batch
        for _ in range(batch):
            yield None
        while batch < self.plan.num_batches:
            plan = self.plan
            for read in self._path.read_batches(self._rest(batch)):
                yield read
                batch += 1
                if self.plan is not plan:  # what was read ahead is read again, in batches of the new size
                    break

    def _rest(self, batch: int) -> Reading:
        """What is to be read from ``batch`` on."""
        assert self.plan is not None
        offsets = self.rank_offsets[batch - self.plan.first_batch :]
        batch_seeds = (stream_seed(self.seed, 2, self._epoch, self.rank, b) for b in range(batch, self.plan.num_batches))
        indices, offsets = self.rank_order[offsets[0] :], [offset - offsets[0] for offset in offsets]
        return Reading(indices, offsets, stream_seed(self.seed, 2, self._epoch), batch_seeds)

    def read(self, indices: Sequence[int], batch_size: int, seed: int = 0) -> Iterator[Any]:
        """Reads some samples in the order given, on the same path, outside the epoch's plan.

        Args:
            indices: Sample indices.
            batch_size: Samples a batch; the last may have fewer.
            seed: Seeds what random augmentation the data set does.

        Yields:
            Batches as the path gives them, on the host or on the device of training.
        """
        batches = (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))
        yield from self._path.read_batches(Reading.of_batches(batches, self.seed, 3, seed))
