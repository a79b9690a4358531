"""A rank's part of the samples, and statistics over the parts of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from composer_effalgos.plan.bijection import Bijection
from composer_effalgos.plan.ranks import Ranks, send, whole

_DIGIT = 16  # bits of a key that one pass of the radix selection determines


class Shard:
    """This rank's part of ``size`` samples on ``W`` ranks: ``rank``, ``rank + W``, ``rank + 2 W``, ...

    Every statistic over the ranks is a collective call. Its result is the same on every rank and for any number of ranks.

    Args:
        size: Number of samples over all ranks.
        ranks: The ranks.
    """

    def __init__(self, size: int, ranks: Ranks) -> None:
        self.size, self.ranks = size, ranks

    def __len__(self) -> int:
        return len(range(self.ranks.rank, self.size, self.ranks.world_size))

    @property
    def samples(self) -> Tensor:
        """The samples of this part, int64 ``[n]``, ascending."""
        return torch.arange(self.ranks.rank, self.size, self.ranks.world_size)

    def total(self, number: int) -> int:
        """Sums a number over the ranks; a collective call.

        Args:
            number: This rank's number.
        """
        return int(self.ranks.total(torch.tensor([int(number)])))

    def keys(self, seed: int) -> Tensor:
        """A distinct random key for each sample of this part, which depends only on the sample, the seed and ``size``.

        Args:
            seed: In [0, 2**63), the same on every rank.

        Returns:
            int64 ``[n]``, in ``[0, size)``.
        """
        return Bijection(self.size, seed)(self.samples)

    def finite_mean(self, values: Tensor) -> float:
        """The mean of the finite values over all ranks, in float64; NaN if there are none. A collective call.

        Args:
            values: Float32 ``[m]``, of this rank.
        """
        finite = torch.isfinite(values)
        mine = torch.stack([torch.where(finite, values, 0).sum(dtype=torch.float64), finite.sum().double()])
        total, count = self.ranks.total(mine).tolist()
        return total / count if count else float('nan')

    def kth(self, keys: Tensor, place: int) -> int:
        """The key at a given place among the keys of all ranks in ascending order (radix selection); a collective call.

        Args:
            keys: Non-negative int64 ``[m]``, of this rank.
            place: Counted from 0; smaller than the number of keys.
        """
        longest = torch.zeros(64, dtype=torch.int64)  # one-hot: the sum over the ranks then shows the maximum
        longest[int(keys.max()).bit_length() if len(keys) else 0] = 1
        bits = int(self.ranks.total(longest).nonzero()[-1])
        found = 0
        for shift in range((bits - 1) // _DIGIT * _DIGIT, -1, -_DIGIT):
            digits = (keys >> shift).numpy()
            below = self.ranks.total(torch.from_numpy(np.bincount(digits, minlength=2**_DIGIT))).cumsum(0)
            digit = int(torch.searchsorted(below, place, right=True))
            place -= int(below[digit - 1]) if digit else 0
            found += digit << shift
            if shift:
                keys = keys[torch.from_numpy(digits == digit)] - (digit << shift)
        return found

    def smallest(self, keys: Tensor, count: int) -> Tensor:
        """Selects the ``count`` smallest keys of all ranks; a collective call.

        Args:
            keys: Non-negative int64 ``[m]``, of this rank; all keys on all ranks must be different.
            count: How many, at most the number of keys.

        Returns:
            Bool ``[m]``.
        """
        return keys <= self.kth(keys, count - 1) if count else torch.zeros(len(keys), dtype=torch.bool)

    def quantiles(self, values: Tensor, quantiles: Sequence[float]) -> list[float]:
        """Quantiles of the finite values of all ranks, linearly interpolated in float64; NaN if there are none. A collective call.

        Args:
            values: Float32 ``[m]``, of this rank.
            quantiles: In [0, 1].
        """
        bits = values[torch.isfinite(values)].view(torch.int32).long()
        keys = torch.where(bits < 0, -(2**31) - bits, bits) + 2**31  # the bits of a float as an integer, in the order of the floats
        size = self.total(len(keys))
        return [self._quantile(keys, quantile * (size - 1)) if size else float('nan') for quantile in quantiles]

    def _quantile(self, keys: Tensor, place: float) -> float:
        ends = []
        for end in (int(place), -int(-place // 1)):
            key = self.kth(keys, end) - 2**31
            ends.append(float(torch.tensor(-(2**31) - key if key < 0 else key).int().view(torch.float32)))
        return float(np.quantile(np.array(ends, np.float64), place - int(place)))

    def to_owners(self, samples: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sends values of arbitrary samples to the ranks that own the samples; a collective call.

        Args:
            samples: int64 ``[m]``; no two ranks may send the same sample.
            values: ``[m]``.

        Returns:
            Positions in this rank's part, int64 ``[k]``, and their values, ``[k]``.
        """
        positions = samples // self.ranks.world_size
        positions = positions.int() if self.size < 2**31 else positions  # int32 if possible, to halve the traffic
        found, came = send(self.ranks, (samples % self.ranks.world_size).int(), positions, values)
        return found.long(), came

    def whole(self, part: Tensor) -> Tensor | None:
        """Gathers the rows of all ranks on rank 0; see :func:`~composer_effalgos.plan.ranks.whole`."""
        return whole(self.ranks, part, self.size)

    def part(self, rows: Tensor) -> Tensor:
        """Copies this rank's rows from the rows of all ranks.

        Args:
            rows: ``[..., size]``.
        """
        return rows[..., self.ranks.rank :: self.ranks.world_size].clone()
