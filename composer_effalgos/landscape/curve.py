"""Loss and accuracy along the straight line through two solutions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from composer_effalgos.utils.checks import check_number

# In-memory batches of images, float [B, ...], and labels, int64 [B]
Batches = Sequence[tuple[Tensor, Tensor]]

_MOST_POINTS = 10_000


@dataclass(frozen=True)
class Point:
    """Loss and accuracy of a network on the line.

    Attributes:
        alpha: Position on the line: 0 is the first solution, 1 the second.
        train_loss: Mean cross-entropy in nats; infinite or NaN if an output of the network is.
        train_accuracy: Accuracy in [0, 1]; samples with non-finite outputs count as wrong.
        test_loss: As ``train_loss``, on the evaluation data.
        test_accuracy: As ``train_accuracy``, on the evaluation data.
    """

    alpha: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


def alphas(points: int = 25) -> list[float]:
    """Positions on the line to evaluate, ascending: ``points`` equally spaced ones from -1 to 2, from 2 to 10,000; 25 in the paper.

    With them come both solutions, and four points near each (1/32 and 1/16 away), where the curves bend.
    """
    check_number('points', points, least=2, most=_MOST_POINTS)
    coarse = {-1 + 3 * index / (points - 1) for index in range(points)}
    fine = {solution + offset / 32 for solution in (0, 1) for offset in (-2, -1, 0, 1, 2)}
    return sorted(coarse | fine)


def on_the_line(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Returns the state dict at ``(1 - alpha) a + alpha b``, for state dicts with the same names and shapes.

    Floating-point tensors are interpolated in float64 and keep their dtype; other tensors (counters) are those of ``a``.
    """

    def mix(x: Tensor, y: Tensor) -> Tensor:
        return ((1 - alpha) * x.double() + alpha * y.double()).to(x.dtype) if x.is_floating_point() else x

    return {name: mix(value, b[name]) for name, value in a.items()}


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Returns the batch norms of a network that track running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Batches) -> None:
    """Recomputes the running statistics of all batch norms for the current weights, in place, from batches of (nearly) equal size.

    Interpolated weights produce other activations than either solution, so neither solution's statistics, nor a mixture, fit them. The
    running statistics become the means over the batches of the batch means and unbiased batch variances, from one pass in which batch norms
    normalise by batch statistics (dropout is off, as in evaluation). The network is left in evaluation mode.
    """
    model.eval()
    norms = batch_norms(model)
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average: the plain mean over the batches
        norm.train()
    for images, _ in batches:
        model(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy in [0, 1] of a network in evaluation mode, which maps images to logits ``[B, C]``.

    The outputs are computed in the network's precision, the cross-entropy in float64, so that a large loss stays finite; it is infinite or
    NaN if an output is.
    """
    model.eval()
    loss, right, samples = 0.0, 0, 0
    for images, labels in batches:
        logits = model(images).double()
        loss += float(nn.functional.cross_entropy(logits, labels, reduction='sum'))
        right += int(((logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)).sum())
        samples += len(labels)
    return loss / samples, right / samples


def line(
    model: nn.Module, a: Mapping[str, Tensor], b: Mapping[str, Tensor], train: Batches, test: Batches, places: Iterable[float]
) -> Iterator[Point]:
    """Evaluates the points on the line between two solutions, one at a time.

    Args:
        model: The network; its weights are overwritten.
        a: State dict of the first solution.
        b: State dict of the second.
        train: Training data; the batch norm statistics are recomputed from it at every point.
        test: Evaluation data.
        places: The values of alpha.

    Yields:
        The points, in the order of ``places``.

    Source: Goodfellow et al., arXiv 1412.6544; Keskar et al., arXiv 1609.04836, section 2.2.1.
    """
    for alpha in places:
        model.load_state_dict(on_the_line(a, b, alpha))
        reestimate_batch_norm(model, train)
        yield Point(alpha, *evaluate(model, train), *evaluate(model, test))
