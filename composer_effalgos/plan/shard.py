"""The part of the samples that a rank keeps the rows of, and statistics over the parts of all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from composer_effalgos.plan.bijection import Bijection
from composer_effalgos.plan.ranks import Ranks, send, whole

_DIGIT = 16  # bits of a key that are looked at in one pass


class Shard:
    """This rank's part of ``size`` samples: number ``rank``, ``rank + W``, ``rank + 2 W``, ...

    All that it computes over the ranks is a collective call, the same on every rank and for any number of ranks.

    Args:
        size: Samples over all ranks.
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
        """The sum of a number over the ranks.

        Args:
            number: This rank's.
        """
        return int(self.ranks.total(torch.tensor([int(number)])))

    def keys(self, seed: int) -> Tensor:
        """A random key of each sample, all of them different, which depends on the sample and the seed alone.

        Args:
            seed: In [0, 2**63), the same on every rank.

        Returns:
            int64 ``[n]``, in ``[0, size)``.
        """
        return Bijection(self.size, seed)(self.samples)

    def finite_mean(self, values: Tensor) -> float:
        """The mean of what is finite, summed in double precision; NaN where nothing is.

        Args:
            values: Float32 ``[m]``, this rank's.
        """
        finite = torch.isfinite(values)
        mine = torch.stack([torch.where(finite, values, 0).sum(dtype=torch.float64), finite.sum().double()])
        total, count = self.ranks.total(mine).tolist()
        return total / count if count else float('nan')

    def kth(self, keys: Tensor, place: int) -> int:
        """The key at a place of all keys in ascending order.

        Args:
            keys: int64 ``[m]`` of at least 0, this rank's.
            place: Counted from 0, less than there are keys.
        """
        longest = torch.zeros(64, dtype=torch.int64)
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
        """Which keys are among the ``count`` smallest of all ranks.

        Args:
            keys: int64 ``[m]`` of at least 0, this rank's; no two are equal, on any rank.
            count: How many, not more than there are.

        Returns:
            Bool ``[m]``.
        """
        return keys <= self.kth(keys, count - 1) if count else torch.zeros(len(keys), dtype=torch.bool)

    def quantiles(self, values: Tensor, quantiles: Sequence[float]) -> list[float]:
        """Quantiles of what is finite, between two values in proportion, in double precision; NaN where nothing is.

        Args:
            values: Float32 ``[m]``, this rank's.
            quantiles: In [0, 1].
        """
        bits = values[torch.isfinite(values)].view(torch.int32).long()
        keys = torch.where(bits < 0, -(2**31) - bits, bits) + 2**31  # in the order of the values
        size = self.total(len(keys))
        return [self._quantile(keys, quantile * (size - 1)) if size else float('nan') for quantile in quantiles]

    def _quantile(self, keys: Tensor, place: float) -> float:
        ends = []
        for end in (int(place), -int(-place // 1)):
            key = self.kth(keys, end) - 2**31
            ends.append(float(torch.tensor(-(2**31) - key if key < 0 else key).int().view(torch.float32)))
        return float(np.quantile(np.array(ends, np.float64), place - int(place)))

    def to_owners(self, samples: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Sends values of any samples to the ranks whose part the samples are of.

        Args:
            samples: int64 ``[m]``; no sample comes from two ranks.
            values: ``[m]``.

        Returns:
            Positions in this rank's part, int64 ``[k]``, and their values, ``[k]``.
        """
        positions = samples // self.ranks.world_size
        positions = positions.int() if self.size < 2**31 else positions  # half as wide where that is enough
        found, came = send(self.ranks, (samples % self.ranks.world_size).int(), positions, values)
        return found.long(), came

    def whole(self, part: Tensor) -> Tensor | None:
        """The rows of all ranks, on rank 0; see :func:`~composer_effalgos.plan.ranks.whole`."""
        return whole(self.ranks, part, self.size)

    def part(self, rows: Tensor) -> Tensor:
        """This rank's rows of those of all ranks, a copy.

        Args:
            rows: ``[..., size]``.
        """
        return rows[..., self.ranks.rank :: self.ranks.world_size].clone()
