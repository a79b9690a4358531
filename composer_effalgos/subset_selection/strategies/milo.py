"""MILO: first diverse subsets of representative samples, then random subsets that favour hard samples."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.problem import Problem, Selection, by_label
from composer_effalgos.subset_selection.strategies.greedy import greedy
from composer_effalgos.subset_selection.strategies.options import Positive
from composer_effalgos.subset_selection.strategies.points import PointOptions, farthest_first, points_of, unit_length


@dataclass(frozen=True, kw_only=True)
class MiloOptions(PointOptions):
    """Options of MILO.

    Attributes:
        phase: Which of the two phases to select for.
        lam: Weight of the second term of the graph cut.
        scores: Importance of every sample, ``[N]``; None to compute it.
    """

    phase: Literal['stochastic-greedy', 'weighted-random'] = 'weighted-random'
    lam: Positive = 0.4
    scores: Any = None


def milo(problem: Problem) -> Selection:
    """Selects one subset of MILO (Killamsetty et al., arXiv 2301.13287), for either phase.

    ``phase='stochastic-greedy'`` maximises graph cut, ``sum_{v, s in S} sim(v, s) - lam sum_{s, t in S} sim(s, t)``, with stochastic
    greedy: each seed gives a different near-optimal subset. ``phase='weighted-random'`` samples without replacement with weights
    ``1 + g + g^2 / 2`` (second-order Taylor softmax), where ``g`` is the importance (:func:`importance`, or ``scores``). The similarity is
    ``(1 + cosine) / 2``. ``SubsetSelection`` runs both phases.
    """
    points = unit_length(points_of(problem.gradients, problem.options.features))
    if problem.options.phase == 'stochastic-greedy':
        steps = greedy(_GraphCut(points, problem.options.lam), 'stochastic', problem.budget, problem.generator, points.device)
        items = torch.tensor([item for (item, _), _ in zip(steps, range(problem.budget), strict=False)], device=points.device)
    else:
        gain = _importance(points) if problem.scores is None else problem.scores
        weight = 1 + gain.double() + gain.double().square() / 2
        # The smallest of exponential variables with these rates are a weighted sample without replacement (Efraimidis and Spirakis, 2006).
        times = -torch.rand(len(points), generator=problem.generator, dtype=torch.float64).clamp(min=1e-300).log().to(points.device)
        items = (times / weight).argsort()[: problem.budget]
    return items, torch.ones(problem.budget, device=points.device)


def importance(gradients: LastLayerGradients, labels: Tensor | None = None, features: str = 'embedding') -> Tensor:
    """MILO's importance of every sample: its distance to the samples picked before it when its whole class is picked greedily.

    The greedy order maximises disparity-min, the smallest distance ``1 - sim`` within a set; the importance is the value of the set after
    adding the sample. A class of ``n`` samples costs ``n^2`` inner products, once per run.

    Args:
        gradients (LastLayerGradients): gradients of the N samples.
        labels (Tensor | None): class indices, int64 ``[N]``; ``None`` for a single class.
        features (str): what to compare, ``embedding`` or ``gradient``.

    Returns:
        Tensor: float32 ``[N]``, in [0, 1].
    """
    points = unit_length(points_of(gradients, features))
    gains = torch.empty(len(points), device=points.device)
    for rows in by_label(labels, len(points), points.device):
        gains[rows] = _importance(points.take(rows))
    return gains


def _importance(points: LastLayerGradients) -> Tensor:
    """Importance within one class; starts from the sample most aligned with the mean, so that the result is deterministic."""
    first = int(points.dot(points.mean()).argmax())
    order, distances = farthest_first(points, len(points), first)
    distances[0] = distances[1] if len(points) > 1 else 0.0
    return torch.empty_like(distances).index_copy_(0, order, (distances / 4).clamp(max=1))  # |u - v|^2 / 4 = 1 - (1 + u.v) / 2


class _GraphCut:
    """Graph cut of cosine similarities, in closed form, without storing the kernel."""

    def __init__(self, points: LastLayerGradients, lam: float) -> None:
        self.points, self.lam, self.n = points, lam, len(points)
        self.gain = (self.n + points.dot(points.sum()).double()) / 2 - lam * (1 + points.squared_norms().double()) / 2

    def gains(self, items: Tensor) -> Tensor:
        return self.gain[items]

    def add(self, item: Tensor) -> None:
        self.gain -= self.lam * (1 + self.points.gram(self.points.take(item))[:, 0].double())
