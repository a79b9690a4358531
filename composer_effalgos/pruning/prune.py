"""The pruning decision of InfoBatch for one epoch, as a pure function (Qin et al., ICLR 2024, arXiv 2303.04947)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from composer_effalgos.plan import Shard
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError

_BLOCK = 1 << 16  # random numbers drawn at a time; they stay in the CPU cache


def prune(
    scores: Tensor,
    prune_ratio: float,
    generator: torch.Generator | None = None,
    *,
    bands: Sequence[tuple[float, float]] | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decides which samples one epoch trains on, and with which weights.

    Of the ``m`` samples whose score is below the mean, ``floor((1 - prune_ratio) m)`` are drawn at random and kept with weight
    ``1 / (1 - prune_ratio)``; all others are kept with weight 1 (Qin et al., arXiv 2303.04947, equations 3 and 5). With ``labels``, where
    ``m`` may be small, the number is rounded up or down at random, so that the expected weighted gradient is the full gradient there too.
    Samples with a NaN or infinite score are kept with weight 1 and do not enter the mean.

    Args:
        scores: One score per sample (its last loss), float ``[N]``, on the CPU.
        prune_ratio: The fraction of below-mean samples to drop, in [0, 1).
        generator: Source of randomness; ``None`` for torch's default generator.
        bands: Quantile thresholds instead of the mean and ``prune_ratio``: ``(quantile, ratio)`` pairs in ascending order of the quantile.
            Samples below the first quantile of the scores are pruned with the first ratio, those between the first and the second with the
            second, and so on; those from the last quantile on are kept.
        labels: Class indices, int64 ``[N]``: each class then has its own mean (or quantiles), so that no class is pruned away.

    Returns:
        The kept samples in ascending order, int64 ``[n]``, and their weights, float32 ``[n]``.

    Raises:
        InputError: If ``prune_ratio`` or ``bands`` is outside its range, or ``scores`` or ``labels`` has the wrong shape.
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
            group = own_groups == number
            wanted = _num_dropped(np.count_nonzero(group), ratio, None if labels is None else draws)
            keep[members] &= ~_drop(group, ratio, draws, wanted)
    return _weighted(keep, groups, ratios)


def prune_part(
    scores: Tensor, prune_ratio: float, seed: int, shard: Shard, *, bands: Sequence[tuple[float, float]] | None = None
) -> tuple[Tensor, Tensor]:
    """The decision of :func:`prune` on a rank that has only its own part of the samples; a collective call.

    Over all ranks, the same number of samples is dropped, with the same distribution. The random draw is per sample, so the result does not
    depend on the number of ranks, and it differs from the draw of :func:`prune`.

    Args:
        scores: One score per sample of this part, float32 ``[n]``, on the CPU.
        prune_ratio: As for :func:`prune`.
        seed: Seed of the draw, in [0, 2**63), the same on every rank.
        shard: This rank's part.
        bands: As for :func:`prune`.

    Returns:
        The kept positions in this part, int64 ``[k]``, and their weights, float32 ``[k]``.
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
    """The kept samples, and weights that compensate for the dropped samples of their group."""
    kept = np.flatnonzero(keep)
    group, weights = groups.take(kept), np.ones(len(kept), np.float32)
    for number, ratio in enumerate(ratios, 1):  # several times faster than indexing by group
        np.maximum(weights, (group == number) * np.float32(1 / (1 - ratio)), out=weights)
    return torch.from_numpy(kept), torch.from_numpy(weights)


def _classes(labels: Tensor | None) -> Iterator[np.ndarray | slice]:
    """The samples of each class; without labels, all samples together."""
    if labels is None:
        yield slice(None)
        return
    by_class = np.argsort(labels.numpy(), kind='stable')
    _, sizes = np.unique(labels.numpy(), return_counts=True)
    yield from np.split(by_class, np.cumsum(sizes)[:-1])


def finite_mean(values: np.ndarray) -> float:
    """Mean of the finite values in float64; NaN if there are none."""
    total, count = values.sum(dtype=np.float64), len(values)
    if not np.isfinite(total):
        finite = np.isfinite(values)
        total, count = values.sum(dtype=np.float64, where=finite), np.count_nonzero(finite)
    return float(total / count) if count else math.nan


def _quantiles(values: np.ndarray, quantiles: list[float]) -> list[float]:
    """Quantiles of the finite values in float64; NaN if there are none."""
    finite = values[np.isfinite(values)].astype(np.float64)
    return np.quantile(finite, quantiles).tolist() if len(finite) else [math.nan] * len(quantiles)


def _groups(values: np.ndarray, limits: list[float]) -> np.ndarray:
    """The band of each value, counted from 1, or 0 if it is not below the last of the ascending limits: uint8 ``[N]``."""
    below = np.zeros(len(values), np.uint8)
    for limit in limits:
        bound = values.dtype.type(limit)  # compare in the dtype of the values: round the float64 limit up, so that < gives the same result
        below += values < (np.nextafter(bound, values.dtype.type(np.inf)) if float(bound) < limit else bound)
    below *= values > -np.inf
    return np.where(below > 0, len(limits) + 1 - below, 0).astype(np.uint8) if len(limits) > 1 else below


def _num_dropped(size: int, ratio: float, draws: np.random.Generator | None = None) -> int:
    """The number of samples of a group to drop; with ``draws`` rounded at random, so that it is ``ratio * size`` on average."""
    kept = size * (1 - ratio) + 1e-9  # (1 - 0.9) * 10 must be 1
    whole = math.floor(kept)
    return size - whole - (draws is not None and kept - whole > 1e-6 and draws.random() < kept - whole)


def _drop(members: np.ndarray, ratio: float, draws: np.random.Generator, wanted: int) -> np.ndarray:
    """Draws ``wanted`` of the members of a group, uniformly.

    Each member is first drawn independently with a probability within 1/512 of ``ratio``. The difference to the required number, a small
    part, is then removed or added uniformly at random. By symmetry all subsets of this size are equally likely. This takes about a
    nanosecond per sample, much less than a shuffle.

    Args:
        members: Bool ``[N]``.
        ratio: About the fraction to draw.
        draws: Source of randomness.
        wanted: The number to draw.

    Returns:
        Bool ``[N]``.
    """
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
    """Positions of ``count`` of the true entries of ``mask``, drawn uniformly."""
    size = np.count_nonzero(mask)
    if 32 * count > size:
        return np.flatnonzero(mask)[draws.choice(size, count, replace=False, shuffle=False)]
    found: dict[int, None] = {}  # few of many: try random positions instead of listing all true ones
    while len(found) < count:
        tries = draws.integers(len(mask), size=16 + 2 * (count - len(found)) * len(mask) // size)
        found.update(dict.fromkeys(tries[mask[tries]].tolist()))
    return np.fromiter(found, np.int64)[:count]


def checked_bands(bands: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Checks and returns the ``bands`` of :func:`prune`.

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
    """The minimum number of samples in a pruned epoch.

    An epoch advances the learning-rate schedule by a fixed amount, however few samples it has. An epoch smaller than a batch would take a
    step on a few samples for that amount, so such an epoch trains on everything instead.

    Args:
        candidates: Number of samples that the epoch may train on.
        global_batch: Samples per batch, over all ranks.
        world_size: Number of ranks, each of which needs a sample.

    Returns:
        A global batch, or half of the candidates if they are fewer than two global batches; at least one sample per rank.
    """
    return max(world_size, min(global_batch, candidates // 2))
