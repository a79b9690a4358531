"""GLISTER: the samples whose gradient step reduces the validation loss most."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.problem import Problem, Selection, softmax_targets
from composer_effalgos.subset_selection.strategies.greedy import Remaining
from composer_effalgos.subset_selection.strategies.options import Count, Options, Positive


@dataclass(frozen=True, kw_only=True)
class GlisterOptions(Options):
    """Options of GLISTER.

    Attributes:
        eta: Step size of the one-step update.
        greedy: The greedy variant, see :func:`glister`.
        r: Number of rounds of ``RGreedy``.
    """

    selection_type: Literal['PerClass', 'PerBatch', 'Supervised'] | None = None
    eta: Positive = 0.01
    greedy: Literal['Stochastic', 'RGreedy', 'Naive'] = 'Stochastic'
    r: Count = 15


def glister(problem: Problem) -> Selection:
    """Greedily maximises the first-order decrease of the validation loss: GLISTER-ONLINE (Killamsetty et al., arXiv 2012.10630, section 4).

    The gain of a sample is the inner product of its gradient with the mean validation gradient. After every pick (or round of picks) the
    last layer takes a step of ``eta`` along the picked gradients, and the validation gradient is recomputed. This requires the validation
    loss: cross-entropy if the gradients have the form of a cross-entropy with hard labels. For any other loss the validation gradient stays
    fixed, as if ``eta`` were zero. ``greedy`` is ``Naive`` (one pick per step), ``RGreedy`` (``budget // r`` picks per step) or
    ``Stochastic`` (one pick per step from a random sample of the rest, Mirzasoleiman et al., arXiv 1409.7938).
    """
    validation = _Validation(problem)
    if problem.options.greedy == 'Stochastic':
        items = _stochastic(problem, validation)
    else:
        rounds = problem.options.r if problem.options.greedy == 'RGreedy' else problem.item_budget
        items = _by_rounds(problem, validation, max(1, problem.item_budget // rounds))
    return problem.rows_of(items, torch.ones(len(items), device=items.device))


class _Validation:
    """The validation loss as a function of the last layer. Logits and errors are stored ``[C, M]``, which is faster on the CPU."""

    def __init__(self, problem: Problem) -> None:
        self.embedding = problem.reference.embedding
        self.eta = problem.options.eta
        targets = softmax_targets(problem.reference.error, problem.reference_labels)
        self.moves = targets is not None and self.eta > 0
        self.gradient = problem.reference.mean()
        if targets is not None and self.moves:
            self.logits = targets[0].T.contiguous()
            self.onehot = one_hot(targets[1], len(self.logits)).to(self.logits.dtype).T.contiguous()

    def step(self, picked: LastLayerGradients) -> None:
        """Moves the last layer along the picked gradients and recomputes the validation gradient."""
        if not self.moves:
            return
        error = picked.error.T
        if self.embedding is None or picked.embedding is None:
            shift = error.sum(dim=1, keepdim=True)
        elif error.shape[1] < error.shape[0]:
            shift = error @ (picked.embedding @ self.embedding.T).add_(1)
        else:
            shift = (error @ picked.embedding @ self.embedding.T).add_(error.sum(dim=1, keepdim=True))
        self.logits.sub_(shift, alpha=self.eta)
        self.gradient = LastLayerGradients((torch.softmax(self.logits, dim=0) - self.onehot).T, self.embedding).mean()


def _by_rounds(problem: Problem, validation: _Validation, size: int) -> Tensor:
    candidates, budget = problem.gradients, problem.item_budget
    if not validation.moves:
        size = budget  # the gains are constant, one round suffices
    taken = torch.zeros(problem.items, dtype=torch.bool, device=candidates.device)
    picks: list[Tensor] = []
    for done in range(0, budget, size):
        gains = problem.item_means(candidates.dot(validation.gradient)).masked_fill(taken, -torch.inf)
        best = gains.topk(min(size, budget - done)).indices
        taken[best] = True
        picks.append(best)
        validation.step(_means(problem, best))
    return torch.cat(picks)


def _stochastic(problem: Problem, validation: _Validation) -> Tensor:
    budget, device = problem.item_budget, problem.gradients.device
    remaining = Remaining(problem.items, budget, problem.generator, device)
    picks: list[Tensor] = []
    for _ in range(budget):
        seen = remaining.sample()
        gains = _means(problem, seen).dot(validation.gradient)
        if problem.batch_size is not None:
            owner = problem.rows_of(seen, torch.arange(len(seen), device=device))[1]
            gains = gains.new_zeros(len(seen)).index_add_(0, owner, gains)
        best = gains.argmax(dim=0, keepdim=True)
        picks.append(seen[best])
        remaining.remove(best)
        validation.step(_means(problem, picks[-1]))
    return torch.cat(picks)


def _means(problem: Problem, items: Tensor) -> LastLayerGradients:
    """Gradients of the rows of some items, scaled so that those of an item sum to its mean gradient."""
    if problem.batch_size is None:
        return problem.gradients.take(items)
    rows, position = problem.rows_of(items, torch.arange(len(items), device=items.device))
    part, sizes = problem.gradients.take(rows), torch.bincount(position)
    return LastLayerGradients(part.error / sizes[position, None], part.embedding)
