"""The yardstick: samples drawn at random, without replacement."""

import torch

from composer_effalgos.subset_selection.problem import Problem, Selection

__all__ = ['random_subset']


def random_subset(problem: Problem) -> Selection:
    """Draws the budget uniformly; all weights are one."""
    positions = torch.randperm(len(problem.gradients), generator=problem.generator)[: problem.budget]
    device = problem.gradients.device
    return positions.to(device), torch.ones(problem.budget, device=device)
