"""GraNd: the samples with the largest gradients."""

from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.ranking import by_rank


def grand(problem: Problem) -> Selection:
    """Ranks by the norm of the last-layer gradient (Paul et al., arXiv 2107.07075, definition 2.1).

    The paper uses the gradient of all parameters at initialisation, averaged over networks.
    """
    return by_rank(problem, problem.gradients.squared_norms())
