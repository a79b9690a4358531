"""Picking the samples that rank first by one number each."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.options import ByClass, Options
from composer_effalgos.utils.checks import Range

__all__ = ['RankingOptions', 'by_rank']


@dataclass(frozen=True, kw_only=True)
class RankingOptions(Options):
    """Options of every strategy that ranks.

    Attributes:
        keep: Which end of the ranking to keep.
        skip: Share of the samples at that end to leave out.
    """

    selection_type: ByClass | None = None
    keep: Literal['highest', 'lowest'] = 'highest'
    skip: Annotated[float, Range(least=0, below=1)] = 0.0


def by_rank(problem: Problem, scores: Tensor) -> Selection:
    """The samples of the highest scores (``keep='lowest'``: of the lowest), with weight 1; equal scores in random order.

    ``skip`` leaves out that share of the samples at the top of the ranking first: with noisy labels the very hardest are often the
    mislabelled ones (Paul et al., arXiv 2107.07075, section 4). It gives way where the budget needs them.
    """
    n, device = len(scores), scores.device
    shuffled = torch.randperm(n, generator=problem.generator).to(device)
    descending = problem.options.keep == 'highest'
    ranked = shuffled[torch.argsort(scores[shuffled], descending=descending, stable=True)]
    start = min(int(problem.options.skip * n), n - problem.budget)
    return ranked[start : start + problem.budget], torch.ones(problem.budget, device=device)
