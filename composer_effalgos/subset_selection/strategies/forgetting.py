"""Forgetting: the samples that were learned and forgotten most often."""

from dataclasses import dataclass
from typing import Any

from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.ranking import RankingOptions, by_rank
from composer_effalgos.utils.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ForgettingOptions(RankingOptions):
    """Options of forgetting.

    Attributes:
        scores: Number of forgetting events per sample, ``[N]``.
    """

    scores: Any = None


def forgetting(problem: Problem) -> Selection:
    """Ranks by the number of forgetting events, given as ``scores`` (Toneva et al., arXiv 1812.05159, section 3).

    A forgetting event: a sample is classified correctly, and misclassified the next time it is trained on. A sample that was never learned
    counts as forgotten infinitely often. ``SubsetSelection`` counts the events while it trains on all data (``kappa``).
    """
    if problem.scores is None:
        raise InputError('scores: missing; forgetting needs the number of forgetting events of every sample')
    return by_rank(problem, problem.scores)
