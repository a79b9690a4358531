"""GradMatch: a weighted subset whose gradient approximates the full gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.problem import Problem, Selection
from composer_effalgos.subset_selection.strategies.kernels import batch_mean_gram
from composer_effalgos.subset_selection.strategies.options import Options, Positive

DEPENDENT = 1e-6  # a gradient with less than this fraction of its squared norm outside the span of the others counts as dependent


@dataclass(frozen=True, kw_only=True)
class GradMatchOptions(Options):
    """Options of GradMatch.

    Attributes:
        eta: Required by CORDS but unused.
        valid: Whether to match the gradient of the validation set.
        v1: Which of CORDS's two solvers to use, with ``backend='cords'``.
        lam: Ridge penalty.
        eps: Stop at this relative residual.
    """

    selection_type: Literal['PerClass', 'PerBatch', 'PerClassPerGradient', 'Supervised'] | None = None
    eta: Positive = 0.01
    valid: bool = False
    v1: bool = True
    lam: Positive = 0.5
    eps: Positive = 1e-4


def gradmatch(problem: Problem) -> Selection:
    """Orthogonal matching pursuit with non-negative weights (Killamsetty et al., arXiv 2103.00123, section 3.2).

    The target is the sum of the candidates' gradients, or of the validation gradients with ``valid``. With ``PerBatch`` it is the sum of
    the batches' mean gradients, matched by a subset of these means.
    """
    candidates = problem.gradients
    reference, scale = (problem.reference, problem.reference_scale) if problem.options.valid else (candidates, 1.0)
    target = _target(reference, problem.batch_size) * scale
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
        lam=problem.options.lam,
        eps=problem.options.eps,
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
    """Greedily minimises ``|sum_i w_i g_i - target|^2 + lam |w|^2`` over ``w >= 0`` with at most ``budget`` positive entries.

    Each step adds the gradient best aligned with the residual and solves for all weights again; weights that would become non-positive are
    dropped on the way (the active-set rule of Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23), so the objective never
    increases. All computations use inner products only, with one device synchronisation per step. Memory: ``4 budget n + 8 budget^2``
    bytes, three times as much in the rare step that drops a weight.

    Args:
        correlations (Tensor): inner products of the gradients with the target, float ``[n]``.
        squares (Tensor): squared norms of the gradients, float ``[n]``.
        column (Callable[[Tensor], Tensor]): maps the position ``[1]`` of a gradient to its inner products with all, float ``[n]``.
        target_square (float): squared norm of the target.
        budget (int): maximum number of positive weights.
        lam (float): ridge penalty.
        eps (float): stop when the norm of the residual is at most ``eps`` times that of the target.

    Returns:
        Selection: positions in selection order and their weights.
    """
    active = _ActiveSet(correlations, squares, budget, lam)
    open_ = torch.ones(len(correlations), dtype=torch.bool, device=correlations.device)
    aligned, residual = correlations, target_square
    threshold = 1e-6 * float(correlations.max())
    for _ in range(3 * budget):  # more steps than picks, because weights can be dropped again
        if active.size == budget or residual <= eps**2 * target_square:
            break
        masked = torch.where(open_, aligned, -torch.inf)
        best = masked.argmax(dim=0, keepdim=True)
        alignment, independence = active.push(best, column(best), masked.index_select(0, best))
        if not alignment > threshold:
            break
        open_.index_fill_(0, best, False)
        if not independence > DEPENDENT:
            continue
        for left in active.accept():
            open_[left] = left != best  # reopen dropped gradients, except the one just added: it would be added again at once
        residual = active.residual(target_square)
        aligned = torch.addmv(correlations, active.columns[: active.size].T, active.weights.float(), alpha=-1)
    return active.chosen[: active.size], active.weights.float()


class _ActiveSet:
    """The gradients selected so far and their least-squares weights, from an inverse Cholesky factor that grows by one row per gradient.

    Args:
        correlations: Inner products with the target, float ``[n]``.
        squares: Squared norms, float ``[n]``.
        budget: Maximum number of gradients.
        lam: Ridge penalty.
    """

    def __init__(self, correlations: Tensor, squares: Tensor, budget: int, lam: float) -> None:
        device = correlations.device
        self.correlations, self.squares, self.lam = correlations.double(), squares.double() + lam, lam
        self.columns = torch.empty(budget, len(correlations), device=device)
        self.chosen = torch.empty(budget, dtype=torch.int64, device=device)
        self.size = 0
        self.weights = torch.zeros(0, dtype=torch.float64, device=device)
        # Column 0: the inverse factor times the correlations of the chosen gradients; columns 1 and up: the inverse factor.
        self._inverse = torch.zeros(budget, 1 + budget, dtype=torch.float64, device=device)
        self._matched = 0.0  # decrease of the objective (squared residual plus ridge term) by the solution
        self._norm = 0.0  # squared norm of the solution
        self._solution, self._smallest, self._pushed = self.weights, 0.0, (0.0, 0.0)

    def residual(self, target_square: float) -> float:
        """Squared norm of the residual, the target minus the weighted sum."""
        return target_square - self._matched - self.lam * self._norm

    def push(self, item: Tensor, column: Tensor, alignment: Tensor) -> tuple[float, float]:
        """Solves with one more gradient; :meth:`accept` then adds it.

        Args:
            item: Its position, ``[1]``.
            column: Its inner products with all gradients, float ``[n]``.
            alignment: A number that the caller needs on the host, ``[1]``; transferred here to share the only synchronisation of the step.

        Returns:
            ``alignment``, and the fraction of the gradient's squared norm outside the span of the others.
        """
        size = self.size
        self.columns[size] = column
        self.chosen[size : size + 1] = item
        square, line = self.squares.index_select(0, item), self._inverse[size, : size + 2]
        row = self._inverse[:size, 1 : size + 1] @ self.columns[size].index_select(0, self.chosen[:size]).double()
        pivot = square - row @ row
        line[:] = -(row @ self._inverse[:size, : size + 2])
        line[:1] += self.correlations.index_select(0, item)
        line[-1] += 1
        line.div_(pivot.clamp(min=torch.finfo(torch.float64).tiny).sqrt())
        solution = line[0] * line[1:]
        solution[:size] += self.weights
        numbers = [alignment, pivot / square, line[:1], solution.amin(dim=0, keepdim=True), (solution @ solution)[None]]
        said, independence, match, self._smallest, norm = torch.cat(numbers).tolist()
        self._solution, self._pushed = solution, (self._matched + match**2, norm)
        return said, independence

    def accept(self) -> list[Tensor]:
        """Adds the pushed gradient, drops gradients whose weights would not be positive, and returns the positions of the dropped."""
        self.size += 1
        self._matched, self._norm = self._pushed
        dropped = []
        while self._smallest <= 0 and self.size:
            # Move from the old weights towards the solution until the first weight reaches zero, and drop that one.
            weights = torch.cat([self.weights, self.weights.new_zeros(self.size - len(self.weights))])
            step = (weights / (weights - self._solution)).masked_fill(self._solution > 0, torch.inf)
            first = int(step.argmin())
            weights += step[first] * (self._solution - weights)
            self.weights = weights
            dropped.append(self._drop(first))
        self.weights = self._solution
        return dropped

    def _drop(self, position: int) -> Tensor:
        """Drops one gradient, solves for the others again, and returns the position of the dropped."""
        left = self.chosen[position].clone()
        self.size -= 1
        size = self.size
        for kept in (self.chosen, self.columns, self.weights):
            kept[position:size] = kept[position + 1 : size + 1].clone()
        self.weights = self.weights[:size].clamp(min=0)
        if size == 0:
            self._solution, self._matched, self._norm = self.weights, 0.0, 0.0
            return left
        rows = self.chosen[:size]
        gram = self.columns[:size, rows].double()
        gram.diagonal().copy_(self.squares[rows])
        right = torch.cat([self.correlations[rows, None], torch.eye(size, dtype=torch.float64, device=gram.device)], dim=1)
        self._inverse[:size, : size + 1] = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), right, upper=False)
        reduced = self._inverse[:size, 0]
        self._solution = reduced @ self._inverse[:size, 1 : size + 1]
        self._smallest, self._matched, self._norm = torch.stack(
            [self._solution.min(), reduced @ reduced, self._solution @ self._solution]
        ).tolist()
        return left
