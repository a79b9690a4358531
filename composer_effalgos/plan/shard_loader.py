"""Epochs that the ranks plan together, each knowing only its own part of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from composer_effalgos.plan.bijection import Bijection
from composer_effalgos.plan.epoch import BatchSize, EpochPlan, saved_batches, stream_seed
from composer_effalgos.plan.loader import PlannedDataLoader
from composer_effalgos.plan.ranks import Ranks, send
from composer_effalgos.plan.shard import Shard
from composer_effalgos.utils.errors import CheckpointError, InputError


@dataclass(frozen=True)
class ShardPlan(EpochPlan):
    """An epoch's plan on one rank, which knows the kept samples of its own part and the samples that it trains on.

    The order of all samples is a :class:`~composer_effalgos.plan.bijection.Bijection`, and the order of an epoch is its restriction to the
    kept samples. It is the same for any number of ranks, and is distributed over them like the order of an :class:`EpochPlan`.

    Attributes:
        kept: Positions in this rank's part, int64 ``[k]``, ascending; ``None`` for all.
        kept_weights: Loss weights aligned with ``kept``, float32 ``[k]``; ``None`` if all are 1, on all ranks.
        shard: This rank's part.
        seed: Seed of the order; ``None`` for ascending order.
        mine: The samples that this rank trains on, int64 ``[m]``, from number ``dealt_from`` of the epoch's order on.
        my_weights: Their weights, float32 ``[m]``; ``None`` if all are 1.
        dealt_from: Number in the epoch's order at which the distribution starts.
    """

    kept: Tensor | None  # type: ignore[assignment]
    shard: Shard | None = None
    seed: int | None = None
    mine: Tensor | None = None
    my_weights: Tensor | None = None
    dealt_from: int = 0

    @property
    def order(self) -> Tensor:
        raise NotImplementedError('with shard=True no rank holds the order of all samples; see rank_order')

    @property
    def weights(self) -> Tensor | None:
        raise NotImplementedError('with shard=True no rank holds the weights of all samples; see rank_weights')

    def rank_order(self, rank: int, world_size: int) -> Tensor:
        """The samples that this rank trains on from ``first_batch`` on, int64 ``[m]``; ``rank`` must be this process's rank."""
        assert self.mine is not None
        return self.mine[self._part(rank, world_size)]

    def rank_weights(self, rank: int, world_size: int) -> Tensor | None:
        """The weights of :meth:`rank_order`, float32 ``[m]``; ``None`` if all are 1."""
        return None if self.my_weights is None else self.my_weights[self._part(rank, world_size)]

    def _part(self, rank: int, world_size: int) -> slice:
        assert self.shard is not None
        assert (rank, world_size) == (self.shard.ranks.rank, self.shard.ranks.world_size)
        before, rest = divmod(self.start - self.dealt_from, world_size)
        assert not rest, 'dealt out again where a rank would get other samples'
        return slice(before, before + len(range(self.start + rank, self.num_samples, world_size)))

    def dealt(self) -> ShardPlan:
        """The plan with the samples that each rank trains on from ``start`` on; a collective call."""
        assert self.shard is not None
        order = Bijection(self.shard.size, self.seed)
        mine, my_weights = deal(self.shard, order, self.kept, self.kept_weights, self.start)
        return replace(self, mine=mine, my_weights=my_weights, dealt_from=self.start)

    def trained(self) -> Tensor | slice:
        """Positions in this rank's part that the epoch trains on, int64 ``[n]``, or a slice for all; a collective call."""
        assert self.shard is not None
        total, kept = (self.shard.size, slice(None)) if self.kept is None else (self.shard.total(len(self.kept)), self.kept)
        if self.num_samples == total:
            return kept
        order = Bijection(self.shard.size, self.seed)
        trained = self.shard.smallest(order(self.shard.samples[kept]), self.num_samples)
        return trained.nonzero()[:, 0] if self.kept is None else self.kept[trained]

    def state_dict(self, done: Sequence[int]) -> dict[str, Any]:
        """The plan for a checkpoint, as an uninterrupted run would save it, on rank 0; a collective call.

        Args:
            done: Global sizes of the batches before ``first_batch``, trained since the epoch began.
        """
        assert self.shard is not None
        flags = weights = None
        if self.kept is not None:
            part = torch.zeros(len(self.shard), dtype=torch.bool)
            part[self.kept] = True
            flags = self.shard.whole(part)
            if self.kept_weights is not None:
                weights = self.shard.whole(torch.zeros(len(self.shard), dtype=torch.float32).index_copy(0, self.kept, self.kept_weights))
        return {'kept': flags, 'weights': weights, 'seed': self.seed, **self._batches_with(done)}


def deal(shard: Shard, order: Bijection, kept: Tensor | None, weights: Tensor | None, start: int) -> tuple[Tensor, Tensor | None]:
    """Distributes the kept samples of all ranks in order: rank ``r`` gets every ``W``-th, starting with number ``start + r``.

    Each rank first receives the kept samples of one interval of the order and sorts them by counting. The number of samples in the
    preceding intervals then determines the number of each sample in the epoch's order. A collective call.

    Args:
        shard: This rank's part.
        order: The order of all samples.
        kept: Positions in this rank's part, int64 ``[k]``; ``None`` for all.
        weights: Aligned with ``kept``, float32 ``[k]``; ``None`` for ones, on all ranks.
        start: Number of the first sample to distribute, in the order of the kept samples.

    Returns:
        This rank's samples, int64 ``[m]``, and their weights, float32 ``[m]`` or ``None``.
    """
    ranks = shard.ranks
    if kept is None:
        return order.inverse(torch.arange(start + ranks.rank, shard.size, ranks.world_size)), None
    width = -(-shard.size // ranks.world_size)
    first = ranks.rank * width
    positions = order(kept * ranks.world_size + ranks.rank)
    found, *came = send(ranks, (positions // width).int(), positions, *(() if weights is None else (weights,)))
    del positions  # free large tensors early, here and below
    there = torch.zeros(max(0, min(width, shard.size - first)), dtype=torch.bool)
    there[found - first] = True
    columns = [there.nonzero()[:, 0] + first]
    for values in came:
        dense = torch.empty(len(there), dtype=values.dtype)
        dense[found - first] = values
        columns.append(dense[there])
    sizes = torch.zeros(ranks.world_size, dtype=torch.int64)
    sizes[ranks.rank] = len(columns[0])
    before = int(ranks.total(sizes)[: ranks.rank].sum())
    del found, came, there
    columns = [column[max(0, start - before) :] for column in columns]
    number = max(0, before - start)  # number of the first column in the epoch, counted from start
    parts = [slice((rank - number) % ranks.world_size, None, ranks.world_size) for rank in range(ranks.world_size)]
    counts = [len(columns[0][part]) for part in parts]
    mine, *my_weights = (ranks.swap(torch.cat([column[part] for part in parts]), counts) for column in columns)
    return order.inverse(mine), my_weights[0] if my_weights else None


class ShardLoader(PlannedDataLoader):
    """Plans epochs together with the other ranks, so that no rank holds the order of all samples.

    Raises:
        InputError: For a loader whose order goes shard by shard.
    """

    def __init__(self, loader: DataLoader, *, seed: int, ranks: Ranks) -> None:
        super().__init__(loader, seed=seed, rank=ranks.rank, world_size=ranks.world_size)
        if self.shuffle and self.shard_starts is not None:
            raise InputError(
                f'shard: expected samples that are shuffled individually, got {type(self.dataset).__name__}, which is shuffled by '
                'shards and needs the order of all samples on every rank; leave shard out'
            )
        self.shard = Shard(self.num_samples, ranks)

    def plan_epoch(self, kept: Tensor | None, weights: Tensor | None, batch_size: BatchSize, epoch: int, *, even: bool) -> EpochPlan:
        """Plans an epoch; a collective call.

        Args:
            kept: Positions in this rank's part of the samples, int64 ``[k]``, ascending; ``None`` for all.
            weights: Their loss weights, float32 ``[k]``; ``None`` for ones, on all ranks.
            batch_size: Samples per rank and batch.
            epoch: Epoch number.
            even: Whether every rank gets the same number of samples.
        """
        count = self.num_samples if kept is None else self.shard.total(len(kept))
        if kept is not None and (surplus := self.surplus(count, batch_size, even=even)):
            stay = ~self.shard.smallest(self.shard.keys(stream_seed(self.seed, 5, epoch))[kept], surplus)
            kept, weights, count = kept[stay], None if weights is None else weights[stay], count - surplus
        sizes = self._epoch_sizes(count, batch_size, even=even)
        seed = stream_seed(self.seed, 0, epoch) if self.shuffle else None
        return ShardPlan(kept, weights, sizes, tail=self.tail, shard=self.shard, seed=seed).dealt()

    def resume(
        self, plan: EpochPlan, batches: int, batch_size: BatchSize, *, world_size: int, even: bool
    ) -> tuple[EpochPlan, tuple[int, ...]]:
        rest, done = super().resume(plan, batches, batch_size, world_size=world_size, even=even)
        assert isinstance(rest, ShardPlan)
        return rest.dealt(), done

    def plan_from_state(self, saved: Mapping[str, Any]) -> EpochPlan:
        if 'order' in saved:
            raise CheckpointError(
                'the checkpoint was saved within an epoch by a run without shard=True; leave shard out, or resume from one saved at the '
                'end of an epoch'
            )
        kept = None if saved['kept'] is None else self.shard.part(saved['kept']).nonzero()[:, 0]
        weights = None if saved['weights'] is None or kept is None else self.shard.part(saved['weights'])[kept]
        return ShardPlan(kept, weights, **saved_batches(saved), shard=self.shard, seed=saved['seed'])
