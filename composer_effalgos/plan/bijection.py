"""A pseudorandom permutation of ``n`` samples, evaluated per sample so that no rank has to hold all of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 8
_BLOCK = 1 << 15  # values that go through all rounds together; they stay in the CPU cache


class Bijection:
    """A pseudorandom permutation of ``0 .. size - 1``, determined by a seed.

    A Feistel network on pairs ``(left, right)`` from an ``a x b`` grid with ``a b >= size``, where ``a`` and ``b`` are both about
    ``sqrt(size)``. Each round adds a random function of one half to the other half, modulo its range. The function is a table of about
    ``sqrt(size)`` random numbers (Luby and Rackoff, 1988). A result outside ``[0, size)`` is mapped again until it falls inside (cycle
    walking; Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). This is rare, because ``a b < size + a``.

    Args:
        size: Number of elements, at least 1.
        seed: In [0, 2**63); ``None`` for the identity.
    """

    def __init__(self, size: int, seed: int | None) -> None:
        self._size, self._identity = size, seed is None
        self._left = math.isqrt(size - 1) + 1
        self._right = -(-size // self._left)
        if seed is None:
            return
        generator = torch.Generator().manual_seed(seed)
        ranges = [(self._left, self._right), (self._right, self._left)] * (_ROUNDS // 2)
        self._rounds = [torch.randint(high, (count,), generator=generator).numpy() for high, count in ranges]

    def __call__(self, samples: Tensor) -> Tensor:
        """Returns the position of each sample in the permuted order.

        Args:
            samples: int64 ``[n]``.

        Returns:
            int64 ``[n]``.
        """
        return samples if self._identity else self._walk(samples, self._forward)

    def inverse(self, positions: Tensor) -> Tensor:
        """Returns the sample at each position of the permuted order.

        Args:
            positions: int64 ``[n]``.

        Returns:
            int64 ``[n]``.
        """
        return positions if self._identity else self._walk(positions, self._backward)

    def _walk(self, values: Tensor, step: Callable[[np.ndarray], np.ndarray]) -> Tensor:
        given, found = values.numpy(), np.empty(len(values), np.int64)
        for start in range(0, len(given), _BLOCK):
            block = step(given[start : start + _BLOCK])
            while (outside := block >= self._size).any():
                block[outside] = step(block[outside])
            found[start : start + _BLOCK] = block
        return torch.from_numpy(found)

    def _split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left = values // self._right
        return left, values - left * self._right

    def _forward(self, values: np.ndarray) -> np.ndarray:
        left, right = self._split(values)
        for to_left, to_right in zip(self._rounds[::2], self._rounds[1::2], strict=True):
            left += to_left.take(right, mode='wrap')  # 'wrap' is the mode that does not copy the indices
            _to_range(left, -self._left)
            right += to_right.take(left, mode='wrap')
            _to_range(right, -self._right)
        return left * self._right + right

    def _backward(self, values: np.ndarray) -> np.ndarray:
        left, right = self._split(values)
        for to_left, to_right in zip(self._rounds[-2::-2], self._rounds[::-2], strict=True):
            right -= to_right.take(left, mode='wrap')
            _to_range(right, self._right)
            left -= to_left.take(right, mode='wrap')
            _to_range(left, self._left)
        return left * self._right + right


def _to_range(values: np.ndarray, period: int) -> None:
    """Reduces values in place to ``[0, abs(period))``, where adding ``period`` at most once is enough.

    Read as unsigned integers, negative values are very large, so the minimum selects the candidate that is in range without a division.
    """
    unsigned = values.view(np.uint64)
    np.minimum(unsigned, (values + period).view(np.uint64), out=unsigned)
