"""Selects a weighted subset from last-layer gradients."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from composer_effalgos.subset_selection import cords_backend
from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.problem import Problem, Selection, Solver
from composer_effalgos.subset_selection.strategies import BACKENDS, STRATEGIES, Strategy
from composer_effalgos.subset_selection.strategies.options import Options, check
from composer_effalgos.subset_selection.strategies.random import random_subset
from composer_effalgos.utils.checks import is_whole
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import described, did_you_mean


def select_subset(
    strategy: str,
    gradients: LastLayerGradients,
    budget: int,
    *,
    labels: Tensor | None = None,
    backend: str = 'torch',
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Selects exactly ``budget`` samples, with weights.

    Sources: GLISTER, Killamsetty et al., arXiv 2012.10630; GradMatch, Killamsetty et al., arXiv 2103.00123; CRAIG, Mirzasoleiman et al.,
    arXiv 1906.01827; the four submodular functions as in apricot, Schreiber et al., arXiv 1906.03543; the modules of the other strategies
    name theirs. Options are named as in the CORDS package.

    Args:
        strategy (str): ``glister``, ``gradmatch``, ``craig``, ``facility-location``, ``graph-cut``, ``sum-redundancy``,
            ``saturated-coverage``, ``random``, ``adaptive-random`` (``random``, redrawn by the caller with another seed), ``el2n``,
            ``grand``, ``forgetting``, ``margin``, ``entropy``, ``least-confidence``, ``herding``, ``k-center``, ``milo``; with
            ``backend='cords'`` only ``fixedweight``, ``adapweights``, ``selcon``.
        gradients (LastLayerGradients): gradients of the N candidates.
        budget (int): number of samples to select, 1 to N.
        labels (Tensor | None): class indices, integer ``[N]``; required for the per-class selection types. For ``selcon`` the regression
            targets, float ``[N]``.
        backend (str): ``torch`` (this package's own) or ``cords`` (the CORDS 0.0.4 package).
        **options: for every strategy ``selection_type`` (``PerClass``, ``PerBatch``, ``Supervised``, ``PerClassPerGradient``; by default
            the strategy's default if there are labels, else ``Supervised``), ``linear_layer`` (``False``: bias gradients only),
            ``val_gradients`` and ``val_labels`` (of a validation set; default: the candidates), ``batch_size`` (``PerBatch``: rows per
            batch), ``num_classes``, ``class_balance`` (``proportional``, or ``equal``: the same number from each class, up to the class
            size), and ``seed`` or ``generator`` (seed 0 if neither is given).
            ``glister``: ``eta`` (step size of the one-step update), ``greedy`` (``Stochastic``, ``RGreedy``, ``Naive``), ``r`` (rounds).
            ``gradmatch``: ``valid`` (match the validation gradient), ``lam`` (ridge), ``eps`` (stop at this relative residual), ``v1``
            (which of CORDS's two solvers), ``eta`` (required by CORDS but unused). ``craig`` and the submodular functions:
            ``optimizer``, ``if_convex`` (distances between embeddings instead of gradients). ``el2n``, ``grand``, ``forgetting``,
            ``margin``, ``entropy``, ``least-confidence``: ``keep`` (``highest``, ``lowest``), ``skip`` (fraction to skip at the top).
            ``forgetting``: ``scores`` (forgetting events, ``[N]``). ``herding``, ``k-center``, ``milo``: ``features`` (``embedding``,
            ``gradient``). ``milo``: ``phase`` (``stochastic-greedy``, ``weighted-random``), ``lam`` (of the graph cut), ``scores``
            (importance, ``[N]``). ``adapweights``: ``ss_indices`` (the subset to weight; default: random). ``selcon``: ``delta`` (bound
            on the validation loss), ``lam``, ``lr``, ``num_epochs``, ``batch_size``.

    Returns:
        tuple[Tensor, Tensor]: ``budget`` distinct positions, int64 ``[budget]``, in selection order (class by class for the per-class
        types; CORDS shuffles the order of GradMatch and CRAIG), and their non-negative weights, float32 ``[budget]``, with CORDS's
        meaning: matching weights for GradMatch, cluster sizes for CRAIG and the submodular functions, ones for nearly all others. If a
        solver selects too few samples (GradMatch has matched the gradient, a batch is short), random samples of weight 1 fill the rest;
        if it selects too many (a last whole batch), the samples of the lowest weight are dropped, of equal weights the last selected
        first. Both tensors are on the device of the gradients.

    Raises:
        InputError: for an unknown strategy, backend, option or value; a budget outside 1 to N; non-finite gradients; labels that are
            missing, out of range or of another length.
    """
    settings, spec = check_options(strategy, backend=backend, **options), STRATEGIES[strategy]
    gradients, labels = _check_rows('gradients', gradients, 'labels', labels, settings, spec)
    total = len(gradients)
    if not is_whole(budget) or not 1 <= budget <= total:
        raise InputError(f'budget: expected a whole number of samples from 1 to {total}, got {budget!r}')
    by_default = 'PerClass' if settings.class_balance == 'equal' else spec.selection_types[0] if labels is not None else 'Supervised'
    selection_type = settings.selection_type or by_default
    if selection_type.startswith('PerClass') and labels is None:
        raise InputError(f'labels: missing; selection_type={selection_type} needs the class of every sample')
    if selection_type == 'PerBatch' and settings.batch_size is None:
        raise InputError('batch_size: missing; selection_type=PerBatch needs the number of samples in a batch')
    with torch.no_grad():
        reference, reference_labels = _reference(gradients, labels, settings, spec)
        problem = Problem(
            gradients=gradients,
            budget=int(budget),
            labels=labels,
            reference=reference,
            reference_labels=reference_labels,
            batch_size=settings.batch_size if selection_type == 'PerBatch' else None,
            options=settings,
            generator=settings.generator or torch.Generator().manual_seed(settings.seed or 0),
            scores=_scores(getattr(settings, 'scores', None), gradients),
        )
        solver = _solver(strategy, backend)
        if not selection_type.startswith('PerClass'):
            return _exactly(problem, solver(problem))
        assert labels is not None
        classes, counts = labels.unique(return_counts=True)
        shares = (_equal_shares if settings.class_balance == 'equal' else _shares)(counts.tolist(), problem.budget)
        per_gradient = selection_type == 'PerClassPerGradient'
        picks = [_in_class(problem, solver, label, k, per_gradient) for label, k in zip(classes.tolist(), shares, strict=True) if k > 0]
        return torch.cat([indices for indices, _ in picks]), torch.cat([weights for _, weights in picks])


def check_options(strategy: str, *, backend: str = 'torch', **options: Any) -> Options:
    """Checks the options of a strategy and fills in the defaults.

    Raises:
        InputError: for an unknown name or an invalid value.
    """
    if backend not in BACKENDS:
        raise InputError(f'backend: expected one of {", ".join(BACKENDS)}, got {backend!r}')
    spec = STRATEGIES.get(strategy) if isinstance(strategy, str) else None
    if spec is None:
        known = [name for name, spec in STRATEGIES.items() if backend in spec.backends]
        raise InputError(f'strategy: expected a strategy of backend {backend}, got {strategy!r}; {did_you_mean(strategy, known)}')
    if backend not in spec.backends:
        raise InputError(f'backend: expected {spec.backends[0]} for strategy {strategy}, got {backend}, which does not have it')
    kind = spec.cords if backend == 'cords' else spec.options
    assert kind is not None
    return check(kind, options, f'strategy {strategy}')


def _check_rows(
    name: str, gradients: Any, label_name: str, labels: Any, settings: Options, spec: Strategy
) -> tuple[LastLayerGradients, Tensor | None]:
    """Checks gradients and labels; returns float32 gradients as the options require, and int64 labels (float32 regression targets)."""
    if not isinstance(gradients, LastLayerGradients):
        raise InputError(f'{name}: expected LastLayerGradients, got {type(gradients).__name__}')
    for part, factor in (('error', gradients.error), ('embedding', gradients.embedding)):
        # aminmax propagates NaN and inf, and unlike isfinite() allocates nothing of the size of the factor
        if factor is not None and factor.numel() and not all(extreme.isfinite() for extreme in factor.aminmax()):
            row = int((~torch.isfinite(factor)).any(dim=1).nonzero()[0])
            raise InputError(f'{name}.{part}: expected finite values, got another for sample {row}; check the loss and the precision')
    if spec.targets:
        if not isinstance(labels, Tensor) or not labels.is_floating_point() or labels.shape != (len(gradients),):
            raise InputError(f'{label_name}: expected the numbers to predict, a float tensor [{len(gradients)}], got {described(labels)}')
        if not torch.isfinite(labels).all():
            row = int((~torch.isfinite(labels)).nonzero()[0])
            raise InputError(f'{label_name}: expected finite numbers, got {labels[row].item()} for sample {row}')
        labels = labels.detach().float().to(gradients.device)
    elif labels is not None:
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != (len(gradients),):
            raise InputError(f'{label_name}: expected class indices, an integer tensor [{len(gradients)}], got {described(labels)}')
        classes = settings.num_classes or max(gradients.error.shape[1], 2)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise InputError(f'{label_name}: expected 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}')
        labels = labels.detach().long().to(gradients.device)
    if getattr(settings, 'if_convex', False):
        if gradients.embedding is None:
            raise InputError('if_convex: expected gradients with an embedding, which it compares, got none')
        return LastLayerGradients(gradients.embedding.detach().float()), labels
    embedding = gradients.embedding.detach().float() if settings.linear_layer and gradients.embedding is not None else None
    return LastLayerGradients(gradients.error.detach().float(), embedding), labels


def _scores(scores: Any, gradients: LastLayerGradients) -> Tensor | None:
    if scores is None:
        return None
    if not isinstance(scores, Tensor) or scores.shape != (len(gradients),) or scores.isnan().any():
        raise InputError(f'scores: expected one number per sample, a tensor [{len(gradients)}] without NaN, got {described(scores)}')
    return scores.detach().float().to(gradients.device)


def _reference(
    gradients: LastLayerGradients, labels: Tensor | None, settings: Options, spec: Strategy
) -> tuple[LastLayerGradients, Tensor | None]:
    if settings.val_gradients is None:
        if getattr(settings, 'valid', False):
            raise InputError('val_gradients: missing; valid=True matches the gradient of a validation set')
        return gradients, labels
    reference, reference_labels = _check_rows('val_gradients', settings.val_gradients, 'val_labels', settings.val_labels, settings, spec)
    if len(reference) == 0 or reference.dim != gradients.dim or reference.device != gradients.device:
        raise InputError(
            f'val_gradients: expected at least one gradient of {gradients.dim} numbers on {gradients.device}, '
            f'got {len(reference)} of {reference.dim} numbers on {reference.device}'
        )
    if labels is not None and reference_labels is None:
        raise InputError('val_labels: missing; with labels for the candidates the validation set needs them too')
    return reference, reference_labels


def _solver(strategy: str, backend: str) -> Solver:
    own = STRATEGIES[strategy].solver
    if own is None or (backend == 'cords' and own is not random_subset):  # random selection is ours with either backend
        return cords_backend.solver(strategy)
    return own


def _in_class(problem: Problem, solver: Solver, label: int, budget: int, per_gradient: bool) -> Selection:
    """Selects ``budget`` samples of one class; the peak memory is that of one class."""
    assert problem.labels is not None
    assert problem.reference_labels is not None
    rows = (problem.labels == label).nonzero()[:, 0]
    part, scale = problem.part(rows), 1.0
    reference_rows = (problem.reference_labels == label).nonzero()[:, 0]
    if problem.reference is problem.gradients or len(reference_rows) == 0:
        # no validation set, or none of this class: use the class's training gradients as the reference
        gradients, reference, reference_labels = part.gradients, part.gradients, part.labels
        scale = len(problem.reference) / len(problem.gradients)  # the sum over as many samples as the other classes have
    else:
        gradients, reference = part.gradients, problem.reference.take(reference_rows)
        reference_labels = problem.reference_labels[reference_rows]
    if per_gradient:  # only this class's row of the last layer
        if label >= gradients.error.shape[1]:
            raise InputError(
                f'selection_type: expected an output for class {label}, which PerClassPerGradient needs, got none; use PerClass'
            )
        gradients, reference = (LastLayerGradients(g.error[:, label : label + 1], g.embedding) for g in (gradients, reference))
    part = replace(part, gradients=gradients, budget=budget, reference=reference, reference_labels=reference_labels, reference_scale=scale)
    positions, weights = _exactly(part, solver(part))
    return rows[positions], weights


def _shares(counts: list[int], budget: int) -> list[int]:
    """Splits the budget in proportion to the counts, by largest remainder; every class gets at least one if the budget allows."""
    total = sum(counts)
    shares = [max(budget * count // total, int(budget >= len(counts))) for count in counts]
    missing = budget - sum(shares)
    for i in sorted(range(len(counts)), key=lambda i: shares[i] * total - budget * counts[i])[: max(missing, 0)]:
        shares[i] += 1
    while missing < 0:  # the minimum of one exceeded the budget: reduce the largest shares
        largest = max(range(len(counts)), key=lambda i: shares[i])
        shares[largest] -= 1
        missing += 1
    return shares


def _equal_shares(counts: list[int], budget: int) -> list[int]:
    """Splits the budget equally; what exceeds the size of a small class goes to the larger ones."""
    shares, left = [0] * len(counts), budget
    for done, i in enumerate(sorted(range(len(counts)), key=lambda i: counts[i])):
        shares[i] = min(counts[i], left // (len(counts) - done))
        left -= shares[i]
    return shares


def _exactly(problem: Problem, selection: Selection) -> Selection:
    """Merges repeated positions (their weights add up), then trims or fills the selection to the budget."""
    device = problem.gradients.device
    positions, weights = selection[0].to(device), selection[1].to(device).float().clamp(min=0)
    seen: dict[int, int] = {}
    first = []
    for i, position in enumerate(positions.tolist()):
        if position in seen:
            weights[seen[position]] += weights[i]
        else:
            seen[position] = i
            first.append(i)
    positions, weights = positions[first], weights[first]
    if len(positions) > problem.budget:
        by_weight = torch.argsort(weights, descending=True, stable=True)[: problem.budget]
        kept = by_weight.sort().values
        return positions[kept], weights[kept]
    left_out = torch.ones(len(problem.gradients), dtype=torch.bool, device=device)
    left_out[positions] = False
    rest = left_out.nonzero()[:, 0]
    drawn = torch.randperm(len(rest), generator=problem.generator)[: problem.budget - len(positions)].to(device)
    return torch.cat([positions, rest[drawn]]), torch.cat([weights, torch.ones(len(drawn), device=device)])
