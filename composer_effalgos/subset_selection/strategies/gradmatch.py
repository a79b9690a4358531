"""GradMatch: a weighted subset whose gradient is close to the whole."""

from collections.abc import Callable

import torch
from torch import Tensor

from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.kernels import batch_mean_gram

__all__ = ['gradmatch', 'matching_pursuit']

DEPENDENT = 1e-6  # share of a squared length, outside the span of the others, below which a gradient counts as inside it


def gradmatch(problem: Problem) -> Selection:
    """Orthogonal matching pursuit with non-negative weights (Killamsetty et al., arXiv 2103.00123, section 3.2).

    The target is the sum of the candidates' gradients, or of the validation set's with ``valid``; for ``PerBatch`` the sum of the batches'
    means, to be matched by some of these means.
    """
    candidates = problem.gradients
    target = _target(problem.reference if problem.options['valid'] else candidates, problem.batch_size)
    column: Callable[[int], Tensor]
    if problem.batch_size is None:
        squares = candidates.squared_norms()

        def column(item: int) -> Tensor:
            return candidates.gram(candidates.take(slice(item, item + 1)))[:, 0]
    else:
        gram = batch_mean_gram(candidates, problem.batch_size)
        squares = gram.diagonal()

        def column(item: int) -> Tensor:
            return gram[item]

    items, weights = matching_pursuit(
        problem.item_means(candidates.dot(target)),
        squares,
        column,
        float(target.double().square().sum()),
        problem.item_budget,
        lam=problem.options['lam'],
        eps=problem.options['eps'],
    )
    return problem.rows_of(items, weights)


def _target(gradients: LastLayerGradients, batch_size: int | None) -> Tensor:
    if batch_size is None:
        return gradients.sum()
    share = gradients.error.new_full((len(gradients), 1), 1 / batch_size)
    short = len(gradients) % batch_size
    share[len(gradients) - short :] = 1 / max(short, 1)
    return LastLayerGradients(gradients.error * share, gradients.embedding).sum()


def matching_pursuit(
    correlations: Tensor,
    squares: Tensor,
    column: Callable[[int], Tensor],
    target_square: float,
    budget: int,
    *,
    lam: float,
    eps: float,
) -> Selection:
    """Minimises ``|sum_i w_i g_i - target|^2 + lam |w|^2`` over ``w >= 0`` with at most ``budget`` entries above zero, greedily.

    Each step takes the gradient best aligned with the residual and solves for all weights anew; weights that would turn negative leave on
    the way there (the active-set rule of Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23), so that the objective never
    rises. All in the space of inner products, with a Cholesky factor that grows by a row a step. Memory: ``budget x (n + budget)`` numbers.

    Args:
        correlations (Tensor): inner products with the target, float ``[n]``.
        squares (Tensor): squared lengths, float ``[n]``.
        column (Callable[[int], Tensor]): inner products of one gradient with all, float ``[n]``.
        target_square (float): squared length of the target.
        budget (int): most entries above zero.
        lam (float): ridge.
        eps (float): stops once the residual is below ``eps`` times the target.

    Returns:
        Selection: positions in the order of selection and their weights.
    """
    device = correlations.device
    columns = torch.empty(budget, len(correlations), device=device)
    factor = torch.zeros(budget, budget, dtype=torch.float64, device=device)
    reduced = torch.zeros(budget, dtype=torch.float64, device=device)  # factor^-1 correlations
    weights = torch.zeros(0, dtype=torch.float64, device=device)
    chosen: list[int] = []
    open_ = torch.ones(len(correlations), dtype=torch.bool, device=device)
    aligned = correlations
    threshold = 1e-6 * float(correlations.max())
    for _ in range(3 * budget):
        size = len(chosen)
        residual = target_square - float(weights @ correlations[chosen].double()) - lam * float(weights.square().sum())
        if size == budget or residual <= eps**2 * target_square:
            break
        best = int(aligned.masked_fill(~open_, -torch.inf).argmax())
        if not open_[best] or aligned[best] <= threshold:
            break
        open_[best] = False
        columns[size] = column(best)
        row = columns[size][chosen].double()
        square = float(squares[best]) + lam
        if size:
            row = torch.linalg.solve_triangular(factor[:size, :size], row[:, None], upper=False)[:, 0]
        pivot = square - float(row @ row)
        if pivot <= DEPENDENT * square:
            continue
        factor[size, :size], factor[size, size] = row, pivot**0.5
        reduced[size] = (correlations[best].double() - row @ reduced[:size]) / pivot**0.5
        chosen.append(best)
        weights = torch.cat([weights, weights.new_zeros(1)])
        while True:
            size = len(chosen)
            solution = torch.linalg.solve_triangular(factor[:size, :size].T, reduced[:size, None], upper=True)[:, 0]
            falling = solution <= 0
            if not falling.any():
                weights = solution
                break
            # Walk from the old weights towards the solution until the first of them meets zero, and let that one go.
            step = (weights / (weights - solution)).masked_fill(~falling, torch.inf)
            first = int(step.argmin())
            weights = weights + step[first] * (solution - weights)
            if chosen[first] != best:
                open_[chosen[first]] = True
            kept = [i for i in range(size) if i != first]
            chosen, weights = [chosen[i] for i in kept], weights[kept].clamp(min=0)
            if not kept:
                break
            columns[: size - 1] = columns[kept]
            gram = columns[: size - 1][:, chosen].double()
            gram.diagonal().copy_(squares[chosen] + lam)
            factor[: size - 1, : size - 1] = torch.linalg.cholesky(gram)
            right = correlations[chosen].double()[:, None]
            reduced[: size - 1] = torch.linalg.solve_triangular(factor[: size - 1, : size - 1], right, upper=False)[:, 0]
        aligned = correlations - weights.float() @ columns[: len(chosen)]
    return torch.tensor(chosen, dtype=torch.int64, device=device), weights.float()
