"""CRAIG: medoids of the gradients, weighted by cluster size."""

from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch

from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.greedy import greedy
from composer_effalgos.subset_selection.strategies.kernels import Distances, KernelOptions
from composer_effalgos.subset_selection.strategies.submodular import FacilityLocation


@dataclass(frozen=True, kw_only=True)
class CraigOptions(KernelOptions):
    """Options of CRAIG."""

    selection_type: Literal['PerClass', 'PerBatch', 'Supervised'] | None = None


def craig(problem: Problem) -> Selection:
    """Facility location over the gradients of samples or batches (Mirzasoleiman et al., arXiv 1906.01827, algorithm 1).

    As in CORDS, and unlike the submodular functions, ``Supervised`` compares samples across classes.
    """
    distances, device = Distances(problem), problem.gradients.device
    steps = greedy(FacilityLocation(distances), problem.options.optimizer, problem.item_budget, problem.generator, device)
    items = torch.tensor([item for item, _ in islice(steps, problem.item_budget)], device=device)
    return problem.rows_of(items, distances.cluster_sizes(items))
