"""Selection of the top-ranked samples by a score."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.options import ByClass, Options
from composer_effalgos.utils.checks import Range


@dataclass(frozen=True, kw_only=True)
class RankingOptions(Options):
    """Options of ranking strategies.

    Attributes:
        keep: Which end of the ranking to keep.
        skip: Fraction of the samples to skip at that end.
    """

    selection_type: ByClass | None = None
    keep: Literal['highest', 'lowest'] = 'highest'
    skip: Annotated[float, Range(least=0, below=1)] = 0.0


def by_rank(problem: Problem, scores: Tensor) -> Selection:
    """Selects the samples with the highest scores (``keep='lowest'``: the lowest), with weight 1; ties are in random order.

    ``skip`` first drops that fraction of the samples at the top of the ranking: with noisy labels the hardest samples are often mislabelled
    (Paul et al., arXiv 2107.07075, section 4). Fewer are skipped if the budget needs them.
    """
    n, device = len(scores), scores.device
    shuffled = torch.randperm(n, generator=problem.generator).to(device)
    descending = problem.options.keep == 'highest'
    ranked = shuffled[torch.argsort(scores[shuffled], descending=descending, stable=True)]
    start = min(int(problem.options.skip * n), n - problem.budget)
    return ranked[start : start + problem.budget], torch.ones(problem.budget, device=device)
