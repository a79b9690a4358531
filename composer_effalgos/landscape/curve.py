"""Loss and accuracy along the straight line through two solutions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from composer_effalgos.utils.checks import check_number

# Images and labels that fit in memory: float [B, ...] and int64 [B]
Batches = Sequence[tuple[Tensor, Tensor]]

_MOST_POINTS = 10_000


@dataclass(frozen=True)
class Point:
    """What a network on the line does.

    Attributes:
        alpha: Its place: 0 is the first solution, 1 the second.
        train_loss: Mean cross-entropy in nats; infinite or NaN where the network's outputs are.
        train_accuracy: Share of right answers, in [0, 1]; an output that is not finite is a wrong answer.
        test_loss: The same on the evaluation data.
        test_accuracy: The same on the evaluation data.
    """

    alpha: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


def alphas(points: int = 25) -> list[float]:
    """Where to look on the line.

    Args:
        points: Equal steps from -1 to 2, as many as the paper's 25 or another number of at least 2.

    Returns:
        These, both solutions, and four more around each solution (1/32 and 1/16 away), where the curves bend; in rising order.

    Raises:
        InputError: Fewer than 2 points, or more than anybody waits for.
    """
    check_number('points', points, least=2, most=_MOST_POINTS)
    coarse = {-1 + 3 * index / (points - 1) for index in range(points)}
    fine = {solution + offset / 32 for solution in (0, 1) for offset in (-2, -1, 0, 1, 2)}
    return sorted(coarse | fine)


def on_the_line(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A network's state on the line ``(1 - alpha) a + alpha b``.

    Args:
        a: State dict of the first solution.
        b: State dict of the second, of the same names and shapes.
        alpha: The place.

    Returns:
        What floats, mixed in double precision; counters as ``a`` has them.
    """

    def mix(x: Tensor, y: Tensor) -> Tensor:
        return ((1 - alpha) * x.double() + alpha * y.double()).to(x.dtype) if x.is_floating_point() else x

    return {name: mix(value, b[name]) for name, value in a.items()}


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of a network that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Batches) -> None:
    """Give every batch norm the statistics of some data under the network's present weights, in place.

    Weights between two solutions have other activations than either, so that statistics of neither, nor a mixture of them, belong to
    them. Each batch norm gets the mean over the batches of their means and unbiased variances, in one pass in which batch norms use the
    batch's statistics (dropout is off, as when the network is evaluated). The network is left in evaluation mode.

    Args:
        model: The network.
        batches: The data, in batches of (nearly) equal size.
    """
    model.eval()
    norms = batch_norms(model)
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    for images, _ in batches:
        model(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of a network in evaluation mode.

    The outputs are computed in the network's precision, their cross-entropy in double precision, so that a large loss stays a number.

    Args:
        model: Maps images to logits ``[B, C]``.
        batches: The data.

    Returns:
        Loss in nats (infinite or NaN where an output is), and share of right answers.
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
    """Walk along the line between two solutions, one point at a time.

    Args:
        model: The network; its weights are overwritten.
        a: State dict of the first solution.
        b: State dict of the second.
        train: Training data; batch norms take their statistics from it at every point.
        test: Evaluation data.
        places: The values of alpha.

    Yields:
        The points in the order of ``places``.

    Source: Goodfellow et al., arXiv 1412.6544; Keskar et al., arXiv 1609.04836, section 2.2.1.
    """
    for alpha in places:
        model.load_state_dict(on_the_line(a, b, alpha))
        reestimate_batch_norm(model, train)
        yield Point(alpha, *evaluate(model, train), *evaluate(model, test))
