"""The baseline: samples drawn at random, without replacement."""

from dataclasses import dataclass
from typing import Literal

import torch

from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.options import Options


@dataclass(frozen=True, kw_only=True)
class RandomOptions(Options):
    """Options of random selection."""

    selection_type: Literal['Supervised', 'PerClass'] | None = None


def random_subset(problem: Problem) -> Selection:
    """Draws ``budget`` samples uniformly; all weights are one."""
    positions = torch.randperm(len(problem.gradients), generator=problem.generator)[: problem.budget]
    device = problem.gradients.device
    return positions.to(device), torch.ones(problem.budget, device=device)
