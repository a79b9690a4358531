"""Margin, entropy and least confidence: the samples that the model is least certain about."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from composer_effalgos.subset_selection.problem import Problem, Selection, softmax_targets
from composer_effalgos.subset_selection.strategies.ranking import by_rank
from composer_effalgos.utils.errors import InputError


def _margin(probability: Tensor) -> Tensor:
    two = probability.topk(min(2, probability.shape[1]), dim=1).values
    return 1 - two[:, 0] if two.shape[1] == 1 else two[:, 1] - two[:, 0]


def _entropy(probability: Tensor) -> Tensor:
    return -(probability * probability.clamp(min=1e-12).log()).sum(dim=1)


def _least_confidence(probability: Tensor) -> Tensor:
    return 1 - probability.max(dim=1).values


MEASURES: Mapping[str, Callable[[Tensor], Tensor]] = {'margin': _margin, 'entropy': _entropy, 'least-confidence': _least_confidence}


def uncertainty(problem: Problem, measure: str) -> Selection:
    """Ranks by the uncertainty of the model (Coleman et al., "Selection via Proxy", arXiv 1906.11829, section 2).

    With class probabilities ``p``, ``margin`` is the second largest minus the largest, ``entropy`` is ``-sum p log p``, and
    ``least-confidence`` is 1 minus the largest. The probabilities are recovered from the error of a cross-entropy, ``p - onehot(label)``.

    Raises:
        InputError: if the gradients are not those of a cross-entropy with hard labels.
    """
    targets = softmax_targets(problem.gradients.error, problem.labels)
    if targets is None:
        raise InputError(
            f'gradients.error: is not softmax(logits) - onehot(label), so strategy {measure} cannot read the probabilities from it; '
            'take the gradients of a cross-entropy with hard labels'
        )
    return by_rank(problem, MEASURES[measure](torch.softmax(targets[0], dim=1)))
