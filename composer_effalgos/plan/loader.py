"""The loader that replaces the user's loader and yields the batches of the epoch's plan."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from composer.core import State, TimeUnit
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from composer_effalgos.plan.epoch import (
    BatchSize,
    EpochPlan,
    Tail,
    epoch_sizes,
    plan_epoch,
    resize_rest,
    resume_epoch,
    split_batches,
    stream_seed,
)
from composer_effalgos.plan.order import GivenBatch
from composer_effalgos.plan.readers import BatchReader, Reading, WorkerReader
from composer_effalgos.plan.samples import Samples, full_dataset, samples_of
from composer_effalgos.plan.selector import EpochMetrics
from composer_effalgos.plan.singles import leave_out, num_surplus, spread, unpruned_has_single
from composer_effalgos.utils.errors import CheckpointError, InputError


def class_labels(dataset: Any) -> Tensor | None:
    """Class indices stored as an attribute of a dataset.

    Args:
        dataset: A map-style dataset.

    Returns:
        Its ``targets`` or ``labels``, or the second tensor of a ``TensorDataset`` of two, int64 ``[N]``; ``None`` unless they are one
        integer per sample (not class names, several labels per sample, regression targets or a method).
    """
    if isinstance(dataset, Subset):
        labels = class_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        found = dataset.tensors[1] if len(dataset.tensors) == 2 else None  # of several, any may be the labels
    else:
        found = getattr(dataset, 'targets', getattr(dataset, 'labels', None))
    try:
        labels = torch.as_tensor(found)
    except (RuntimeError, TypeError, ValueError):
        return None
    whole = labels.shape == (len(dataset),) and not labels.is_floating_point() and not labels.is_complex()
    return labels.long().cpu() if whole else None


def tokens_per_sample(dataset: Any) -> int | None:
    """The number of tokens per sample, if all samples have the same number.

    Args:
        dataset: A map-style dataset.

    Returns:
        Its ``seq_len``, which the text datasets of this package have; ``None`` if there is no such positive integer.
    """
    length = getattr(full_dataset(dataset), 'seq_len', None)
    return length if type(length) is int and length > 0 else None


class PlannedDataLoader(DataLoader):
    """Yields the batches of an :class:`EpochPlan`. Replaces the user's loader, and reads through its data path.

    Args:
        loader: The user's loader over a map-style dataset or a ``StreamingDataset``: a ``DataLoader`` or :class:`BatchReader`. Its sampler
            determines the samples and whether their order is shuffled.
        seed: The run's seed, the same on every rank.
        rank: This process's global rank.
        world_size: Number of ranks.
        samples: The samples that the loader reads; ``None`` to derive them from the loader.

    Attributes:
        dataset: The samples that the user's loader reads, by index; the user's dataset if it reads all of it.
        indices: Indices of these samples in the user's dataset, int64 ``[N]``, ascending; ``None`` if they are the same.
        num_samples: Number of these samples.
        full_samples: Samples, over all ranks, of an epoch that trains on everything at the initial batch size.
        full_batches: Number of batches of such an epoch.
        shard_starts: First sample of every shard, int64 ``[S]``, if the dataset has an attribute of this name or is a ``StreamingDataset``.
            A shuffled order then goes shard by shard.
        shuffle_block: Number of samples that such an order shuffles together, at least a shard.
        given: The user's loader.
        metrics: Metrics of the epoch, set by the selectors.
        by_position: Whether samples are identified by their position in a batch, so that the loader's batches must keep their order.
        given_batch: Of the last batch that was yielded, as the loader made it; stored until the order check takes it, if ``by_position``
            is set.
        check_next: Whether the next batch will be checked.

    Raises:
        InputError: For a loader that cannot be planned, or that has fewer samples than ranks.
    """

    by_position = False
    may_fall_short = False  # whether a batch may have fewer samples than planned
    between_fits = False  # then Composer clips the next train_subset_num_batches to the user's loader, not to the last plan
    given_batch: GivenBatch | None = None
    check_next = True
    tail: Tail = 'shared'  # how an incomplete last batch is handled
    microbatch: int | None = None  # samples per rank, if smaller than a batch

    def __init__(self, loader: DataLoader, *, seed: int, rank: int = 0, world_size: int = 1, samples: Samples | None = None) -> None:
        samples = samples or samples_of(loader, rank=rank, world_size=world_size)
        super().__init__(samples.dataset, batch_size=samples.batch_size, drop_last=samples.drop_last)
        self.num_samples: int = samples.size  # type: ignore[assignment]  # None for some streams, which have no numbers
        self.initial_batch_size = samples.batch_size
        if samples.size is None:
            pass
        elif self.num_samples < world_size:
            raise InputError(f'train_dataloader: expected at least one sample for each of {world_size} ranks, got {self.num_samples}')
        elif self.drop_last and world_size * self.initial_batch_size > self.num_samples:
            raise InputError(
                f'train_dataloader: expected at least one whole batch with drop_last, got {self.num_samples} samples for batch_size '
                f'{self.initial_batch_size} on {world_size} rank(s); leave drop_last out, or use a batch_size of at most '
                f'{self.num_samples // world_size}'
            )
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.shuffle, self.shard_starts, self.shuffle_block = samples.shuffle, samples.shard_starts, samples.shuffle_block
        self.indices = samples.indices
        self.limit(None)
        self.metrics = EpochMetrics()
        self.plan: EpochPlan | None = None
        self._epoch = 0
        self.given = loader
        self._path = self._make_path(samples.indices)

    def _make_path(self, indices: Tensor | None) -> Any:
        given = self.given
        return given if isinstance(given, BatchReader) else WorkerReader(given, stream_seed(self.seed, 1, self.rank), indices)

    @property  # DataLoader forbids setting batch_size; ours follows the plan
    def batch_size(self) -> int:  # type: ignore[override]
        """Samples per rank and batch now."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._batch_size = value

    def plan_epoch(self, kept: Tensor | None, weights: Tensor | None, batch_size: BatchSize, epoch: int, *, even: bool) -> EpochPlan:
        """Plans an epoch.

        Args:
            kept: Samples to train on, without duplicates, int64 ``[n]``; ``None`` for all. :meth:`surplus` of them are left out at random.
            weights: Their loss weights, float32 ``[n]``; ``None`` for ones.
            batch_size: Samples per rank and batch.
            epoch: Epoch number.
            even: Whether every rank gets the same number of samples.
        """
        if kept is not None and (surplus := self.surplus(len(kept), batch_size, even=even)):
            kept, weights = leave_out(kept, weights, surplus, torch.Generator().manual_seed(stream_seed(self.seed, 5, epoch)))
        plan = plan_epoch(
            torch.arange(self.num_samples) if kept is None else kept,
            weights,
            batch_size,
            seed=self.seed,
            epoch=epoch,
            world_size=self.world_size,
            shuffle=self.shuffle,
            shard_starts=self.shard_starts,
            shuffle_block=self.shuffle_block,
            drop_last=self.drop_last,
            even=even,
            max_batches=self.max_batches,
            tail=self.tail,
        )
        return replace(plan, sizes=self._spread(plan.sizes))

    def surplus(self, count: int, batch_size: BatchSize, *, even: bool) -> int:
        """The number of kept samples that an epoch leaves out, so that no batch has only one sample per rank.

        BatchNorm cannot be trained on one sample. The result is 0 if the ``DataLoader`` would also produce such a batch without pruning.

        Args:
            count: Number of kept samples, over all ranks.
            batch_size: Samples per rank and batch.
            even: As for :meth:`plan_epoch`.
        """
        if not (criteria := self._single_criteria()):
            return 0
        return num_surplus(count, lambda number: self._epoch_sizes(number, batch_size, even=even), self.world_size, criteria[0])

    def _epoch_sizes(self, count: int, batch_size: BatchSize, *, even: bool) -> tuple[int, ...]:
        """Batch sizes of an epoch that trains on ``count`` samples, over all ranks."""
        sizes = epoch_sizes(
            count, batch_size, self.world_size, drop_last=self.drop_last, even=even, max_batches=self.max_batches, tail=self.tail
        )
        return self._spread(sizes)

    def _spread(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Batch sizes, with the last two split differently if a rank would be left with one sample."""
        if self.tail != 'shared' or self.drop_last or not (criteria := self._single_criteria()):
            return tuple(sizes)
        return tuple(spread(sizes, self.world_size, criteria[0]))

    def _single_criteria(self) -> list[int | None]:
        """Microbatch sizes (None: whole batches) for which an unpruned epoch leaves no rank with one sample, strictest first."""

        def leaves_one(microbatch: int | None) -> bool:
            return unpruned_has_single(
                self.num_samples, self.initial_batch_size, self.world_size, drop_last=self.drop_last, microbatch=microbatch
            )

        return [microbatch for microbatch in dict.fromkeys((self.microbatch, None)) if not leaves_one(microbatch)]

    def resume(
        self, plan: EpochPlan, batches: int, batch_size: BatchSize, *, world_size: int, even: bool
    ) -> tuple[EpochPlan, tuple[int, ...]]:
        """The rest of an epoch of which some batches were already trained.

        Args:
            plan: The epoch's plan in the interrupted run.
            batches: Number of batches of the epoch already trained.
            batch_size: Samples per rank and batch, if the rest must be split again.
            world_size: Number of ranks of the interrupted run.
            even: Whether every rank gets the same number of samples.

        Returns:
            The rest, and the sizes of the batches in ``plan`` that were already trained, if they are known.
        """
        same = world_size == self.world_size
        rest = resume_epoch(
            replace(plan, tail=self.tail),
            batches=batches,
            batch_size=batch_size,
            world_size=self.world_size,
            same_world_size=same,
            drop_last=self.drop_last,
            even=even,
        )
        return (rest, plan.sizes[: batches - plan.first_batch]) if same else (replace(rest, sizes=self._spread(rest.sizes)), ())

    def plan_from_state(self, saved: Mapping[str, Any]) -> EpochPlan:
        """Restores a plan from the result of its ``state_dict``.

        Raises:
            CheckpointError: If the plan was saved by a run with ``shard=True``.
        """
        if 'order' not in saved:
            raise CheckpointError(
                'the checkpoint was saved within an epoch by a run with shard=True; give shard=True, or resume from one saved at the end '
                'of an epoch'
            )
        return EpochPlan.from_state(saved)

    def resize_rest(self, batches: int, batch_size: BatchSize) -> EpochPlan:
        """The plan with the rest of the epoch in batches of other sizes.

        Args:
            batches: Number of batches of the epoch already trained.
            batch_size: Samples per rank and batch.
        """
        assert self.plan is not None
        done = batches - self.plan.first_batch
        plan = resize_rest(self.plan, batches=batches, batch_size=batch_size, world_size=self.world_size)
        return replace(plan, sizes=(*plan.sizes[:done], *self._spread(plan.sizes[done:])))

    def set_plan(self, plan: EpochPlan, epoch: int, done: tuple[int, ...] = ()) -> None:
        """Sets the plan that the next iteration yields.

        Args:
            plan: The epoch's plan, for all ranks.
            epoch: Epoch number, which seeds the augmentations.
            done: Global sizes of the batches before ``plan.first_batch``, for loaders that must read them again.
        """
        self.plan, self._epoch = plan, epoch
        self.rank_order = plan.rank_order(self.rank, self.world_size)
        self.rank_offsets = plan.rank_offsets(self.rank, self.world_size)

    @property
    def full_epoch(self) -> dict[TimeUnit, int]:
        """The length, in samples and in batches, of an epoch that trains on everything at the initial batch size."""
        return {TimeUnit.SAMPLE: self.full_samples, TimeUnit.BATCH: self.full_batches}

    def set_batch_size(self, batch_size: int) -> None:
        """Sets the batch size per rank that the loader reports."""
        self._batch_size = batch_size

    def limit(self, max_batches: int | None) -> None:
        """Limits the length of every epoch, including the full one.

        Args:
            max_batches: Maximum number of batches per epoch (``train_subset_num_batches``); ``None`` for no limit.
        """
        self.max_batches = max_batches
        full = split_batches(self.num_samples, self.initial_batch_size, self.world_size, self.drop_last, max_batches, self.tail)
        self.full_samples, self.full_batches = sum(full), len(full)

    def reads_as(self, other: PlannedDataLoader) -> bool:
        """Whether another planned loader reads the same samples."""
        mine, others = (getattr(loader.given, 'dataset', loader.given) for loader in (self, other))
        if mine is not others or type(self) is not type(other) or self.num_samples != other.num_samples:
            return False
        return self.indices is None or other.indices is None or torch.equal(self.indices, other.indices)

    def catch_up(self, state: State) -> None:
        """Brings the user's loader to its position in the interrupted run; at ``FIT_START``, before random states are restored.

        Nothing to do here, because the plan determines what to read.
        """
        # The plan already resumes within an epoch. If a StreamingDataset did so too, samples would be skipped.
        state.dataset_resumption.pop('train', None)

    def note_microbatch(self, state: State) -> None:
        """Records the microbatch size, and sets it if Composer has not determined it; at ``FIT_START``."""
        size = state.device_train_microbatch_size
        if size is None:  # Composer reads the DataLoader's batch_size, which is None if it has a batch_sampler
            size = state.device_train_microbatch_size = self.initial_batch_size
        smaller = isinstance(size, int) and size < self.initial_batch_size and not state.auto_microbatching
        self.microbatch = int(size) if smaller else None

    def samples_before(self, batch: int) -> int:
        """Samples of the epoch, over all ranks, before batch number ``batch``, which must not precede a resume."""
        assert self.plan is not None
        return self.plan.start + self.world_size * self.rank_offsets[batch - self.plan.first_batch]

    def rank_orders(self) -> list[Tensor]:
        """The samples of every rank in the current plan, each int64 ``[m]``."""
        assert self.plan is not None
        return [self.plan.rank_order(rank, self.world_size) for rank in range(self.world_size)]

    def batch_slice(self, batch: int) -> slice:
        """The position of batch number ``batch`` of the epoch in ``rank_order``."""
        assert self.plan is not None
        position = batch - self.plan.first_batch
        return slice(self.rank_offsets[position], self.rank_offsets[position + 1])

    @property
    def num_batches(self) -> int:
        """Batches of the planned epoch, or of a full one before there is a plan."""
        return self.full_batches if self.plan is None else self.plan.num_batches

    def __len__(self) -> int:
        return max(len(self.given), self.num_batches) if self.between_fits else self.num_batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yields the epoch's batches.

        Batches that were trained before a resume are yielded as ``None``: the trainer skips them, so they are not read or decoded on any
        path. The same applies before there is a plan, when the trainer spins its loaders. If the rest of the plan changes between two
        batches (:func:`~composer_effalgos.plan.epoch.resize_rest`), this takes effect from the next batch on, despite prefetching.
        """
        if self.plan is None:
            yield None
            return
        batch = self.plan.first_batch
        for _ in range(batch):
            yield None
        with self._workers():
            while batch < self.plan.num_batches:
                plan = self.plan
                begins = True  # the first batch of another fit is checked, too
                for read in self._path.read_batches(self._rest(batch)):
                    self.given_batch = GivenBatch(read, self.check_next or begins) if self.by_position else None
                    begins = False
                    yield read
                    batch += 1
                    if self.plan is not plan:  # discard prefetched batches and read them again in the new size
                        break

    @contextlib.contextmanager
    def _workers(self) -> Iterator[None]:
        """Ends worker processes that are not persistent with an epoch or pass, also an unfinished one, as a ``DataLoader`` does."""
        try:
            yield
        finally:
            if isinstance(self._path, WorkerReader):
                self._path.end_workers()

    def _rest(self, batch: int) -> Reading:
        """The reading from batch number ``batch`` on."""
        assert self.plan is not None
        offsets = self.rank_offsets[batch - self.plan.first_batch :]
        batch_seeds = (stream_seed(self.seed, 2, self._epoch, self.rank, b) for b in range(batch, self.plan.num_batches))
        indices, offsets = self.rank_order[offsets[0] :], [offset - offsets[0] for offset in offsets]
        return Reading(indices, offsets, stream_seed(self.seed, 2, self._epoch), batch_seeds, self.by_position)

    def read(self, indices: Sequence[int], batch_size: int, seed: int = 0) -> Iterator[Any]:
        """Reads given samples in order through the same data path, outside the epoch's plan.

        Args:
            indices: Sample indices.
            batch_size: Samples per batch; the last may have fewer.
            seed: Seeds the dataset's random augmentation.

        Yields:
            Batches as the data path returns them, on the host or on the training device.
        """
        batches = (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))
        with self._workers():
            yield from self._path.read_batches(Reading.of_batches(batches, self.seed, 3, seed, by_position=True))
