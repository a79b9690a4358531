"""Facility location, graph cut, sum redundancy and saturated coverage, with CORDS's similarity."""

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from composer_effalgos.subset_selection.problem import Problem, Selection, by_label
from composer_effalgos.subset_selection.strategies.greedy import SetFunction, greedy
from composer_effalgos.subset_selection.strategies.kernels import Distances, KernelOptions
from composer_effalgos.subset_selection.strategies.options import ByClass

SATURATION = 0.1  # apricot's default, which CORDS uses


@dataclass(frozen=True, kw_only=True)
class SubmodularOptions(KernelOptions):
    """Options of the submodular functions."""

    selection_type: ByClass | None = None


class _SimilarityFunction:
    """Base class: the similarity is the largest squared distance of the problem minus the squared distance, as in CORDS."""

    def __init__(self, distances: Distances) -> None:
        self.distances = distances
        self.n = distances.n
        self.row_sums = distances.n * distances.largest - distances.totals

    def similarity(self, items: Tensor) -> Tensor:
        """Similarities of some items ``[m]`` to all, float ``[m, n]``."""
        return self.distances.largest - self.distances.rows(items)


class FacilityLocation(_SimilarityFunction):
    """``sum_v max_{s in S} sim(v, s)``: how well the set represents every item."""

    def __init__(self, distances: Distances) -> None:
        super().__init__(distances)
        self.nearest = torch.full((self.n,), distances.largest, device=distances.totals.device)

    def gains(self, items: Tensor) -> Tensor:
        return (self.nearest - self.distances.rows(items)).clamp_(min=0).sum(dim=1, dtype=torch.float64)

    def add(self, item: Tensor) -> None:
        self.nearest = torch.minimum(self.nearest, self.distances.rows(item)[0])


class GraphCut(_SimilarityFunction):
    """``sum_{v, s in S} sim(v, s) - sum_{s, t in S} sim(s, t)``: close to all items, and far from each other."""

    def __init__(self, distances: Distances) -> None:
        super().__init__(distances)
        self.gain = self.row_sums - distances.largest

    def gains(self, items: Tensor) -> Tensor:
        return self.gain[items]

    def add(self, item: Tensor) -> None:
        self.gain -= 2 * self.similarity(item)[0]


class SumRedundancy(GraphCut):
    """``- sum_{s, t in S} sim(s, t)``: far from each other."""

    def __init__(self, distances: Distances) -> None:
        super().__init__(distances)
        self.gain = torch.full_like(self.row_sums, -distances.largest)


class SaturatedCoverage(_SimilarityFunction):
    """``sum_v min(sum_{s in S} sim(v, s), a sum_u sim(v, u))``: each item's coverage saturates at ``a`` times the full coverage."""

    def __init__(self, distances: Distances) -> None:
        super().__init__(distances)
        self.room = SATURATION * self.row_sums  # coverage left until saturation

    def gains(self, items: Tensor) -> Tensor:
        return torch.minimum(self.similarity(items), self.room).sum(dim=1)

    def add(self, item: Tensor) -> None:
        self.room = (self.room - self.similarity(item)[0]).clamp_(min=0)


FUNCTIONS: Mapping[str, Callable[[Distances], SetFunction]] = {
    'facility-location': FacilityLocation,
    'graph-cut': GraphCut,
    'sum-redundancy': SumRedundancy,
    'saturated-coverage': SaturatedCoverage,
}


def submodular(problem: Problem, function: str) -> Selection:
    """Greedy maximisation of a submodular function, with cluster sizes as weights.

    The functions are those of apricot (Schreiber et al., arXiv 1906.03543). Samples of different classes have similarity zero: the function
    is a sum over the classes, so the greedy choice over all classes is the best of the next choices of each class.
    """
    parts = by_label(problem.labels, len(problem.gradients), problem.gradients.device)
    kernels = []

    def picks(part: int, rows: Tensor) -> Iterator[tuple[float, int, int]]:
        kernels.append(Distances(problem.part(rows)))
        share = max(1, problem.budget * len(rows) // len(problem.gradients))
        steps = greedy(FUNCTIONS[function](kernels[part]), problem.options.optimizer, share, problem.generator, rows.device)
        for item, gain in steps:
            yield -gain, part, item

    merged = heapq.merge(*(picks(part, rows) for part, rows in enumerate(parts)), key=lambda pick: pick[0])
    chosen = list(islice(merged, problem.budget))
    positions = torch.stack([parts[part][item] for _, part, item in chosen])
    weights = torch.ones(len(chosen))
    for part, distances in enumerate(kernels):
        mine = [i for i, pick in enumerate(chosen) if pick[1] == part]
        if mine:
            items = torch.tensor([chosen[i][2] for i in mine], device=positions.device)
            weights[mine] = distances.cluster_sizes(items).cpu()
    return positions, weights
