"""GLISTER: the samples whose gradient step lowers the validation loss most."""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.problem import Problem, Selection, softmax_targets

__all__ = ['glister']

SAMPLE_FACTOR = math.log(100)  # stochastic greedy looks at ln(1/0.01) N/k candidates a step


def glister(problem: Problem) -> Selection:
    """Greedy maximisation of the first-order fall of the validation loss, GLISTER-ONLINE (Killamsetty et al., arXiv 2012.10630, section 4).

    The gain of a sample is the inner product of its gradient with the mean validation gradient; after every pick (or round of picks) the
    last layer takes a step of ``eta`` along the picked gradients, and the validation gradient is evaluated anew. That needs the validation
    loss itself: it is the cross-entropy wherever the gradients are those of a cross-entropy with hard labels. For another loss the
    validation gradient stays what it is, as if ``eta`` were zero. ``greedy`` is ``Naive`` (one pick a step), ``RGreedy`` (``budget // r``
    picks a step) or ``Stochastic`` (one pick a step among a random sample of the rest, Mirzasoleiman et al., arXiv 1409.7938).
    """
    validation = _Validation(problem)
    if problem.options['greedy'] == 'Stochastic':
        items = _stochastic(problem, validation)
    else:
        rounds = problem.options['r'] if problem.options['greedy'] == 'RGreedy' else problem.item_budget
        items = _by_rounds(problem, validation, max(1, problem.item_budget // rounds))
    return problem.rows_of(items, torch.ones(len(items), device=items.device))


class _Validation:
    """The validation loss as a function of the last layer."""

    def __init__(self, problem: Problem) -> None:
        self.embedding = problem.reference.embedding
        self.eta = problem.options['eta']
        targets = softmax_targets(problem.reference.error, problem.reference_labels)
        self.moves = targets is not None and self.eta > 0
        if targets is not None:
            self.logits = targets[0].clone()
            self.onehot = one_hot(targets[1], self.logits.shape[1])
        self.gradient = problem.reference.mean()

    def step(self, picked: LastLayerGradients, scale: Tensor) -> None:
        """Moves the last layer along the gradients of the picked rows, each times its scale, and takes the gradient there."""
        if not self.moves:
            return
        error = picked.error * scale[:, None]
        if self.embedding is None or picked.embedding is None:
            shift = error.sum(dim=0)
        elif len(error) < error.shape[1]:
            shift = (self.embedding @ picked.embedding.T + 1) @ error
        else:
            shift = self.embedding @ (picked.embedding.T @ error) + error.sum(dim=0)
        self.logits -= self.eta * shift
        self.gradient = LastLayerGradients(torch.softmax(self.logits, dim=1) - self.onehot, self.embedding).mean()


def _by_rounds(problem: Problem, validation: _Validation, size: int) -> Tensor:
    candidates, budget = problem.gradients, problem.item_budget
    if not validation.moves:
        size = budget  # the gains never change
    taken = torch.zeros(problem.items, dtype=torch.bool, device=candidates.device)
    picks: list[Tensor] = []
    for done in range(0, budget, size):
        gains = problem.item_means(candidates.dot(validation.gradient)).masked_fill(taken, -torch.inf)
        best = gains.topk(min(size, budget - done)).indices
        taken[best] = True
        picks.append(best)
        validation.step(*_picked(problem, best))
    return torch.cat(picks)


def _stochastic(problem: Problem, validation: _Validation) -> Tensor:
    candidates, budget, device = problem.gradients, problem.item_budget, problem.gradients.device
    rest = torch.arange(problem.items)
    sample = max(1, int(problem.items / budget * SAMPLE_FACTOR))
    picks: list[int] = []
    for left in range(problem.items, problem.items - budget, -1):
        # With replacement, which leaves out nothing but repeated looks at the same candidate.
        drawn = torch.randint(left, (sample,), generator=problem.generator) if sample < left else torch.arange(left)
        seen = rest[drawn].to(device)
        rows, item_scale = _picked(problem, seen)
        gains = rows.dot(validation.gradient) * item_scale
        if problem.batch_size is not None:
            owner = problem.rows_of(seen, torch.arange(len(seen), device=device))[1]
            gains = gains.new_zeros(len(seen)).index_add_(0, owner, gains)
        best = int(gains.argmax())
        picks.append(int(seen[best]))
        rest[drawn[best]] = rest[left - 1].clone()
        validation.step(*_picked(problem, seen[best : best + 1]))
    return torch.tensor(picks, device=candidates.device)


def _picked(problem: Problem, items: Tensor) -> tuple[LastLayerGradients, Tensor]:
    """The rows of some items, and for each the share that makes its item the mean of its rows."""
    rows, position = problem.rows_of(items, torch.arange(len(items), device=items.device))
    sizes = torch.bincount(position, minlength=len(items))
    return problem.gradients.take(rows), 1 / sizes[position]
