"""InfoBatch's decision for one epoch as a pure function (Qin et al., ICLR 2024, arXiv 2303.04947)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from composer_effalgos.plan import Shard
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError

_BLOCK = 1 << 16  # random numbers that are drawn together, in the processor's cache


def prune(
    scores: Tensor,
    prune_ratio: float,
    generator: torch.Generator | None = None,
    *,
    bands: Sequence[tuple[float, float]] | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decides which samples one epoch trains on, and how much each counts.

    Of the ``m`` samples whose score is below the mean, ``floor((1 - prune_ratio) m)``, drawn at random, are kept with weight
    ``1 / (1 - prune_ratio)``; all others are kept with weight 1 (Qin et al., arXiv 2303.04947, equations 3 and 5). The expected weighted
    gradient is the full gradient. Samples with a NaN or infinite score are kept with weight 1 and left out of the mean.

    Args:
        scores: One score a sample (its last loss), float ``[N]``, on the CPU.
        prune_ratio: The share of below-mean samples to drop, in [0, 1).
        generator: Draws which; ``None`` for torch's default generator.
        bands: Quantile thresholds in place of the mean and ``prune_ratio``: ``(quantile, ratio)`` pairs in ascending order of the
            quantile. The samples below the first quantile of the scores are pruned with the first ratio, those between the first and the
            second with the second, and so on; those from the last quantile on are kept.
        labels: Class indices, int64 ``[N]``: the mean (or the quantiles) is each class's own, so that no class is pruned away.

    Returns:
        The kept samples in ascending order, int64 ``[n]``, and their weights, float32 ``[n]``.

    Raises:
        InputError: If ``prune_ratio`` or ``bands`` is outside its range, or ``scores`` or ``labels`` has another shape.
    """
    check_number('prune_ratio', prune_ratio, least=0, below=1)
    if scores.ndim != 1:
        raise InputError(f'scores: expected one dimension, got shape {tuple(scores.shape)}')
    if labels is not None and (labels.shape != scores.shape or labels.is_floating_point()):
        raise InputError(f'labels: expected class indices of shape {tuple(scores.shape)}, got {labels.dtype} {tuple(labels.shape)}')
    values = scores.detach().numpy()
    pairs = None if bands is None else checked_bands(bands)
    ratios = [prune_ratio] if pairs is None else [ratio for _, ratio in pairs]
    draws = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    groups = np.zeros(len(values), np.uint8)
    keep = np.ones(len(values), bool)
    for members in _classes(labels):
        own = values[members]
        groups[members] = own_groups = _groups(
            own, [finite_mean(own)] if pairs is None else _quantiles(own, [quantile for quantile, _ in pairs])
        )
        for number, ratio in enumerate(ratios, 1):
            keep[members] &= ~_drop(own_groups == number, ratio, draws)
    return _weighted(keep, groups, ratios)


def prune_part(
    scores: Tensor, prune_ratio: float, seed: int, shard: Shard, *, bands: Sequence[tuple[float, float]] | None = None
) -> tuple[Tensor, Tensor]:
    """The decision of :func:`prune` for a rank that knows its own part of the samples; a collective call.

    As many samples are dropped over all ranks, and every choice is as likely; which ones is drawn by sample, so it does not depend on the
    number of ranks, and is not what :func:`prune` draws.

    Args:
        scores: One score a sample of this part, float32 ``[n]``, on the CPU.
        prune_ratio: As for :func:`prune`.
        seed: Of the draws, in [0, 2**63), the same on every rank.
        shard: This rank's part.
        bands: As for :func:`prune`.

    Returns:
        The positions in this part that are kept, int64 ``[k]``, and their weights, float32 ``[k]``.
    """
    pairs = None if bands is None else checked_bands(bands)
    ratios = [prune_ratio] if pairs is None else [ratio for _, ratio in pairs]
    limits = [shard.finite_mean(scores)] if pairs is None else shard.quantiles(scores, [quantile for quantile, _ in pairs])
    groups = _groups(scores.numpy(), limits)
    keep, keys = np.ones(len(scores), bool), shard.keys(seed)
    for number, ratio in enumerate(ratios, 1):
        members = np.flatnonzero(groups == number)
        dropped = shard.smallest(keys[members], _num_dropped(shard.total(len(members)), ratio))
        keep[members[dropped.numpy()]] = False
    return _weighted(keep, groups, ratios)


def _weighted(keep: np.ndarray, groups: np.ndarray, ratios: Sequence[float]) -> tuple[Tensor, Tensor]:
    """What is kept, and the weights that make up for what is dropped of its group."""
    kept = np.flatnonzero(keep)
    group, weights = groups.take(kept), np.ones(len(kept), np.float32)
    for number, ratio in enumerate(ratios, 1):  # several times faster than looking them up by group
        np.maximum(weights, (group == number) * np.float32(1 / (1 - ratio)), out=weights)
    return torch.from_numpy(kept), torch.from_numpy(weights)


def _classes(labels: Tensor | None) -> Iterator[np.ndarray | slice]:
    """The samples of each class; without labels all samples together."""
    if labels is None:
        yield slice(None)
        return
    by_class = np.argsort(labels.numpy(), kind='stable')
    _, sizes = np.unique(labels.numpy(), return_counts=True)
    yield from np.split(by_class, np.cumsum(sizes)[:-1])


def finite_mean(values: np.ndarray) -> float:
    """Mean of the finite values in double precision; NaN where there are none."""
    total, count = values.sum(dtype=np.float64), len(values)
    if not np.isfinite(total):
        finite = np.isfinite(values)
        total, count = values.sum(dtype=np.float64, where=finite), np.count_nonzero(finite)
    return float(total / count) if count else math.nan


def _quantiles(values: np.ndarray, quantiles: list[float]) -> list[float]:
    """Quantiles of the finite values in double precision; NaN where there are none."""
    finite = values[np.isfinite(values)].astype(np.float64)
    return np.quantile(finite, quantiles).tolist() if len(finite) else [math.nan] * len(quantiles)


def _groups(values: np.ndarray, limits: list[float]) -> np.ndarray:
    """Which band each value lies in, from 1, or 0 where it is not below the last of the ascending limits: uint8 ``[N]``."""
    below = np.zeros(len(values), np.uint8)
    for limit in limits:
        bound = values.dtype.type(limit)  # in the values' own precision, round the float64 limit up to it
        below += values < (np.nextafter(bound, values.dtype.type(np.inf)) if float(bound) < limit else bound)
    below *= values > -np.inf
    return np.where(below > 0, len(limits) + 1 - below, 0).astype(np.uint8) if len(limits) > 1 else below


def _num_dropped(size: int, ratio: float) -> int:
    return size - math.floor(size * (1 - ratio) + 1e-9)  # (1 - 0.9) * 10 must be 1


def _drop(members: np.ndarray, ratio: float, draws: np.random.Generator) -> np.ndarray:
    """Draws ``m - floor((1 - ratio) m)`` of a group's ``m`` members, every choice as likely as any other.

    Each member is drawn on its own with a probability within 1/512 of ``ratio``; then as many as are too many or too few, a small part of
    them, are put back or drawn in addition, uniformly at random. By symmetry no member is drawn more often than another, and this costs
    about a nanosecond a sample, much less than a shuffle.

    Args:
        members: Bool ``[N]``.
        ratio: The share to draw.
        draws: Random numbers.

    Returns:
        Bool ``[N]``.
    """
    size = np.count_nonzero(members)
    wanted = _num_dropped(size, ratio)
    dropped = np.zeros(len(members), bool)
    if not wanted:
        return dropped
    for start in range(0, len(members), _BLOCK):
        part = members[start : start + _BLOCK]
        numbers = draws.bit_generator.random_raw(-(-len(part) // 8)).view(np.uint8)[: len(part)]
        np.logical_and(part, numbers < round(ratio * 2**8), out=dropped[start : start + _BLOCK])
    surplus = np.count_nonzero(dropped) - wanted
    dropped[_choose(dropped if surplus > 0 else members > dropped, abs(surplus), draws)] = surplus < 0
    return dropped


def _choose(mask: np.ndarray, count: int, draws: np.random.Generator) -> np.ndarray:
    """Positions of ``count`` of the true entries of ``mask``, every choice as likely as any other."""
    size = np.count_nonzero(mask)
    if 32 * count > size:
        return np.flatnonzero(mask)[draws.choice(size, count, replace=False, shuffle=False)]
    found: dict[int, None] = {}  # few of many: the first of random positions that are true, without looking at them all
    while len(found) < count:
        tries = draws.integers(len(mask), size=16 + 2 * (count - len(found)) * len(mask) // size)
        found.update(dict.fromkeys(tries[mask[tries]].tolist()))
    return np.fromiter(found, np.int64)[:count]


def checked_bands(bands: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """``bands`` as :func:`prune` takes them.

    Raises:
        InputError: If they are something else.
    """
    try:
        pairs = [(quantile, ratio) for quantile, ratio in bands]
    except (TypeError, ValueError) as error:
        raise InputError(f'bands: expected a list of (quantile, ratio) pairs, got {bands!r}') from error
    for number, (quantile, ratio) in enumerate(pairs):
        check_number(f'bands[{number}] ratio', ratio, least=0, below=1)
        check_number(f'bands[{number}] quantile', quantile, above=0, most=1)
    if not 0 < len(pairs) < 250 or [q for q, _ in pairs] != sorted({q for q, _ in pairs}):
        raise InputError(f'bands: expected 1 to 249 bands with ascending quantiles, got {[q for q, _ in pairs]}')
    return pairs


def least_kept(candidates: int, global_batch: int, world_size: int = 1) -> int:
    """How many samples a pruned epoch has at least.

    An epoch is one share of the learning-rate schedule, however few samples it has. One that is less than a batch would take that share in
    a step on a handful of samples, so everything is trained on instead.

    Args:
        candidates: Samples that the epoch may train on.
        global_batch: Samples of a batch, over all ranks.
        world_size: Number of ranks, each of which needs a sample.

    Returns:
        A global batch, or half of the candidates where they make less than two.
    """
    return max(world_size, min(global_batch, candidates // 2))
