"""Herding: samples whose mean stays close to the mean of all samples."""

import torch

from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.points import points_of


def herding(problem: Problem) -> Selection:
    """Greedily picks the sample that brings the mean of the picked samples closest to the mean of all, without replacement.

    Welling, "Herding Dynamical Weights to Learn", ICML 2009, in the form of Chen, Welling and Smola, arXiv 1203.3472, equation 8, which
    is Welling's update if all points have the same norm.
    """
    points, budget = points_of(problem.gradients, problem.options.features), problem.budget
    toward_mean = points.dot(points.mean()).double()
    half_squares = points.squared_norms().double() / 2
    toward_picked = torch.zeros_like(toward_mean)  # inner products with the sum of the picked samples
    order = torch.empty(budget, dtype=torch.int64, device=points.device)
    for step in range(budget):
        # (step + 1) / 2 times the squared distance between the two means, up to a constant
        cost = (toward_picked + half_squares) - (step + 1) * toward_mean
        best = cost.argmin(dim=0, keepdim=True)
        order[step] = best[0]
        toward_picked += points.gram(points.take(best))[:, 0]
        half_squares.index_fill_(0, best, torch.inf)  # without replacement
    return order, torch.ones(budget, device=points.device)
