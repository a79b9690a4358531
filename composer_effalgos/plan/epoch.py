"""One epoch's plan as pure functions: which samples, in which order, with which weight, in batches of which size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from composer_effalgos.utils.checks import check_whole

BatchSize = int | Callable[[int, int], int]
"""Samples per rank and batch: a constant, or a function of (batch in epoch, samples of the epoch already planned)."""

Tail = Literal['shared', 'own', 'half']
"""What becomes of the samples that do not fill an epoch's last batch, see :func:`split_batches`."""


def stream_seed(*keys: int) -> int:
    """Mixes integers into one 63-bit seed, so that every (seed, purpose, epoch, ...) has a random stream of its own.

    Args:
        *keys: Non-negative integers.

    Returns:
        The seed, in [0, 2**63).
    """
    high, low = np.random.SeedSequence(keys).generate_state(2, dtype=np.uint32).tolist()
    return (high << 31 ^ low) & (2**63 - 1)


def check_seed(seed: Any) -> None:
    """Refuses what cannot seed a stream.

    Args:
        seed: An algorithm's ``seed``.

    Raises:
        InputError: Where it is neither ``None`` nor a whole number of at least 0.
    """
    if seed is not None:
        check_whole('seed', seed, least=0)


def split_batches(
    num_samples: int,
    batch_size: BatchSize,
    world_size: int = 1,
    drop_last: bool = False,
    max_batches: int | None = None,
    tail: Tail = 'shared',
) -> list[int]:
    """Splits an epoch into global batches.

    Every batch but the last two holds ``world_size * batch_size`` samples. A remainder of less than half the batch before it, or too small
    to give every rank two samples (BatchNorm needs more than one), is put together with that batch, and the two are split about evenly. A
    ``DataLoader`` would make it a batch of its own; but where an epoch's length changes with every plan it may be any number of samples,
    and a step at full learning rate on a handful of them, each with many times its weight, can undo a short epoch's work. There are as
    many batches as a ``DataLoader`` has, unless it would leave a rank without a sample.

    This is ``tail='shared'``. With ``'own'`` the remainder is a batch of its own, as a ``DataLoader`` has it. With ``'half'`` a last batch
    that is not full has half the size of the one before it, and fewer samples than that are left out: batches of one growth stage have two
    sizes in all, however long the epochs are.

    Args:
        num_samples: Samples in the epoch, over all ranks.
        batch_size: Samples per rank and batch.
        world_size: Number of ranks.
        drop_last: Drops the remainder instead.
        max_batches: Only so many batches, full ones where there are enough samples for them.
        tail: What becomes of the remainder.

    Returns:
        Global batch sizes. All but the last are multiples of ``world_size``. Empty where no batch can be made.
    """
    sizes: list[int] = []
    if callable(batch_size):
        planned = 0
        while planned < num_samples:
            sizes.append(world_size * batch_size(len(sizes), planned))
            planned += sizes[-1]
        remainder = num_samples - (planned - sizes[-1]) if planned > num_samples else 0
        sizes = sizes[:-1] if remainder else sizes
    else:
        full = world_size * batch_size
        sizes = [full] * (num_samples // full)
        remainder = num_samples % full
    if max_batches is not None and len(sizes) >= max_batches:
        return sizes[:max_batches]
    if not remainder or drop_last:
        return sizes
    if not sizes:
        return [remainder] if remainder >= world_size else []
    if tail == 'own':
        return [*sizes, remainder]
    if tail == 'half':
        half = world_size * -(-sizes[-1] // (2 * world_size))
        return [*sizes, half] if remainder >= half else sizes
    return [*sizes[:-1], *_last_batches(sizes[-1], remainder, world_size)]


def _last_batches(before: int, remainder: int, world_size: int) -> list[int]:
    """The batch before an epoch's remainder and the remainder, as they are or put together and split about evenly."""
    together = before + remainder
    enough = 2 * remainder >= max(4 * world_size, before)
    if enough or (world_size <= remainder and together < 4 * world_size):  # the two together have not enough either
        return [before, remainder]
    if together < 2 * world_size:
        return [together]
    unit = world_size
    while 16 * unit <= before:  # so that 1, 2, 4 and 8 ranks with the same global batch, a power of two, train on the same batches
        unit *= 2
    first = unit * (together // (2 * unit))
    return [first, together - first]


@dataclass(frozen=True)
class EpochPlan:
    """What one epoch trains on, for all ranks.

    Batch ``b`` holds ``order[stops[b - 1]:stops[b]]``; rank ``r`` of ``w`` takes every ``w``-th of them, from the ``r``-th. Since every
    batch but the last is a multiple of ``w``, a rank's whole epoch is ``order[start:][r::w]``. The order is kept as a permutation, and a
    rank looks up its own part alone.

    Attributes:
        kept: Sample indices, int64 ``[n]``, no index twice.
        kept_weights: Loss weights aligned with ``kept``, float32 ``[n]``; ``None`` where all are 1.
        sizes: Global sizes of the batches from ``first_batch`` on.
        permutation: Positions in ``kept`` in the order of training, int32 or int64 ``[n]``; ``None`` for the order of ``kept``.
        start: Samples that were trained before (a run resumed within the epoch), else 0.
        first_batch: Number of the first batch in ``sizes``: the batches trained before, else 0.
        tail: How its last batches were made.
    """

    kept: Tensor
    kept_weights: Tensor | None
    sizes: tuple[int, ...]
    permutation: Tensor | None = None
    start: int = 0
    first_batch: int = 0
    tail: Tail = 'shared'

    @property
    def num_batches(self) -> int:
        """Batches of the whole epoch, those trained before included."""
        return self.first_batch + len(self.sizes)

    @property
    def num_samples(self) -> int:
        """Samples of the whole epoch over all ranks, those trained before included."""
        return self.start + sum(self.sizes)

    @property
    def order(self) -> Tensor:
        """Sample indices in the order of training, int64 ``[n]``."""
        return self._ordered(self.kept, slice(None))

    @property
    def weights(self) -> Tensor | None:
        """Loss weights aligned with :attr:`order`, float32 ``[n]``; ``None`` where all are 1."""
        return None if self.kept_weights is None else self._ordered(self.kept_weights, slice(None))

    def rank_order(self, rank: int, world_size: int) -> Tensor:
        """The samples that ``rank`` trains on from ``first_batch`` on, int64 ``[m]``."""
        return self._ordered(self.kept, slice(self.start + rank, self.num_samples, world_size))

    def rank_weights(self, rank: int, world_size: int) -> Tensor | None:
        """The weights of :meth:`rank_order`, float32 ``[m]``; ``None`` where all are 1."""
        if self.kept_weights is None:
            return None
        return self._ordered(self.kept_weights, slice(self.start + rank, self.num_samples, world_size))

    def rank_offsets(self, rank: int, world_size: int) -> list[int]:
        """Where the batches of :meth:`rank_order` begin and end: ``len(sizes) + 1`` ascending positions."""
        stops = np.cumsum((0, *self.sizes))
        return np.maximum(0, (stops - rank + world_size - 1) // world_size).tolist()

    def state_dict(self, done: Sequence[int]) -> dict[str, Any]:
        """What a checkpoint holds of the plan, as that of a run that was never stopped.

        Args:
            done: Global sizes of the batches before ``first_batch``, trained since the epoch began.
        """
        return {'order': self.order, 'weights': self.weights, **self._batches_with(done)}

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> EpochPlan:
        """The plan that :meth:`state_dict` saved."""
        return cls(saved['order'], saved['weights'], **saved_batches(saved))

    def _batches_with(self, done: Sequence[int]) -> dict[str, Any]:
        """For a checkpoint: the batches from the first of ``done`` on."""
        sizes = torch.tensor((*done, *self.sizes))
        return {'sizes': sizes, 'start': self.start - sum(done), 'first_batch': self.first_batch - len(done)}

    def _ordered(self, values: Tensor, part: slice) -> Tensor:
        return values[part] if self.permutation is None else values.index_select(0, self.permutation[part])


def saved_batches(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a plan that say what its batches are, from a checkpoint.

    Args:
        saved: What ``state_dict`` of a plan gave.
    """
    return {'sizes': tuple(saved['sizes'].tolist()), 'start': saved['start'], 'first_batch': saved['first_batch']}


def by_shard(order: Tensor, shard_starts: Tensor, generator: torch.Generator, block: int = 1) -> Tensor:
    """Brings the samples of each shard together, the shards in a random order, so that one pass reads every shard once.

    Args:
        order: Sample indices in a random order, int64 ``[n]``.
        shard_starts: First sample of every shard, int64 ``[S]``, ascending from 0.
        generator: Draws the order of the shards.
        block: Samples of ``order`` that are mixed with each other: shards that follow each other are put together until they hold more.

    Returns:
        Positions in ``order``, int64 ``[n]``: within a block of shards they ascend, so a random order stays one.
    """
    place = torch.randperm(len(shard_starts), generator=generator)
    shards = torch.bucketize(order, shard_starts, right=True) - 1
    places = place.index_select(0, shards)
    if block > 1:
        before = torch.bincount(places, minlength=len(place)).cumsum(0).roll(1)
        before[0] = 0
        places = (before // block).index_select(0, places)
    return places.argsort(stable=True)


def epoch_sizes(
    num_samples: int,
    batch_size: BatchSize,
    world_size: int = 1,
    *,
    drop_last: bool = False,
    even: bool = False,
    max_batches: int | None = None,
    tail: Tail = 'shared',
) -> list[int]:
    """The batches of an epoch of so many samples.

    Args:
        num_samples: Samples to train on, over all ranks.
        batch_size: As for :func:`plan_epoch`, like all that follow.
        world_size: Number of ranks.
        drop_last: Drops a last batch that is not full, unless it is the only one.
        even: Gives every rank as many samples as the others.
        max_batches: Keeps only the first batches.
        tail: What becomes of a last batch that is not full.

    Returns:
        Global batch sizes, at least one.

    Raises:
        ValueError: Where there are fewer samples than ranks.
    """
    dealt = num_samples - (num_samples % world_size if even else 0)
    sizes = split_batches(dealt, batch_size, world_size, drop_last, max_batches, tail)
    sizes = sizes or split_batches(dealt, batch_size, world_size, max_batches=max_batches, tail=tail)
    if not sizes:
        raise ValueError(f'cannot deal out {num_samples} samples over {world_size} ranks')
    return sizes


def plan_epoch(
    kept: Tensor,
    weights: Tensor | None,
    batch_size: BatchSize,
    *,
    seed: int,
    epoch: int,
    world_size: int = 1,
    shuffle: bool = True,
    shard_starts: Tensor | None = None,
    shuffle_block: int = 1,
    drop_last: bool = False,
    even: bool = False,
    max_batches: int | None = None,
    tail: Tail = 'shared',
) -> EpochPlan:
    """Plans one epoch: a pure function of its arguments, the same on every rank.

    The order depends on ``kept``, ``seed`` and ``epoch`` alone, so it is the same at any world size and batch size.

    Args:
        kept: Indices of the samples to train on, int64 ``[n]``, no index twice.
        weights: Loss weights aligned with ``kept``, float32 ``[n]``; ``None`` for ones.
        batch_size: Samples per rank and batch.
        seed: The run's seed.
        epoch: Number of the epoch.
        world_size: Number of ranks.
        shuffle: Draws a new order each epoch; otherwise the order is that of ``kept``.
        shard_starts: First sample of every shard, int64 ``[S]``, ascending from 0: the new order then goes shard by shard, as
            :func:`by_shard` has it. ``None`` shuffles all samples together.
        shuffle_block: Samples that it mixes with each other.
        drop_last: Drops a last batch that is not full, unless it is the only one.
        even: Gives every rank as many samples as the others; fewer samples than there are ranks are left out for it.
        max_batches: Keeps only the first batches.
        tail: What becomes of a last batch that is not full, see :func:`split_batches`.

    Returns:
        The plan.

    Raises:
        ValueError: Where there are fewer samples than ranks.
    """
    sizes = epoch_sizes(len(kept), batch_size, world_size, drop_last=drop_last, even=even, max_batches=max_batches, tail=tail)
    permutation = None
    if shuffle:
        generator = torch.Generator().manual_seed(stream_seed(seed, 0, epoch))
        # half as wide where that is enough: half the memory, and faster to draw
        permutation = torch.randperm(len(kept), generator=generator, dtype=torch.int32 if len(kept) < 2**31 else torch.int64)
        if shard_starts is not None:
            order = by_shard(kept.index_select(0, permutation), shard_starts, generator, shuffle_block)
            permutation = permutation.index_select(0, order)
    return EpochPlan(kept, weights, tuple(sizes), permutation, tail=tail)


def resume_epoch(
    plan: EpochPlan,
    *,
    batches: int,
    batch_size: BatchSize,
    world_size: int,
    same_world_size: bool = True,
    drop_last: bool = False,
    even: bool = False,
) -> EpochPlan:
    """The rest of an epoch of which ``batches`` batches were trained before.

    Args:
        plan: The epoch's plan, as the run that was stopped had it.
        batches: Batches of the epoch trained before.
        batch_size: Samples per rank and batch, where the rest must be split anew.
        world_size: Number of ranks now.
        same_world_size: Whether the batches of ``plan`` can be kept; otherwise the rest is split anew for the new number of ranks.
        drop_last: Drops a last batch that is not full.
        even: As for :func:`plan_epoch`.

    Returns:
        The same order with ``start`` and ``first_batch`` set; nothing is trained twice.
    """
    done, rest = plan.sizes[: batches - plan.first_batch], plan.sizes[batches - plan.first_batch :]
    start = plan.start + sum(done)
    if not same_world_size and rest:
        # fewer samples than ranks can only be left at the very end of an epoch; they are seen again in the next
        num_samples = sum(rest) - (sum(rest) % world_size if even else 0)
        rest = tuple(split_batches(num_samples, _later(batch_size, batches, start), world_size, drop_last, tail=plan.tail))
    elif even and rest:
        last = rest[-1] - rest[-1] % world_size
        rest = (*rest[:-1], last) if last else rest[:-1]
    return replace(plan, sizes=rest, start=start, first_batch=batches)


def resize_rest(plan: EpochPlan, *, batches: int, batch_size: BatchSize, world_size: int) -> EpochPlan:
    """The same epoch with its rest in batches of another size.

    Samples, their order, their weights and who trains on them stay as they are; so under ``drop_last`` the last batch may be smaller.

    Args:
        plan: The epoch's plan.
        batches: Batches of the epoch trained before.
        batch_size: Samples per rank and batch.
        world_size: Number of ranks.

    Returns:
        The plan with other ``sizes`` from batch number ``batches`` on.
    """
    done, rest = plan.sizes[: batches - plan.first_batch], plan.sizes[batches - plan.first_batch :]
    start = plan.start + sum(done)
    sizes = split_batches(sum(rest), _later(batch_size, batches, start), world_size, tail=plan.tail)
    return replace(plan, sizes=(*done, *sizes))


def _later(batch_size: BatchSize, batches: int, samples: int) -> BatchSize:
    """The batch sizes of an epoch's rest, counted from its beginning."""
    return (lambda b, s: batch_size(b + batches, s + samples)) if callable(batch_size) else batch_size
