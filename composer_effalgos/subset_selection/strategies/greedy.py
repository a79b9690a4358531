"""Greedy maximisation of a submodular function, one item after the other."""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from composer_effalgos.subset_selection.strategies.kernels import BLOCK_BYTES

__all__ = ['Remaining', 'SetFunction', 'greedy']

BLOCK = 32  # candidates that are looked at together
SAMPLE_FACTOR = math.log(100)  # stochastic greedy looks at ln(1/0.01) n/k candidates a step
DRAWS = 2**18  # random numbers that are sent to the device together


class SetFunction(Protocol):
    """A submodular function of a set that grows item by item."""

    n: int

    def gains(self, items: Tensor) -> Tensor:
        """What each of some items would add to the set as it is, float64 ``[m]``."""

    def add(self, item: Tensor) -> None:
        """Takes one item, int64 ``[1]``, into the set."""


class Remaining:
    """The items that are not picked yet, and the random samples of them that stochastic greedy looks at.

    A sample is drawn with replacement, which leaves out nothing but repeated looks at the same item; one that would be as large as what
    is left is all of it. The random numbers come from the CPU some thousands at a time, so that no step waits for a device.

    Args:
        n (int): items.
        picks (int): how many will be picked; a sample has ``ln(100) n / picks`` items.
        generator (torch.Generator): on the CPU.
        device (torch.device): where the samples are wanted.
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
        """Items to look at, int64 ``[m]``."""
        self.positions = next(self.draws)
        return self.items[self.positions]

    def remove(self, which: Tensor) -> None:
        """Takes out the item at one position, int64 ``[1]``, of the last sample."""
        self.left -= 1
        self.items.index_copy_(0, self.positions[which], self.items[self.left :][:1].clone())


def greedy(
    function: SetFunction, optimizer: str, budget: int, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[int, float]]:
    """Yields every item, the one with the largest gain first, and its gain.

    ``lazy`` and ``naive`` are the same here: the greedy choice, found by looking again only at items whose old gain, a bound by
    submodularity, is still in front (Minoux, 1978). ``stochastic`` chooses the best of a random sample of ``ln(100) n / budget`` of the
    rest (Mirzasoleiman et al., arXiv 1409.7938). The device is waited for once a look at candidates.

    Args:
        function (SetFunction): empty at the start.
        optimizer (str): ``lazy``, ``naive`` or ``stochastic``.
        budget (int): items that will be asked for; sets the size of the random samples, nothing else.
        generator (torch.Generator): for the random samples.
        device (torch.device): where the function computes.
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
    fresh = ~taken  # whose bound is the gain as it is
    for left in range(function.n, 0, -1):
        while True:
            best = bounds.argmax(dim=0, keepdim=True)  # of equals the first
            is_fresh, item, gain = torch.cat([fresh[best].double(), best.double(), bounds[best]]).tolist()
            if is_fresh:
                break
            front = torch.cat([best, bounds.masked_fill(fresh, -torch.inf).topk(min(BLOCK, left)).indices])
            bounds[front] = function.gains(front)
            bounds.masked_fill_(taken, -torch.inf)  # where fewer are left to look at, some that are taken were among them
            fresh[front] = True
        taken.index_fill_(0, best, True)
        bounds.index_fill_(0, best, -torch.inf)
        fresh = torch.zeros_like(taken)
        function.add(best)
        yield int(item), gain
