"""Greedy maximisation of a submodular function."""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from composer_effalgos.subset_selection.strategies.kernels import BLOCK_BYTES

BLOCK = 32  # candidates evaluated together
SAMPLE_FACTOR = math.log(100)  # stochastic greedy evaluates ln(1/0.01) n/k candidates per step
DRAWS = 2**18  # random numbers sent to the device together


class SetFunction(Protocol):
    """A submodular function of a set that grows by one item at a time."""

    n: int

    def gains(self, items: Tensor) -> Tensor:
        """Marginal gains of some items, int64 ``[m]``, for the current set; float64 ``[m]``."""

    def add(self, item: Tensor) -> None:
        """Adds one item, int64 ``[1]``, to the set."""


class Remaining:
    """The remaining items, and the random samples of them for stochastic greedy.

    Samples are drawn with replacement, which is cheap and only costs repeated items; a sample at least as large as the remaining items is
    replaced by all of them. Random numbers are drawn on the CPU in large blocks, so that no step waits for the device.

    Args:
        n (int): number of items.
        picks (int): number of items that will be picked; a sample has ``ln(100) n / picks`` items.
        generator (torch.Generator): CPU generator.
        device (torch.device): device of the samples.
    """

    def __init__(self, n: int, picks: int, generator: torch.Generator, device: torch.device) -> None:
        self.items = torch.arange(n, device=device)
        self.left = n
        self.size = max(1, int(n / picks * SAMPLE_FACTOR))
        self.draws = self._positions(min(picks, max(1, DRAWS // self.size)), generator)

    def _positions(self, together: int, generator: torch.Generator) -> Iterator[Tensor]:
        for most in range(self.left, 0, -together):
            lefts = range(most, max(0, most - together), -1)
            drawn = [torch.randint(left, (self.size,), generator=generator) if self.size < left else torch.arange(left) for left in lefts]
            yield from torch.cat(drawn).to(self.items.device).split([len(positions) for positions in drawn])

    def sample(self) -> Tensor:
        """Draws items to evaluate, int64 ``[m]``."""
        self.positions = next(self.draws)
        return self.items[self.positions]

    def remove(self, which: Tensor) -> None:
        """Removes the item at a position, int64 ``[1]``, in the last sample."""
        self.left -= 1
        self.items.index_copy_(0, self.positions[which], self.items[self.left :][:1].clone())


def greedy(
    function: SetFunction, optimizer: str, budget: int, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[int, float]]:
    """Yields all items in greedy order, each with its gain.

    ``lazy`` and ``naive`` are the same here: lazy greedy (Minoux, 1978), which re-evaluates only items whose old gain, an upper bound by
    submodularity, is still the largest. ``stochastic`` picks the best of a random sample of ``ln(100) n / budget`` remaining items
    (Mirzasoleiman et al., arXiv 1409.7938). The device is synchronised once per evaluation of candidates.

    Args:
        function (SetFunction): the function, with an empty set.
        optimizer (str): ``lazy``, ``naive`` or ``stochastic``.
        budget (int): number of items the caller will take; only determines the size of the random samples.
        generator (torch.Generator): CPU generator for the random samples.
        device (torch.device): device of the function.
    """
    return _stochastic(function, budget, generator, device) if optimizer == 'stochastic' else _lazy(function, device)


def _stochastic(function: SetFunction, budget: int, generator: torch.Generator, device: torch.device) -> Iterator[tuple[int, float]]:
    remaining = Remaining(function.n, budget, generator, device)
    for _ in range(function.n):
        candidates = remaining.sample()
        gains = function.gains(candidates)
        which = gains.argmax(dim=0, keepdim=True)
        best = candidates[which]
        remaining.remove(which)
        function.add(best)
        item, gain = torch.cat([best.double(), gains[which]]).tolist()
        yield int(item), gain


def _lazy(function: SetFunction, device: torch.device) -> Iterator[tuple[int, float]]:
    everything = torch.arange(function.n, device=device)
    taken = torch.zeros(function.n, dtype=torch.bool, device=device)
    bounds = torch.cat([function.gains(block) for block in everything.split(max(BLOCK, BLOCK_BYTES // (4 * function.n)))])
    fresh = ~taken  # items whose bound is their current gain
    for left in range(function.n, 0, -1):
        while True:
            best = bounds.argmax(dim=0, keepdim=True)  # the first of equals
            is_fresh, item, gain = torch.cat([fresh[best].double(), best.double(), bounds[best]]).tolist()
            if is_fresh:
                break
            front = torch.cat([best, bounds.masked_fill(fresh, -torch.inf).topk(min(BLOCK, left)).indices])
            bounds[front] = function.gains(front)
            bounds.masked_fill_(taken, -torch.inf)  # with fewer than BLOCK stale items, topk also returned taken ones
            fresh[front] = True
        taken.index_fill_(0, best, True)
        bounds.index_fill_(0, best, -torch.inf)
        fresh = torch.zeros_like(taken)
        function.add(best)
        yield int(item), gain
