"""Herding: samples whose mean stays near the mean of all."""

import torch

from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.points import points_of

__all__ = ['herding']


def herding(problem: Problem) -> Selection:
    """Takes one sample after the other so that the mean of those taken comes as near to the mean of all as it can.

    Welling, "Herding Dynamical Weights to Learn", ICML 2009, in the form of Chen, Welling and Smola, arXiv 1203.3472, equation 8, which
    for points of one length is Welling's update; without replacement.
    """
    points, budget = points_of(problem.gradients, problem.options.features), problem.budget
    toward_mean = points.dot(points.mean()).double()
    half_squares = points.squared_norms().double() / 2
    toward_picked = torch.zeros_like(toward_mean)  # inner products with the sum of those taken
    order = torch.empty(budget, dtype=torch.int64, device=points.device)
    for step in range(budget):
        # (step + 1) / 2 times the squared distance between the two means, but for what is the same for all
        cost = (toward_picked + half_squares) - (step + 1) * toward_mean
        best = cost.argmin(dim=0, keepdim=True)
        order[step] = best[0]
        toward_picked += points.gram(points.take(best))[:, 0]
        half_squares.index_fill_(0, best, torch.inf)  # not again
    return order, torch.ones(budget, device=points.device)
