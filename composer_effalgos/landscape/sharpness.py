"""Keskar's sharpness: the increase of the training loss in a small box around a solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from composer_effalgos.landscape.curve import Batches
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError

# Value and gradient of a function at a point
Objective = Callable[[Tensor], tuple[float, Tensor]]

# The search starts at most this far from the centre, in half widths of the box: at a minimum the gradient is zero
_START = 0.01


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Returns the trainable parameters, in the network's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def as_vector(tensors: Iterable[Tensor]) -> Tensor:
    """Copies tensors of any memory format into one vector (``parameters_to_vector`` requires contiguous tensors)."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def training_loss(model: nn.Module, batches: Batches) -> Objective:
    """Returns the training loss as a function of the weights.

    Batch norms use batch statistics, as in the authors' code, so that the loss depends only on the weights, without a second pass; dropout
    is off, and every call uses the same batches.

    Args:
        model: Maps images to logits ``[B, C]``; its weights are overwritten at every call.
        batches: The data.

    Returns:
        A function from the weights (all trainable parameters as one vector, float32 ``[n]``) to the mean cross-entropy and its gradient,
        float32 ``[n]``.
    """
    parameters = trainable(model)
    sizes = [parameter.numel() for parameter in parameters]
    samples = sum(len(labels) for _, labels in batches)

    def loss(weights: Tensor) -> tuple[float, Tensor]:
        with torch.no_grad():
            for parameter, values in zip(parameters, weights.split(sizes), strict=True):
                parameter.copy_(values.view_as(parameter))
        model.eval()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        value, gradient = 0.0, torch.zeros_like(weights)
        for images, labels in batches:
            part = nn.functional.cross_entropy(model(images), labels, reduction='sum') / samples
            value += float(part)
            gradient += as_vector(torch.autograd.grad(part, parameters))
        return value, gradient

    return loss


def random_basis(n: int, p: int, seed: int) -> Tensor:
    """The matrix A of the paper's random subspaces, float32 ``[n, p]``, with independent standard normal entries; it takes ``4 n p`` bytes.

    ``n`` is the number of weights, and ``p``, from 1 to n, the dimension of the subspace; 100 in the paper.
    """
    if not 1 <= p <= n:
        raise InputError(f'subspace: expected 1 to {n}, the number of weights, got {p}')
    return torch.randn(n, p, generator=torch.Generator().manual_seed(seed))


def box_maximum(
    f: Callable[[np.ndarray], tuple[float, np.ndarray]], half_widths: np.ndarray, *, iterations: int = 10, seed: int = 0
) -> tuple[float, float]:
    """Maximises a function in a box around the origin with L-BFGS-B.

    The search runs in units of the half widths. It starts from a random point within a hundredth of them, because the gradient is zero at a
    minimum. The function is divided by its mean absolute gradient at the start: L-BFGS-B's first step is the projected gradient itself, so
    without scaling a gradient of 1e-5 would never reach the boundary. The result of this local search is a lower bound of the maximum.

    ``f`` maps a point, float64 ``[p]``, to the value and its gradient, float64 ``[p]``; ``half_widths``, float64 ``[p]``, are positive.
    Returns the value at the origin, and the largest value among all evaluated points; infinite if any value was NaN.

    Source: Byrd et al., SIAM J. Sci. Comput. 16 (1995), in SciPy's version.
    """
    start = np.random.default_rng(seed).uniform(-_START, _START, len(half_widths))
    first, gradient = f(start * half_widths)
    seen = [f(np.zeros_like(half_widths))[0], first]
    scale = float(np.abs(gradient * half_widths).mean())

    def descend(u: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = f(u * half_widths)
        seen.append(value)
        return -value / scale, -gradient * half_widths / scale

    if scale > 0:  # false if the function is flat or the gradient is NaN
        bounds = scipy.optimize.Bounds(-np.ones_like(start), np.ones_like(start))
        options = {'maxiter': iterations, 'ftol': 0.0, 'gtol': 0.0}
        scipy.optimize.minimize(descend, start, jac=True, method='L-BFGS-B', bounds=bounds, options=options)
    return seen[0], max(math.inf if math.isnan(value) else value for value in seen)


def sharpness(f: Objective, weights: Tensor, epsilon: float, *, basis: Tensor | None = None, iterations: int = 10, seed: int = 0) -> float:
    """Keskar's sharpness of a function at a solution: ``100 (max f(x + A y) - f(x)) / (1 + f(x))``, y in a box.

    The box is ``|y_i| <= epsilon (|(A+ x)_i| + 1)``, where A+ is the pseudo-inverse of A; :func:`box_maximum` finds the maximum.

    Args:
        f: The training loss, e.g. from :func:`training_loss`.
        weights: The solution x, float ``[n]``.
        epsilon: Size of the box, positive; 1e-3 and 5e-4 in the paper.
        basis: The matrix A, float ``[n, p]``; None for the identity, i.e. the full space.
        iterations: Iterations of L-BFGS-B; 10 in the paper.
        seed: Seed of the starting point of the search.

    Returns:
        Increase of the loss in percent of ``1 + f(x)``, at least 0.

    Raises:
        InputError: epsilon is not positive.

    Source: arXiv 1609.04836, metric 2.1.
    """
    check_number('epsilon', epsilon, above=0)
    coordinates = weights if basis is None else torch.linalg.solve(basis.T @ basis, basis.T @ weights)
    half_widths = (epsilon * (coordinates.double().abs() + 1)).cpu().numpy()

    def moved(y: np.ndarray) -> tuple[float, np.ndarray]:
        step = torch.from_numpy(y).to(weights.device, weights.dtype)
        value, gradient = f(weights + (step if basis is None else basis @ step))
        return value, (gradient if basis is None else basis.T @ gradient).double().cpu().numpy()

    centre, highest = box_maximum(moved, half_widths, iterations=iterations, seed=seed)
    return 100 * (highest - centre) / (1 + centre)
