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
    column: Callable[[Tensor], Tensor]
    if problem.batch_size is None:
        squares = candidates.squared_norms()

        def column(item: Tensor) -> Tensor:
            return candidates.take(item).gram(candidates)[0]
    else:
        gram = batch_mean_gram(candidates, problem.batch_size)
        squares = gram.diagonal()

        def column(item: Tensor) -> Tensor:
            return gram.index_select(0, item)[0]

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
    column: Callable[[Tensor], Tensor],
    target_square: float,
    budget: int,
    *,
    lam: float,
    eps: float,
) -> Selection:
    """Minimises ``|sum_i w_i g_i - target|^2 + lam |w|^2`` over ``w >= 0`` with at most ``budget`` entries above zero, greedily.

    Each step takes the gradient best aligned with the residual and solves for all weights anew; weights that would turn negative leave on
    the way there (the active-set rule of Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23), so that the objective never
    rises. All in the space of inner products, with the inverse of a Cholesky factor that grows by a row a step, so that a step is a few
    products of matrix and vector; the device is waited for once a step. Memory: ``4 budget n + 8 budget^2`` bytes, three times as much in
    the rare step that a weight leaves in.

    Args:
        correlations (Tensor): inner products with the target, float ``[n]``.
        squares (Tensor): squared lengths, float ``[n]``.
        column (Callable[[Tensor], Tensor]): inner products of one gradient, by its position ``[1]``, with all, float ``[n]``.
        target_square (float): squared length of the target.
        budget (int): most entries above zero.
        lam (float): ridge.
        eps (float): stops once the residual is below ``eps`` times the target.

    Returns:
        Selection: positions in the order of selection and their weights.
    """
    device = correlations.device
    correlations_, squares_ = correlations.double(), squares.double() + lam
    columns = torch.empty(budget, len(correlations), device=device)
    chosen = torch.empty(budget, dtype=torch.int64, device=device)
    # Row by row the inverse of the factor, with what it makes of the correlations of the chosen in front.
    inverse = torch.zeros(budget, 1 + budget, dtype=torch.float64, device=device)
    weights = torch.zeros(0, dtype=torch.float64, device=device)
    open_ = torch.ones(len(correlations), dtype=torch.bool, device=device)
    aligned, size, matched, residual = correlations, 0, 0.0, target_square
    threshold = 1e-6 * float(correlations.max())
    for _ in range(3 * budget):
        if size == budget or residual <= eps**2 * target_square:
            break
        masked = torch.where(open_, aligned, -torch.inf)
        best = masked.argmax(dim=0, keepdim=True)
        columns[size] = column(best)
        square, line = squares_.index_select(0, best), inverse[size, : size + 2]
        row = inverse[:size, 1 : size + 1] @ columns[size].index_select(0, chosen[:size]).double()
        pivot = square - row @ row
        line[:] = -(row @ inverse[:size, : size + 2])
        line[:1] += correlations_.index_select(0, best)
        line[-1] += 1
        line.div_(pivot.clamp(min=torch.finfo(torch.float64).tiny).sqrt())
        solution = line[0] * line[1:]
        solution[:size] += weights
        facts = [masked.index_select(0, best), pivot / square, line[:1], solution.amin(dim=0, keepdim=True), (solution @ solution)[None]]
        alignment, independence, match, smallest, norm = torch.cat(facts).tolist()
        if not alignment > threshold:
            break
        open_.index_fill_(0, best, False)
        if not independence > DEPENDENT:
            continue
        chosen[size : size + 1] = best
        size, matched = size + 1, matched + match**2
        while smallest <= 0:
            # Walk from the old weights towards the solution until the first of them meets zero, and let that one go.
            weights = torch.cat([weights, weights.new_zeros(size - len(weights))])
            step = (weights / (weights - solution)).masked_fill(solution > 0, torch.inf)
            first = int(step.argmin())
            weights += step[first] * (solution - weights)
            open_[chosen[first]] = chosen[first] != best
            size -= 1
            for kept in (chosen, columns, weights):
                kept[first:size] = kept[first + 1 : size + 1].clone()
            weights = weights[:size].clamp(min=0)
            if size == 0:
                solution, matched, norm = weights, 0.0, 0.0
                break
            gram = columns[:size, chosen[:size]].double()
            gram.diagonal().copy_(squares_[chosen[:size]])
            right = torch.cat([correlations_[chosen[:size], None], torch.eye(size, dtype=torch.float64, device=device)], dim=1)
            inverse[:size, : size + 1] = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), right, upper=False)
            reduced = inverse[:size, 0]
            solution = reduced @ inverse[:size, 1 : size + 1]
            smallest, matched, norm = torch.stack([solution.min(), reduced @ reduced, solution @ solution]).tolist()
        weights, residual = solution, target_square - matched - lam * norm
        aligned = torch.addmv(correlations, columns[:size].T, weights.float(), alpha=-1)
    return chosen[:size], weights.float()
