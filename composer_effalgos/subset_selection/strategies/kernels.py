"""Inner products and distances between gradients, in blocks that fit in memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.problem import Problem
from composer_effalgos.subset_selection.strategies.options import Options

__all__ = ['Distances', 'KernelOptions', 'batch_mean_gram']

KERNEL_BYTES = 2**28  # a kernel above this is computed again, block by block, whenever a part of it is needed
BLOCK_BYTES = 2**20  # of one block; some four of them are in use at a time


@dataclass(frozen=True, kw_only=True)
class KernelOptions(Options):
    """Options of every strategy that compares all pairs of samples.

    Attributes:
        if_convex: Whether it compares embeddings in place of gradients.
        optimizer: How the greedy maximisation goes.
    """

    if_convex: bool = False
    optimizer: Literal['lazy', 'naive', 'stochastic'] = 'lazy'


def batch_mean_gram(gradients: LastLayerGradients, batch_size: int) -> Tensor:
    """Inner products between the mean gradients of successive batches, float ``[P, P]``.

    A mean of products is no product, so the means are written out, but only for as many classes at a time as fit in a block.
    """
    n, classes = gradients.error.shape
    batches = -(-n // batch_size)
    sizes = torch.full((batches, 1, 1), float(batch_size), device=gradients.device)
    sizes[-1] = n - (batches - 1) * batch_size
    padding = (0, 0, 0, batches * batch_size - n)
    error = pad(gradients.error, padding).view(batches, batch_size, classes) / sizes
    bias = error.sum(dim=1)
    gram = bias @ bias.T
    if gradients.embedding is not None:
        embedding = pad(gradients.embedding, padding).view(batches, batch_size, -1)
        for part in error.split(max(1, BLOCK_BYTES // (4 * batches * embedding.shape[2])), dim=2):
            means = torch.bmm(part.transpose(1, 2), embedding).flatten(1)
            gram += means @ means.T
    return gram


class Distances:
    """Squared distances between the gradients of n items: samples, or means of batches.

    Kept whole up to ``KERNEL_BYTES`` (n = 8,192), otherwise computed by rows on demand. In use at any time are those bytes and some
    ``4 BLOCK_BYTES``.

    Args:
        problem (Problem): whose items are compared.
    """

    def __init__(self, problem: Problem) -> None:
        self.gradients = problem.gradients
        self.n = problem.items
        self.whole: Tensor | None = None
        device = self.gradients.device
        if problem.batch_size is not None:
            gram = batch_mean_gram(problem.gradients, problem.batch_size)
            squares = gram.diagonal().clone()
            self.whole = gram.mul_(-2).add_(squares).add_(squares[:, None]).clamp_(min=0)
            self.whole.fill_diagonal_(0)  # not the rounding error of norm + norm - 2 norm
        else:
            self.squares = self.gradients.squared_norms()
        # One pass for all: the total from each item to all, float64 [n], the largest distance, and the kernel if it is kept.
        keep = self.whole is None and 4 * self.n**2 <= KERNEL_BYTES
        kernel = torch.empty(self.n, self.n, device=device) if keep else None
        totals, largest = [], []
        for part, block in self.blocks(torch.arange(self.n, device=device)):
            totals.append(block.sum(dim=1, dtype=torch.float64))
            largest.append(block.max())
            if kernel is not None:
                kernel[part] = block
        if kernel is not None:
            self.whole = kernel
        self.totals, self.largest = torch.cat(totals), float(torch.stack(largest).max())

    def rows(self, items: Tensor) -> Tensor:
        """Squared distances from some items to all, float ``[m, n]``."""
        if self.whole is not None:
            return self.whole.index_select(0, items)
        distances = self.gradients.take(items).gram(self.gradients).mul_(-2)
        distances.add_(self.squares[items, None]).add_(self.squares).clamp_(min=0)
        distances[torch.arange(len(items), device=items.device), items] = 0
        return distances

    def blocks(self, items: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in blocks: some of the items, and their rows."""
        for part in items.split(max(1, BLOCK_BYTES // (4 * self.n))):
            yield part, self.rows(part)

    def cluster_sizes(self, items: Tensor) -> Tensor:
        """How many of all have each of the items as their nearest (the first of those equally near), float ``[m]``."""
        nearest = torch.full((self.n,), torch.inf, device=items.device)
        owner = torch.zeros(self.n, dtype=torch.int64, device=items.device)
        done = 0
        for part, block in self.blocks(items):
            distance, position = block.min(dim=0)
            closer = distance < nearest
            nearest = torch.where(closer, distance, nearest)
            owner = torch.where(closer, position + done, owner)
            done += len(part)
        return torch.bincount(owner, minlength=len(items)).float()
