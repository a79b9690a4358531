"""Loaders for algorithms that need no sample indices (AdaBatch, LinUpper, ESLM): the user's order or stream, in batches of other sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from composer.core import State
from composer.utils import dist
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, IterDataPipe

from composer_effalgos.plan.epoch import BatchSize, EpochPlan, Tail, split_batches, stream_seed
from composer_effalgos.plan.loader import PlannedDataLoader
from composer_effalgos.plan.ranks import Ranks
from composer_effalgos.plan.samples import Samples, StreamedSamples, is_streaming, iterates_as_usual, length_of, samples_of
from composer_effalgos.plan.shard_loader import ShardLoader
from composer_effalgos.plan.streams import BatchStream, WorkerStream
from composer_effalgos.utils.errors import CheckpointError, InputError

_HORIZON = 256  # batches to plan ahead for a stream of unknown length; the plan then doubles in length


def planned_loader(
    given: Any,
    *,
    needs_numbers: Sequence[str],
    max_batches: int | None,
    tail: Tail,
    seed: int,
    rank: int,
    world_size: int,
    ranks: Ranks | None = None,
) -> PlannedDataLoader:
    """Creates the loader that replaces the user's loader.

    Args:
        given: The user's loader.
        needs_numbers: Names of the algorithms that need sample numbers. If there are none, a loader with its own order keeps it.
        max_batches: Maximum number of batches per epoch; ``None`` if unknown.
        tail: How an incomplete last batch is handled, if the plan determines the order.
        seed: The run's seed, the same on every rank.
        rank: This process's global rank.
        world_size: Number of ranks.
        ranks: The ranks, if each plans its own part of the samples (``shard=True``).

    Raises:
        InputError: For a loader that cannot be planned.
    """
    kind = PlannedDataLoader
    if not needs_numbers:
        kind = _kind(given, rank, world_size)
    else:
        try:
            samples_of(given, rank=rank, world_size=world_size)
        except InputError as error:
            names = ', '.join(dict.fromkeys(needs_numbers))
            raise InputError(f'{error} ({names} needs sample numbers; AdaBatch, LinUpper and ESLM do not)') from None
    if ranks is not None:
        loader: PlannedDataLoader = ShardLoader(given, seed=seed, ranks=ranks)
    else:
        loader = kind(given, seed=seed, rank=rank, world_size=world_size)
    if kind is PlannedDataLoader:
        loader.tail = tail
    # without train_subset_num_batches, Composer reports the loader's own length, which is no limit
    loader.limit(None if max_batches == length_of(given) else max_batches)
    return loader


def _kind(given: Any, rank: int, world_size: int) -> type[PlannedDataLoader]:
    # without batch_sampler and batch_size the dataset makes batches itself
    if not isinstance(given, DataLoader) or not iterates_as_usual(given) or given.batch_sampler is None is given.batch_size:
        return StreamLoader
    if isinstance(given.dataset, IterableDataset):
        return GivenOrder if is_streaming(given.dataset) else StreamLoader
    try:
        samples_of(given, rank=rank, world_size=world_size)
    except InputError:  # a custom sampler
        return GivenOrder
    return PlannedDataLoader


class GivenOrder(PlannedDataLoader):
    """Keeps the order of the user's sampler or ``StreamingDataset``, which may repeat or omit samples in an epoch.

    Raises:
        InputError: For a loader without a length, or with batches of different sizes.
    """

    tail = 'own'

    def __init__(self, loader: DataLoader, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        sampler: Any = loader.batch_sampler
        dataset: Any = loader.dataset
        self._unit = 1  # batch sizes must be multiples of this
        self._drawn = 0  # epochs drawn from the sampler so far
        if is_streaming(dataset):
            if dataset.batch_size != loader.batch_size:
                raise InputError(
                    f'train_dataloader: expected the batch_size of {type(dataset).__name__}, {dataset.batch_size}, got '
                    f'{loader.batch_size}; give both the same'
                )
            length, batch_size, drop_last = len(dataset), dataset.batch_size, loader.drop_last
            dataset = StreamedSamples(dataset)
        else:
            batch_size, drop_last = getattr(sampler, 'batch_size', None), getattr(sampler, 'drop_last', False)
            if type(batch_size) is not int:
                raise InputError(
                    f'train_dataloader: expected a batch_sampler with the attribute batch_size, got {type(sampler).__name__} without it'
                )
            self._unit = 1 if type(sampler) is BatchSampler else batch_size
            own_length = length_of(sampler.sampler if type(sampler) is BatchSampler else sampler)
            if own_length is None:
                raise InputError(f'train_dataloader: expected a sampler with __len__, got {type(sampler).__name__} without it')
            length = own_length * self._unit
        samples = Samples(dataset, length * world_size, batch_size, drop_last)
        super().__init__(loader, seed=seed, rank=rank, world_size=world_size, samples=samples)

    def plan_epoch(self, kept: Tensor | None, weights: Tensor | None, batch_size: BatchSize, epoch: int, *, even: bool) -> EpochPlan:
        assert kept is None, 'selectors require sample indices (checked in planned_loader)'
        order = self._streamed(epoch) if is_streaming(self.given.dataset) else self._sampled(epoch)
        sizes = split_batches(len(order), self._whole(batch_size), self.world_size, self.drop_last, self.max_batches, self.tail)
        if not sizes:
            raise InputError(f'train_dataloader: expected a sampler that gives batches, got none in epoch {epoch}')
        full = split_batches(len(order), self.initial_batch_size, self.world_size, self.drop_last, self.max_batches, self.tail)
        self.full_samples, self.full_batches = sum(full), len(full)
        return EpochPlan(order, None, tuple(sizes), tail=self.tail)

    def _whole(self, batch_size: BatchSize) -> BatchSize:
        """Batch sizes, checked to be multiples of the user's batch sampler's own batch size."""

        def checked(batch: int, sample: int) -> int:
            size = batch_size(batch, sample) if callable(batch_size) else batch_size
            if size % self._unit:
                raise InputError(
                    f'train_dataloader: batch_sampler {type(self.given.batch_sampler).__name__} makes batches of {self._unit}, expected a '
                    f'multiple of it as the batch size, got {size}; use a whole growth factor, or a sampler and batch_size'
                )
            return size

        return checked

    def resize_rest(self, batches: int, batch_size: BatchSize) -> EpochPlan:
        return super().resize_rest(batches, self._whole(batch_size))

    def catch_up(self, state: State) -> None:
        super().catch_up(state)
        if not is_streaming(self.given.dataset):  # a streaming order depends on the epoch number alone
            # A sampler may have its own generator: repeat all of its draws to advance it. The order of this epoch is in the checkpoint.
            for epoch in range(self._drawn, int(state.timestamp.epoch) + (int(state.timestamp.batch_in_epoch) > 0)):
                for _ in self._batches(epoch):
                    pass

    def _batches(self, epoch: int) -> Iterator[Any]:
        """The sampler's batches for an epoch."""
        self._drawn = epoch + 1
        for sampler in (self.given.sampler, self.given.batch_sampler):
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
        length = len(self.given.batch_sampler)  # type: ignore[arg-type]  # Composer ends the epoch there, whatever else a sampler has
        iterator = iter(self.given.batch_sampler)  # type: ignore[arg-type]
        _draw_as_a_data_loader(self.given)
        return itertools.islice(iterator, length)

    def _sampled(self, epoch: int) -> Tensor:
        """The order drawn by the samplers of all ranks, interleaved: rank ``r`` of ``w`` has every ``w``-th sample."""
        batches = [list(batch) for batch in self._batches(epoch)]
        own, last = type(self.given.batch_sampler) is not BatchSampler, len(batches) - 1
        wrong = [size for number, size in enumerate(map(len, batches)) if size > self._unit or (size < self._unit and number < last)]
        if own and wrong:
            raise InputError(
                f'train_dataloader: expected batches of {self._unit}, its batch_size, from batch_sampler '
                f'{type(self.given.batch_sampler).__name__}, only the last one smaller, got one of {wrong[0]}'
            )
        mine = torch.tensor([index for batch in batches for index in batch], dtype=torch.int64)
        if self.world_size == 1:
            return mine
        everyone = dist.all_gather_object(mine)
        shortest = min(map(len, everyone))  # Composer ends an epoch when the first rank runs out of batches
        return torch.stack([order[:shortest] for order in everyone], dim=1).flatten()

    def _streamed(self, epoch: int) -> Tensor:
        """The order of a ``StreamingDataset`` over all ranks; it does not depend on the number of workers."""
        from streaming.base.batching import generate_work
        from streaming.base.world import World

        _draw_as_a_data_loader(self.given)
        dataset: Any = self.given.dataset
        dataset.state_dict(0, True)  # sets defaults such as num_canonical_nodes, or takes them from a checkpoint
        world, replicas = World.detect(), dataset.replication or 1
        work = generate_work(dataset.batching_method, dataset, world.replicate(replicas) if replicas > 1 else world, epoch, 0)
        # sample numbers [nodes, ranks, workers = 1, batches, batch]; -1 pads an incomplete last batch
        by_rank = torch.from_numpy(work).flatten(2).flatten(0, 1).repeat_interleave(replicas, dim=0)
        order = by_rank.T.flatten()
        return order[order >= 0]


class StreamLoader(PlannedDataLoader):
    """A loader whose samples have no numbers, read in batches of other sizes. Its plan contains only batch sizes.

    Args:
        loader: The user's ``DataLoader`` over an ``IterableDataset``, or any iterable of batches with an attribute ``batch_size``.
        seed: The run's seed, the same on every rank.
        rank: This process's global rank.
        world_size: Number of ranks.

    Raises:
        InputError: For a loader without a batch size.
    """

    tail = 'own'
    may_fall_short = True

    def __init__(self, loader: Any, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        batch_size = getattr(loader, 'batch_size', None)
        if type(batch_size) is not int or batch_size < 1:
            raise InputError(
                f'train_dataloader: expected a batch_size, of the DataLoader or as an attribute of {type(loader).__name__}, got '
                f'{batch_size!r}; the batches of every epoch are planned from it'
            )
        usual = isinstance(loader, DataLoader) and iterates_as_usual(loader) and not isinstance(loader.dataset, IterDataPipe)
        self._stream = WorkerStream(loader, stream_seed(seed, 1, rank)) if usual else BatchStream(loader)
        length = length_of(loader.dataset if usual else loader)
        self._begun = 0  # epochs begun so far
        self._sizes: BatchSize = batch_size
        drop_last = bool(getattr(loader, 'drop_last', False)) and usual
        dataset: Any = getattr(loader, 'dataset', [])
        size = None if length is None else length * (1 if usual else batch_size) * world_size
        super().__init__(loader, seed=seed, rank=rank, world_size=world_size, samples=Samples(dataset, size, batch_size, drop_last))

    def _make_path(self, indices: Tensor | None) -> None:
        """Does nothing: without sample numbers there is no path that reads by number."""

    def limit(self, max_batches: int | None) -> None:
        if self.num_samples is not None:
            super().limit(max_batches)
            return
        self.max_batches = max_batches
        self.full_batches = max_batches or 0
        self.full_samples = self.full_batches * self.initial_batch_size * self.world_size

    def plan_epoch(self, kept: Tensor | None, weights: Tensor | None, batch_size: BatchSize, epoch: int, *, even: bool) -> EpochPlan:
        assert kept is None, 'selectors require sample indices (checked in planned_loader)'
        if isinstance(self._stream, WorkerStream):  # unlike a DataLoader, it does not draw from the training generator
            _draw_as_a_data_loader(self.given)
        self._sizes = batch_size
        if self.num_samples is not None:
            sizes = split_batches(self.num_samples, batch_size, self.world_size, self.drop_last, self.max_batches, self.tail)
        else:
            sizes = self._ahead(0, 0, self.max_batches or _HORIZON)
        return EpochPlan(torch.empty(0, dtype=torch.int64), None, tuple(sizes), tail=self.tail)

    def resume(
        self, plan: EpochPlan, batches: int, batch_size: BatchSize, *, world_size: int, even: bool
    ) -> tuple[EpochPlan, tuple[int, ...]]:
        if world_size != self.world_size:
            raise CheckpointError(
                f'within an epoch, a stream without sample numbers needs the same number of ranks, expected {world_size}, got '
                f'{self.world_size}; resume from a checkpoint saved at the end of an epoch'
            )
        self._sizes = batch_size
        return super().resume(plan, batches, batch_size, world_size=world_size, even=even)

    def resize_rest(self, batches: int, batch_size: BatchSize) -> EpochPlan:
        self._sizes = batch_size
        if self.num_samples is not None:
            return super().resize_rest(batches, batch_size)
        assert self.plan is not None
        done = self.plan.sizes[: batches - self.plan.first_batch]
        ahead = self._ahead(batches, self.plan.start + sum(done), (self.max_batches or 2 * batches + _HORIZON) - batches)
        return replace(self.plan, sizes=(*done, *ahead))

    def _ahead(self, batch: int, sample: int, count: int) -> list[int]:
        """Global sizes of ``count`` batches from ``batch`` on, given ``sample`` samples of the epoch before them."""
        sizes: list[int] = []
        for number in range(batch, batch + count):
            size = self._sizes(number, sample) if callable(self._sizes) else self._sizes
            sizes.append(size * self.world_size)
            sample += sizes[-1]
        return sizes

    def set_plan(self, plan: EpochPlan, epoch: int, done: tuple[int, ...] = ()) -> None:
        super().set_plan(plan, epoch, done)
        self._done = done if plan.first_batch else ()

    def __len__(self) -> int:
        if self.num_samples is None and self.max_batches is None:
            raise TypeError(f'{type(self.given).__name__} has no length')
        return super().__len__()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the epoch's batches. Batches trained before a resume are read and discarded, as Composer does."""
        if self.plan is None:
            yield None
            return
        first = self.plan.first_batch
        for _ in range(first):
            yield None
        self._begun = self._epoch + 1
        for number, batch in enumerate(self._stream.read(self._epoch, self._size_of)):
            if number >= first:
                yield batch

    def catch_up(self, state: State) -> None:
        epoch = int(state.timestamp.epoch)
        if state.dataset_resumption.pop('train', False):
            if int(state.timestamp.batch_in_epoch):
                raise CheckpointError(
                    f'{type(self.dataset).__name__} restores its own position, which is not exact after batches of different sizes; '
                    'resume from a checkpoint saved at the end of an epoch'
                )
        elif self._stream.keeps_dataset:
            for earlier in range(self._begun, epoch):  # a dataset may count its epochs, so start each one; Composer does the same
                next(self._stream.read(earlier, lambda batch: self.initial_batch_size), None)
        self._begun = epoch

    def _size_of(self, batch: int) -> int | None:
        """Samples of a batch on this rank, as currently planned."""
        assert self.plan is not None
        position = batch - self.plan.first_batch
        if position < 0:
            return self._done[batch] // self.world_size
        if position + 1 >= len(self.plan.sizes) and self.num_samples is None and self.max_batches is None:
            self.set_plan(self.resize_rest(batch, self._sizes), self._epoch, self._done)
        if position >= len(self.plan.sizes):
            return None
        # request the last batch in full: the stream itself determines where it ends
        return self._sizes(batch, self.samples_before(batch)) if callable(self._sizes) else self._sizes

    def read(self, indices: Any, batch_size: int, seed: int = 0) -> Iterator[Any]:
        raise InputError(f'train_dataloader: the samples of {type(self.given).__name__} cannot be read by number')


def _draw_as_a_data_loader(loader: DataLoader) -> None:
    """Draws the random number that a ``DataLoader`` draws to seed its workers.

    The random numbers that training draws afterwards are then those of a run without this package.
    """
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
