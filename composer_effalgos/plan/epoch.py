"""The plan of one epoch, as pure functions: which samples, in what order, with what weights and batch sizes."""

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
"""How the samples that do not fill an epoch's last batch are handled, see :func:`split_batches`."""


def stream_seed(*keys: int) -> int:
    """Mixes integers into one 63-bit seed, so that every (seed, purpose, epoch, ...) has its own random stream.

    Args:
        *keys: Non-negative integers.

    Returns:
        The seed, in [0, 2**63).
    """
    high, low = np.random.SeedSequence(keys).generate_state(2, dtype=np.uint32).tolist()
    return (high << 31 ^ low) & (2**63 - 1)


def check_seed(seed: Any) -> None:
    """Checks that an algorithm's ``seed`` is ``None`` or a non-negative integer."""
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

    With ``tail='shared'``, every batch except the last two has ``world_size * batch_size`` samples. A remainder that is smaller than half
    of the batch before it, or too small to give every rank two samples (BatchNorm needs more than one), is merged with that batch and the
    sum is split about evenly. A ``DataLoader`` would make the remainder a batch of its own. Here the length of an epoch changes with every
    plan, so the remainder can be arbitrarily small, and a step at the full learning rate on a few samples, each with many times its usual
    weight, can undo the work of a short epoch. The number of batches is that of a ``DataLoader``, unless a rank would be left without a
    sample.

    With ``tail='own'`` the remainder is a batch of its own, as in a ``DataLoader``; it is dropped if it has fewer samples than there are
    ranks. With ``tail='half'`` an incomplete last batch has half the size of the one before it, and a remainder smaller than that is
    dropped: batches of one growth stage then have only two sizes, whatever the length of the epoch.

    Args:
        num_samples: Samples in the epoch, over all ranks.
        batch_size: Samples per rank and batch.
        world_size: Number of ranks.
        drop_last: Drops the remainder instead.
        max_batches: Maximum number of batches; they are full ones if there are enough samples.
        tail: How the remainder is handled.

    Returns:
        Global batch sizes. All but the last are multiples of ``world_size``. Empty if no batch can be made.
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
        return [*sizes, remainder] if remainder >= world_size else sizes  # each rank needs a sample
    if tail == 'half':
        half = world_size * -(-sizes[-1] // (2 * world_size))
        return [*sizes, half] if remainder >= half else sizes
    return [*sizes[:-1], *_last_batches(sizes[-1], remainder, world_size)]


def _last_batches(before: int, remainder: int, world_size: int) -> list[int]:
    """The sizes of the last full batch and the remainder: unchanged, or merged and split about evenly."""
    together = before + remainder
    enough = 2 * remainder >= max(4 * world_size, before)
    if enough or (world_size <= remainder and together < 4 * world_size):  # merging them would not give every rank two samples either
        return [before, remainder]
    if together < 2 * world_size:
        return [together]
    unit = world_size
    while 16 * unit <= before:  # for a global batch that is a power of two, the batches are then the same on 1, 2, 4 and 8 ranks
        unit *= 2
    first = unit * (together // (2 * unit))
    return [first, together - first]


@dataclass(frozen=True)
class EpochPlan:
    """What one epoch trains on, for all ranks.

    Batch ``b`` contains ``order[stops[b - 1]:stops[b]]``. Rank ``r`` of ``w`` takes every ``w``-th of these samples, starting with the
    ``r``-th. Since every batch except the last is a multiple of ``w``, the epoch of a rank is ``order[start:][r::w]``. The order is stored
    as a permutation, and each rank looks up only its own part.

    Attributes:
        kept: Sample indices without duplicates, int64 ``[n]``.
        kept_weights: Loss weights aligned with ``kept``, float32 ``[n]``; ``None`` if all are 1.
        sizes: Global sizes of the batches from ``first_batch`` on.
        permutation: Positions in ``kept`` in training order, int32 or int64 ``[n]``; ``None`` for the order of ``kept``.
        start: Number of samples trained before a resume within the epoch, otherwise 0.
        first_batch: Number of the first batch in ``sizes``, which is the number of batches trained before a resume, otherwise 0.
        tail: How the last batches were made.
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
        """Batches of the whole epoch, including those trained before a resume."""
        return self.first_batch + len(self.sizes)

    @property
    def num_samples(self) -> int:
        """Samples of the whole epoch over all ranks, including those trained before a resume."""
        return self.start + sum(self.sizes)

    @property
    def order(self) -> Tensor:
        """Sample indices in training order, int64 ``[n]``."""
        return self._ordered(self.kept, slice(None))

    @property
    def weights(self) -> Tensor | None:
        """Loss weights aligned with :attr:`order`, float32 ``[n]``; ``None`` if all are 1."""
        return None if self.kept_weights is None else self._ordered(self.kept_weights, slice(None))

    def rank_order(self, rank: int, world_size: int) -> Tensor:
        """The samples that ``rank`` trains on from ``first_batch`` on, int64 ``[m]``."""
        return self._ordered(self.kept, slice(self.start + rank, self.num_samples, world_size))

    def rank_weights(self, rank: int, world_size: int) -> Tensor | None:
        """The weights of :meth:`rank_order`, float32 ``[m]``; ``None`` if all are 1."""
        if self.kept_weights is None:
            return None
        return self._ordered(self.kept_weights, slice(self.start + rank, self.num_samples, world_size))

    def rank_offsets(self, rank: int, world_size: int) -> list[int]:
        """Batch boundaries in :meth:`rank_order`: ``len(sizes) + 1`` ascending positions."""
        stops = np.cumsum((0, *self.sizes))
        # of the first s samples, rank r has ceil((s - r) / w)
        return np.maximum(0, (stops - rank + world_size - 1) // world_size).tolist()

    def state_dict(self, done: Sequence[int]) -> dict[str, Any]:
        """The plan for a checkpoint, in the form that an uninterrupted run would save.

        Args:
            done: Global sizes of the batches before ``first_batch``, trained since the epoch began.
        """
        return {'order': self.order, 'weights': self.weights, **self._batches_with(done)}

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> EpochPlan:
        """Restores a plan from the result of :meth:`state_dict`."""
        return cls(saved['order'], saved['weights'], **saved_batches(saved))

    def _batches_with(self, done: Sequence[int]) -> dict[str, Any]:
        """The checkpoint entries for batches, starting with the first of ``done``."""
        sizes = torch.tensor((*done, *self.sizes))
        return {'sizes': sizes, 'start': self.start - sum(done), 'first_batch': self.first_batch - len(done)}

    def _ordered(self, values: Tensor, part: slice) -> Tensor:
        return values[part] if self.permutation is None else values.index_select(0, self.permutation[part])


def saved_batches(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a plan that describe its batches, from the result of its ``state_dict``."""
    return {'sizes': tuple(saved['sizes'].tolist()), 'start': saved['start'], 'first_batch': saved['first_batch']}


def by_shard(order: Tensor, shard_starts: Tensor, generator: torch.Generator, block: int = 1) -> Tensor:
    """Groups samples by shard, with the shards in random order, so that one pass reads every shard once.

    Args:
        order: Sample indices in random order, int64 ``[n]``.
        shard_starts: First sample of every shard, int64 ``[S]``, ascending from 0.
        generator: Draws the order of the shards.
        block: Number of samples to mix with each other: consecutive shards are grouped until they hold at least this many.

    Returns:
        Positions in ``order``, int64 ``[n]``. They ascend within a block of shards, so the random order is kept there.
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
    """The global batch sizes, at least one, of an epoch with a given number of samples over all ranks.

    Arguments as for :func:`plan_epoch`.

    Raises:
        ValueError: If there are fewer samples than ranks.
    """
    dealt = num_samples - (num_samples % world_size if even else 0)
    sizes = split_batches(dealt, batch_size, world_size, drop_last, max_batches, tail)
    sizes = sizes or split_batches(dealt, batch_size, world_size, max_batches=max_batches, tail=tail)
    if not sizes:
        raise ValueError(f'cannot distribute {num_samples} samples over {world_size} ranks')
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
    """Plans one epoch. A pure function of its arguments, with the same result on every rank.

    The order depends only on ``kept``, ``seed`` and ``epoch``, so it is the same for any world size and batch size.

    Args:
        kept: Indices of the samples to train on, without duplicates, int64 ``[n]``.
        weights: Loss weights aligned with ``kept``, float32 ``[n]``; ``None`` for ones.
        batch_size: Samples per rank and batch.
        seed: The run's seed.
        epoch: Epoch number.
        world_size: Number of ranks.
        shuffle: Draws a new order each epoch; otherwise the order is that of ``kept``.
        shard_starts: First sample of every shard, int64 ``[S]``, ascending from 0: the new order then goes shard by shard, see
            :func:`by_shard`. ``None`` shuffles all samples together.
        shuffle_block: Number of samples that the order by shards mixes with each other.
        drop_last: Drops an incomplete last batch, unless it is the only one.
        even: Gives every rank the same number of samples; for this, fewer samples than ranks are left out.
        max_batches: Keeps only the first batches.
        tail: How an incomplete last batch is handled, see :func:`split_batches`.

    Returns:
        The plan.

    Raises:
        ValueError: If there are fewer samples than ranks.
    """
    sizes = epoch_sizes(len(kept), batch_size, world_size, drop_last=drop_last, even=even, max_batches=max_batches, tail=tail)
    permutation = None
    if shuffle:
        generator = torch.Generator().manual_seed(stream_seed(seed, 0, epoch))
        # int32 if possible: half the memory, and faster to draw
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
    """The rest of an epoch of which some batches were already trained.

    Args:
        plan: The epoch's plan in the interrupted run.
        batches: Number of batches of the epoch already trained.
        batch_size: Samples per rank and batch, if the rest must be split again.
        world_size: Number of ranks now.
        same_world_size: Whether the batches of ``plan`` can be kept; otherwise the rest is split again for the new number of ranks.
        drop_last: Drops an incomplete last batch.
        even: As for :func:`plan_epoch`.

    Returns:
        The plan with the same order and with ``start`` and ``first_batch`` set, so that no sample is trained on twice.
    """
    done, rest = plan.sizes[: batches - plan.first_batch], plan.sizes[batches - plan.first_batch :]
    start = plan.start + sum(done)
    if not same_world_size and rest:
        # A rest smaller than the number of ranks occurs only at the very end of an epoch; its samples come again in the next epoch.
        num_samples = sum(rest) - (sum(rest) % world_size if even else 0)
        rest = tuple(split_batches(num_samples, _later(batch_size, batches, start), world_size, drop_last, tail=plan.tail))
    elif even and rest:
        last = rest[-1] - rest[-1] % world_size
        rest = (*rest[:-1], last) if last else rest[:-1]
    return replace(plan, sizes=rest, start=start, first_batch=batches)


def resize_rest(plan: EpochPlan, *, batches: int, batch_size: BatchSize, world_size: int) -> EpochPlan:
    """The plan with the rest of the epoch split into batches of another size.

    The samples, their order, their weights and their assignment to ranks do not change. Therefore the last batch may be smaller, even with
    ``drop_last``.

    Args:
        plan: The epoch's plan.
        batches: Number of batches of the epoch already trained.
        batch_size: Samples per rank and batch.
        world_size: Number of ranks.

    Returns:
        The plan with new ``sizes`` from batch number ``batches`` on.
    """
    done, rest = plan.sizes[: batches - plan.first_batch], plan.sizes[batches - plan.first_batch :]
    start = plan.start + sum(done)
    sizes = split_batches(sum(rest), _later(batch_size, batches, start), world_size, tail=plan.tail)
    return replace(plan, sizes=(*done, *sizes))


def _later(batch_size: BatchSize, batches: int, samples: int) -> BatchSize:
    """Batch sizes for the rest of an epoch; a function still counts from the start of the epoch."""
    return (lambda b, s: batch_size(b + batches, s + samples)) if callable(batch_size) else batch_size
