"""Feature points of samples, for herding, k-center and MILO."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.strategies.options import ByClass, Options


@dataclass(frozen=True, kw_only=True)
class PointOptions(Options):
    """Options of strategies that compare samples as points.

    Attributes:
        features: What to use as points.
    """

    selection_type: ByClass | None = None
    features: Literal['embedding', 'gradient'] = 'embedding'


def points_of(gradients: LastLayerGradients, features: str) -> LastLayerGradients:
    """Returns the embeddings as points, or the gradients with ``features='gradient'`` or without an embedding."""
    if features == 'gradient' or gradients.embedding is None:
        return gradients
    return LastLayerGradients(gradients.embedding)


def unit_length(points: LastLayerGradients) -> LastLayerGradients:
    """Normalises the points to length 1; a point at the origin stays there."""
    return LastLayerGradients(points.error / points.squared_norms().sqrt().clamp(min=1e-12)[:, None], points.embedding)


def farthest_first(points: LastLayerGradients, count: int, first: int) -> tuple[Tensor, Tensor]:
    """Farthest-first traversal (Gonzalez, 1985): repeatedly picks the point farthest from those picked. Never synchronises the device.

    Args:
        points (LastLayerGradients): N points.
        count (int): number of points to pick, 1 to N.
        first (int): position of the first point.

    Returns:
        tuple[Tensor, Tensor]: positions, int64 ``[count]``, and the squared distance of each to the nearest point picked before it, float32
        ``[count]``; infinite for the first.
    """
    squares, device = points.squared_norms(), points.device
    nearest = torch.full((len(points),), torch.inf, device=device)
    order = torch.empty(count, dtype=torch.int64, device=device)
    distances = torch.empty(count, device=device)
    best = torch.tensor([first], device=device)
    for step in range(count):
        order[step], distances[step] = best[0], nearest[best[0]]
        to_best = squares + squares[best] - 2 * points.gram(points.take(best))[:, 0]
        nearest = torch.minimum(nearest, to_best.clamp_(min=0)).index_fill_(0, best, -torch.inf)
        best = nearest.argmax(dim=0, keepdim=True)
    return order, distances
