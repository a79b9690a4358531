"""Avoids batches that leave a rank with a single sample, on which BatchNorm cannot be trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def has_single(sizes: Sequence[int], world_size: int = 1, microbatch: int | None = None) -> bool:
    """Whether a rank has only one sample in some batch or microbatch.

    Args:
        sizes: Global batch sizes.
        world_size: Number of ranks.
        microbatch: Samples per rank and microbatch; ``None`` for whole batches. With 1, single samples are intended and do not count.
    """
    shares = {share for size in set(sizes) for share in (size // world_size, -(-size // world_size))}
    return any(share == 1 if microbatch is None else microbatch > 1 and share % microbatch == 1 for share in shares)


def spread(sizes: Sequence[int], world_size: int = 1, microbatch: int | None = None) -> list[int]:
    """Moves samples between the last two batches, as few as possible, so that no rank is left with a single one.

    Args:
        sizes: Global batch sizes.
        world_size: Number of ranks.
        microbatch: As for :func:`has_single`.

    Returns:
        The sizes, with the same sum; unchanged if not necessary or not possible.
    """
    if len(sizes) < 2 or not has_single(sizes[-2:], world_size, microbatch):
        return list(sizes)
    together = sizes[-2] + sizes[-1]
    for first in sorted(range(world_size, together, world_size), key=lambda size: abs(size - sizes[-2])):
        pair = [first, together - first]
        if max(pair) <= max(sizes) and not has_single(pair, world_size, microbatch):
            return [*sizes[:-2], *pair]
    return list(sizes)


def unpruned_has_single(
    num_samples: int, batch_size: int, world_size: int = 1, *, drop_last: bool = False, microbatch: int | None = None
) -> bool:
    """Whether a ``DataLoader`` with a ``DistributedSampler`` leaves a rank with a single sample in an unpruned epoch.

    Args:
        num_samples: Samples in the epoch, over all ranks.
        batch_size: Samples per rank and batch.
        world_size: Number of ranks.
        drop_last: Whether an incomplete last batch is dropped.
        microbatch: As for :func:`has_single`.
    """
    full, rest = divmod(num_samples // world_size if drop_last else -(-num_samples // world_size), batch_size)
    shares = [batch_size] * (full > 0) + [rest] * (rest > 0 and not drop_last)
    return has_single(shares, 1, microbatch)


def num_surplus(num_samples: int, sizes_of: Callable[[int], Sequence[int]], world_size: int = 1, microbatch: int | None = None) -> int:
    """The number of samples that an epoch must leave out, so that no rank is left with a single one.

    Args:
        num_samples: Samples in the epoch, over all ranks.
        sizes_of: Returns the batch sizes of an epoch with a given number of samples.
        world_size: Number of ranks.
        microbatch: As for :func:`has_single`.

    Returns:
        The smallest such number below two per rank; 0 if none suffices.
    """
    for surplus in range(min(2 * world_size, num_samples - world_size)):
        if not has_single(sizes_of(num_samples - surplus), world_size, microbatch):
            return surplus
    return 0


def leave_out(kept: Tensor, weights: Tensor | None, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Leaves out samples uniformly at random.

    A batch is a random part of the kept samples before and after, so the expected gradient of a step is unchanged, with or without weights.

    Args:
        kept: Sample indices, int64 ``[n]``.
        weights: Their loss weights, float32 ``[n]``; ``None`` for ones.
        count: Number of samples to leave out.
        generator: Source of randomness.

    Returns:
        The remaining samples and weights, in the same order.
    """
    stay = torch.randperm(len(kept), generator=generator)[count:].sort().values
    return kept[stay], None if weights is None else weights[stay]
