"""Greedy maximisation of a submodular function, one item after the other."""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

__all__ = ['SetFunction', 'greedy']

BLOCK = 32  # candidates that are looked at together
SAMPLE_FACTOR = math.log(100)  # stochastic greedy looks at ln(1/0.01) n/k candidates a step


class SetFunction(Protocol):
    """A submodular function of a set that grows item by item."""

    n: int

    def gains(self, items: Tensor) -> Tensor:
        """What each of some items would add to the set as it is, float64 ``[m]``."""

    def add(self, item: Tensor) -> None:
        """Takes one item, int64 ``[1]``, into the set."""


def greedy(
    function: SetFunction, optimizer: str, budget: int, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[int, float]]:
    """Yields every item, the one with the largest gain first, and its gain.

    ``lazy`` and ``naive`` are the same here: the greedy choice, found by looking again only at items whose old gain, a bound by
    submodularity, is still in front (Minoux, 1978). ``stochastic`` chooses the best of a random sample of ``ln(100) n / budget`` of the
    rest (Mirzasoleiman et al., arXiv 1409.7938).

    Args:
        function (SetFunction): empty at the start.
        optimizer (str): ``lazy``, ``naive`` or ``stochastic``.
        budget (int): items that will be asked for; sets the size of the random samples, nothing else.
        generator (torch.Generator): for the random samples.
        device (torch.device): where the function computes.
    """
    everything = torch.arange(function.n, device=device)
    taken = torch.zeros(function.n, dtype=torch.bool, device=device)
    bounds = torch.full((function.n,), torch.inf, dtype=torch.float64, device=device)
    if optimizer != 'stochastic':
        for block in everything.split(max(BLOCK, 2**24 // function.n)):
            bounds[block] = function.gains(block)
    fresh = ~taken
    for left in range(function.n, 0, -1):
        if optimizer == 'stochastic':
            sample = min(left, max(1, int(function.n / budget * SAMPLE_FACTOR)))
            drawn = torch.randperm(left, generator=generator)[:sample].to(device)
            candidates = everything[~taken][drawn]
            gains = function.gains(candidates)
            best, gain = candidates[gains.argmax()][None], float(gains.max())
        else:
            while True:
                best = bounds.argmax(dim=0, keepdim=True)  # of equals the first
                if fresh[best]:
                    break
                front = torch.cat([best, bounds.topk(min(BLOCK, left)).indices])
                stale = front[~fresh[front]]
                bounds[stale] = function.gains(stale)
                fresh[stale] = True
            gain = float(bounds[best])
        taken[best] = True
        bounds[best] = -torch.inf
        fresh = torch.zeros_like(taken)
        function.add(best)
        yield int(best), gain
