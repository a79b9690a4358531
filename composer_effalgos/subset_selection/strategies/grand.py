"""GraNd: the samples of the largest gradients."""

from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.ranking import by_rank

__all__ = ['grand']


def grand(problem: Problem) -> Selection:
    """Ranks by the length of the gradient (Paul et al., arXiv 2107.07075, definition 2.1), here that of the last layer.

    The paper takes the gradient of all parameters, at initialisation, averaged over networks.
    """
    return by_rank(problem, problem.gradients.squared_norms())
