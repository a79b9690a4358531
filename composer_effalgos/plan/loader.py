"""The loader that replaces the user's: it yields the batches of the epoch's plan."""

from __future__ import annotations

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
from composer_effalgos.plan.readers import BatchReader, Reading, WorkerReader
from composer_effalgos.plan.samples import Samples, samples_of
from composer_effalgos.plan.selector import EpochMetrics
from composer_effalgos.plan.singles import leave_out, num_surplus, spread, unpruned_has_single
from composer_effalgos.utils.errors import CheckpointError, InputError


def class_labels(dataset: Any) -> Tensor | None:
    """The class indices that a dataset has as an attribute.

    Args:
        dataset: A map-style dataset.

    Returns:
        Its ``targets`` or ``labels``, or the second tensor of a ``TensorDataset``, int64 ``[N]``; ``None`` unless these are one whole
        number per sample (not class names, several labels per sample, regression targets or a method).
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


def tokens_per_sample(dataset: Any) -> int | None:
    """The number of tokens per sample, if all samples have the same number.

    Args:
        dataset: A map-style dataset.

    Returns:
        Its ``seq_len``, which the text datasets here have; ``None`` without such a whole number.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    length = getattr(dataset, 'seq_len', None)
    return length if type(length) is int and length > 0 else None


class PlannedDataLoader(DataLoader):
    """Yields the batches of an :class:`EpochPlan`, in place of the user's loader and on its data path.

    Args:
        loader: The user's loader over a map-style dataset or a ``StreamingDataset``: ``DataLoader`` or :class:`BatchReader`. Its sampler
            determines the samples and whether their order is shuffled.
        seed: The run's seed, the same on every rank.
        rank: This process's global rank.
        world_size: Number of ranks.

    Attributes:
        dataset: The samples that the user's loader reads, by index; the user's dataset if it reads all of it.
        indices: Indices of these samples in the user's dataset, int64 ``[N]``, ascending; ``None`` if they are the same.
        num_samples: Number of these samples.
        full_samples: Samples, over all ranks, of an epoch that trains on everything at the initial batch size.
        full_batches: Its number of batches.
        shard_starts: First sample of every shard, int64 ``[S]``, where the dataset has an attribute of this name or is a
            ``StreamingDataset``. A new order then goes shard by shard.
        shuffle_block: Samples that such an order shuffles together, at least a shard.
        given: The user's loader.
        metrics: What the selectors measured of the epoch.
        by_position: Whether samples are identified by their position in a batch, so that the loader's batches must keep their order.
        given_batch: The last batch that was yielded, as the loader made it; kept until it is taken if ``by_position`` is set.

    Raises:
        InputError: For a loader that cannot be planned, or with fewer samples than ranks.
    """

    by_position = False
    given_batch: Any = None
    tail: Tail = 'shared'  # what becomes of a last batch that is not full
    microbatch: int | None = None  # samples per rank that are trained on at a time, where that is less than a batch

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
            kept: Samples to train on, int64 ``[n]``, no sample twice; ``None`` for all. :meth:`surplus` of them are left out at random.
            weights: Their loss weights, float32 ``[n]``; ``None`` for ones.
            batch_size: Samples per rank and batch.
            epoch: The epoch's number.
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
        """The number of kept samples that are left out of an epoch, so that no batch has only one sample per rank.

        BatchNorm cannot be trained on one sample. None are left out if the ``DataLoader`` would also make such a batch without pruning.

        Args:
            count: Samples that are kept, over all ranks.
            batch_size: Samples per rank and batch.
            even: As for :meth:`plan_epoch`.
        """
        if not (criteria := self._single_criteria()):
            return 0

        def sizes_of(number: int) -> Sequence[int]:
            sizes = epoch_sizes(
                number,
                batch_size,
                self.world_size,
                drop_last=self.drop_last,
                even=even,
                max_batches=self.max_batches,
                tail=self.tail,
            )
            return self._spread(sizes)

        return num_surplus(count, sizes_of, self.world_size, criteria[0])

    def _spread(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Batch sizes; the last two are split differently if a rank would be left with one sample."""
        if self.tail != 'shared' or self.drop_last or not (criteria := self._single_criteria()):
            return tuple(sizes)
        return tuple(spread(sizes, self.world_size, criteria[0]))

    def _single_criteria(self) -> list[int | None]:
        """By which microbatch, or by whole batches (None), an epoch of all samples leaves no rank with one sample; the strictest first."""

        def leaves_one(microbatch: int | None) -> bool:
            return unpruned_has_single(
                self.num_samples, self.initial_batch_size, self.world_size, drop_last=self.drop_last, microbatch=microbatch
            )

        return [microbatch for microbatch in dict.fromkeys((self.microbatch, None)) if not leaves_one(microbatch)]

    def resume(
        self, plan: EpochPlan, batches: int, batch_size: BatchSize, *, world_size: int, even: bool
    ) -> tuple[EpochPlan, tuple[int, ...]]:
        """The rest of an epoch after some of its batches were trained.

        Args:
            plan: The epoch's plan in the interrupted run.
            batches: Batches of the epoch trained before.
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
        """The plan that its ``state_dict`` saved."""
        if 'order' not in saved:
            raise CheckpointError(
                'the checkpoint was saved within an epoch by a run with shard=True; give shard=True, or resume from one saved at the end '
                'of an epoch'
            )
        return EpochPlan.from_state(saved)

    def resize_rest(self, batches: int, batch_size: BatchSize) -> EpochPlan:
        """The plan with its rest in batches of other sizes.

        Args:
            batches: Batches of the epoch trained before.
            batch_size: Samples per rank and batch.
        """
        assert self.plan is not None
        done = batches - self.plan.first_batch
        plan = resize_rest(self.plan, batches=batches, batch_size=batch_size, world_size=self.world_size)
        return replace(plan, sizes=(*plan.sizes[:done], *self._spread(plan.sizes[done:])))

    def set_plan(self, plan: EpochPlan, epoch: int, done: tuple[int, ...] = ()) -> None:
        """Takes the plan that the next iteration yields.

        Args:
            plan: The epoch's plan, for all ranks.
            epoch: The epoch's number, which seeds the augmentations.
            done: Sizes over all ranks of the batches before ``plan.first_batch``, for loaders that have to read them again.
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
        """Limits every epoch, also the full one.

        Args:
            max_batches: Largest number of batches per epoch (``train_subset_num_batches``); ``None`` for no limit.
        """
        self.max_batches = max_batches
        full = split_batches(self.num_samples, self.initial_batch_size, self.world_size, self.drop_last, max_batches, self.tail)
        self.full_samples, self.full_batches = sum(full), len(full)

    def reads_as(self, other: PlannedDataLoader) -> bool:
        """Whether another planned loader reads the same samples.

        Args:
            other: The other loader.
        """
        mine, others = (getattr(loader.given, 'dataset', loader.given) for loader in (self, other))
        if mine is not others or type(self) is not type(other) or self.num_samples != other.num_samples:
            return False
        return self.indices is None or other.indices is None or torch.equal(self.indices, other.indices)

    def catch_up(self, state: State) -> None:
        """Brings the user's loader to its position in the interrupted run; at ``FIT_START``, before random states are restored.

        Nothing here: the plan says what to read.

        Args:
            state: The trainer's state.
        """
        # the plan resumes within an epoch; a StreamingDataset that did so too would leave samples out
        state.dataset_resumption.pop('train', None)

    def note_microbatch(self, state: State) -> None:
        """Records the microbatch size, and warns if Composer has not determined it yet; at ``FIT_START``.

        Args:
            state: The trainer's state.
        """
        size = state.device_train_microbatch_size
        if size is None:  # Composer looks at the batch_size of the DataLoader, which is None beside a batch_sampler
            size = state.device_train_microbatch_size = self.initial_batch_size
        smaller = isinstance(size, int) and size < self.initial_batch_size and not state.auto_microbatching
        self.microbatch = int(size) if smaller else None

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

        Batches that were trained before a resume are yielded as ``None``: the trainer skips them without reading them, so nothing is read
        or decoded for them on any path. The same holds before there is a plan, when the trainer spins its loaders. A plan whose rest
        changes between two batches (:func:`~composer_effalgos.plan.epoch.resize_rest`) takes effect from the next batch on, despite
        prefetching.
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
                self.given_batch = read if self.by_position else None
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
        return Reading(indices, offsets, stream_seed(self.seed, 2, self._epoch), batch_seeds, self.by_position)

    def read(self, indices: Sequence[int], batch_size: int, seed: int = 0) -> Iterator[Any]:
        """Reads given samples in their order on the same path, outside the epoch's plan.

        Args:
            indices: Sample indices.
            batch_size: Samples a batch; the last may have fewer.
            seed: Seeds the dataset's random augmentation.

        Yields:
            Batches as the path gives them, on the host or on the device of training.
        """
        batches = (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))
        yield from self._path.read_batches(Reading.of_batches(batches, self.seed, 3, seed, by_position=True))
