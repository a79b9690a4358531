"""K-center: samples that minimise the largest distance from any sample to its nearest pick."""

import torch

from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.points import farthest_first, points_of


def k_center(problem: Problem) -> Selection:
    """Greedy k-center (Sener and Savarese, arXiv 1708.00489, algorithm 1), starting from a random sample.

    The largest distance from a sample to its nearest pick is at most twice the optimum.
    """
    points = points_of(problem.gradients, problem.options.features)
    first = int(torch.randint(len(points), (), generator=problem.generator))
    order, _ = farthest_first(points, problem.budget, first)
    return order, torch.ones(problem.budget, device=points.device)
