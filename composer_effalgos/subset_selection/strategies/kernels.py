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

KERNEL_BYTES = 2**28  # a larger kernel is not stored but recomputed in blocks on demand
BLOCK_BYTES = 2**20  # size of a block; about four are in use at a time


@dataclass(frozen=True, kw_only=True)
class KernelOptions(Options):
    """Options of strategies that compare all pairs of samples.

    Attributes:
        if_convex: Compare embeddings instead of gradients.
        optimizer: The greedy variant.
    """

    if_convex: bool = False
    optimizer: Literal['lazy', 'naive', 'stochastic'] = 'lazy'


def batch_mean_gram(gradients: LastLayerGradients, batch_size: int) -> Tensor:
    """Inner products between the mean gradients of consecutive batches, float ``[P, P]``.

    The mean of outer products does not factor, so the means are materialised, for as many classes at a time as fit in a block.
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

    The matrix is stored if it fits in ``KERNEL_BYTES`` (n = 8,192), otherwise rows are computed on demand. Peak memory is these bytes plus
    about ``4 BLOCK_BYTES``. With ``PerBatch`` it is always stored.
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
            self.whole.fill_diagonal_(0)  # exactly zero, without the rounding error of norm + norm - 2 norm
        else:
            self.squares = self.gradients.squared_norms()
        # One pass computes the row sums, float64 [n], the largest distance and, if it fits, the stored kernel.
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
        """Squared distances from some items ``[m]`` to all, float ``[m, n]``."""
        if self.whole is not None:
            return self.whole.index_select(0, items)
        distances = self.gradients.take(items).gram(self.gradients).mul_(-2)
        distances.add_(self.squares[items, None]).add_(self.squares).clamp_(min=0)
        distances[torch.arange(len(items), device=items.device), items] = 0
        return distances

    def blocks(self, items: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields blocks of the items with their rows of :meth:`rows`."""
        for part in items.split(max(1, BLOCK_BYTES // (4 * self.n))):
            yield part, self.rows(part)

    def cluster_sizes(self, items: Tensor) -> Tensor:
        """For each of some items, the number of items that are nearest to it (ties go to the first), float ``[m]``."""
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
