"""EL2N: the samples whose predicted probabilities are furthest from their labels."""

from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.ranking import by_rank


def el2n(problem: Problem) -> Selection:
    """Ranks by the norm of the error, ``|softmax(logits) - onehot(label)|`` (Paul et al., arXiv 2107.07075, definition 2.2).

    The paper averages the score over several networks early in training; here it is the score of the current network.
    """
    return by_rank(problem, problem.gradients.error.square().sum(dim=1))
