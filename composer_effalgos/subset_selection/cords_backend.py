"""Selection by the CORDS 0.0.4 package, kept as the reference for this package's own strategies.

CORDS's strategy classes are used unchanged; the model, loaders and loss that they need are stand-ins made from the gradients.
Each class of samples is a separate problem for them. This package splits by class, because CORDS rounds every class's budget up (GLISTER,
GradMatch, CRAIG) or down (the submodular functions) and fails on a class without samples.
"""

import contextlib
import functools
import importlib.util
import io
import logging
import random
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos.subset_selection.cords_selcon import data_sets as selcon_data_sets
from composer_effalgos.subset_selection.cords_selcon import selcon
from composer_effalgos.subset_selection.gradients import LastLayerGradients, preserve_rng
from composer_effalgos.subset_selection.problem import Problem, Selection, Solver, seed_of, softmax_targets
from composer_effalgos.utils.errors import InputError

__all__ = ['INSTALL_COMMAND', 'solver']

INSTALL_COMMAND = 'pip install apricot-select numba scipy && pip install --no-deps cords==0.0.4'
PRIVATE_PACKAGE = '_composer_effalgos_cords'
PAIRWISE_BYTES = 2**26  # CRAIG and the submodular functions write out the differences of every pair in two batches

log = logging.getLogger(__name__)


def solver(strategy: str) -> Solver:
    """The solver that runs a CORDS strategy.

    Args:
        strategy (str): ``glister``, ``gradmatch``, ``craig``, ``fixedweight``, ``adapweights``, ``selcon``, or a submodular function.

    Raises:
        InputError: if CORDS, or a package that it needs, is not installed.
    """
    modules = _cords_modules()
    run = _RUNS.get(strategy, functools.partial(_submodular, function=strategy))

    def solve(problem: Problem) -> Selection:
        # CORDS draws from the generators of Python, NumPy and torch, and pins memory where there is no device to pin it for.
        quiet = contextlib.redirect_stdout(io.StringIO())  # some of its strategies print
        with preserve_rng(seed_of(problem.generator)), warnings.catch_warnings(), torch.enable_grad(), quiet:
            warnings.filterwarnings('ignore', message='.*pin_memory.*')
            indices, weights = run(modules[strategy if strategy in modules else 'submodular'], problem)
        device = problem.gradients.device
        positions = torch.tensor([int(index) for index in indices], dtype=torch.int64, device=device)
        return positions, torch.as_tensor(np.asarray(weights, dtype=np.float32), device=device)

    return solve


@functools.cache
def _cords_modules() -> dict[str, ModuleType]:
    """CORDS's strategy modules under a private name, so that changes to them do not affect an ``import cords`` elsewhere."""
    spec = importlib.util.find_spec('cords')
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f'backend: cords is not installed; to install it, run: {INSTALL_COMMAND}')
    root = Path(next(iter(spec.submodule_search_locations))) / 'selectionstrategies'
    # selectionstrategies/SL/__init__.py fails to import: it wants torchtext and a dataset that scikit-learn has dropped. Empty packages
    # stand in for it and its parent.
    for name, folder in ((PRIVATE_PACKAGE, root), (f'{PRIVATE_PACKAGE}.SL', root / 'SL')):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    try:
        with np.errstate(), selcon_data_sets():  # importing CORDS's helpers turns NumPy's warnings into errors for good
            loaded = {
                name: import_module(f'{PRIVATE_PACKAGE}.SL.{module}')
                for name, module in (
                    ('base', 'dataselectionstrategy'),
                    ('glister', 'glisterstrategy'),
                    ('gradmatch', 'gradmatchstrategy'),
                    ('craig', 'craigstrategy'),
                    ('submodular', 'submodularselectionstrategy'),
                    ('fixedweight', 'fixedweightstrategy'),
                    ('adapweights', 'adapweightsstrategy'),
                    ('selcon', 'selconstrategy'),
                )
            }
    except ImportError as error:
        raise InputError(f'backend: cords cannot be imported ({error}); to install what it needs, run: {INSTALL_COMMAND}') from error
    # The submodular class forgets to pass a logger on.
    loaded['base'].DataSelectionStrategy.__init__.__defaults__ = (log,)
    # CRAIG and the submodular functions read the samples through a shuffling sampler, and then take them to be in order.
    for name in ('craig', 'submodular'):
        vars(loaded[name])['SubsetRandomSampler'] = torch.Tensor.tolist
    # Stochastic GLISTER asks for more candidates than are left.
    vars(loaded['glister'])['random'] = types.SimpleNamespace(sample=lambda rows, k: random.sample(rows, min(k, len(rows))))
    return loaded


class _Rows(nn.Module):
    """Stands in for the model: the input is a row number, the output what the loss needs to give that row's gradient."""

    def __init__(self, outputs: LastLayerGradients, *, written_out: bool) -> None:
        super().__init__()
        self.outputs = outputs
        self.written_out = written_out

    def get_embedding_dim(self) -> int:
        embedding = None if self.written_out else self.outputs.embedding
        return 1 if embedding is None else embedding.shape[1]

    def forward(self, rows: Tensor, last: bool, freeze: bool) -> tuple[Tensor, Tensor]:
        outputs = self.outputs.take(rows)
        if self.written_out:
            outputs = LastLayerGradients(outputs.dense())
        embedding = outputs.error.new_zeros(len(rows), 1) if outputs.embedding is None else outputs.embedding
        return outputs.error.clone().requires_grad_(), embedding


def _half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient at ``outputs`` is ``outputs``."""
    return outputs.square().sum(dim=1) / 2


def _one_class(gradients: LastLayerGradients) -> Tensor:
    return torch.zeros(len(gradients), dtype=torch.int64)


def _joined(first: LastLayerGradients, second: LastLayerGradients) -> LastLayerGradients:
    if first.embedding is None or second.embedding is None:
        return LastLayerGradients(torch.cat([first.error, second.error]))
    return LastLayerGradients(torch.cat([first.error, second.error]), torch.cat([first.embedding, second.embedding]))


def _loader(first: int, labels: Tensor, batch_size: int) -> 'DataLoader[tuple[Tensor, ...]]':
    rows = torch.arange(first, first + len(labels))
    return DataLoader(TensorDataset(rows, labels.cpu()), batch_size=batch_size, shuffle=False)


def _glister(module: ModuleType, problem: Problem) -> tuple[Any, Any]:
    candidates, reference = problem.gradients, problem.reference
    joined = _joined(candidates, reference)
    targets = [softmax_targets(g.error, y) for g, y in ((candidates, problem.labels), (reference, problem.reference_labels))]
    loss: Callable[[Tensor, Tensor], Tensor]
    if targets[0] is not None and targets[1] is not None:
        outputs = torch.cat([targets[0][0], targets[1][0]])
        labels, reference_labels = targets[0][1], targets[1][1]
        loss, eta = functools.partial(cross_entropy, reduction='none'), problem.options.eta
    else:
        # The loss is not known beyond its gradient. A step size of zero keeps the validation gradient where it is.
        outputs = joined.error
        labels, reference_labels = _one_class(candidates), _one_class(reference)
        loss, eta = _half_square, 0.0
    picks = problem.item_budget
    batch_size = problem.batch_size or 1024
    strategy = module.GLISTERStrategy(
        _loader(0, labels, batch_size),
        # A validation set smaller than a batch would be cut into zero batches.
        _loader(len(candidates), reference_labels, min(batch_size, len(reference))),
        _Rows(LastLayerGradients(outputs, joined.embedding), written_out=False),
        loss,
        eta,
        candidates.device,
        candidates.error.shape[1],
        joined.embedding is not None,
        'Supervised' if problem.batch_size is None else 'PerBatch',
        problem.options.greedy,
        log,
        r=min(problem.options.r, picks),  # more rounds than picks never end: every round picks int(picks / r) = 0
    )
    indices, _ = strategy.select(problem.budget, {})
    return indices, [1.0] * len(indices)  # RGreedy overshoots, and gives a weight to the budget alone


def _matching(problem: Problem) -> tuple[Any, ...]:
    """What the three strategies that match gradients take first."""
    candidates, reference = problem.gradients, problem.reference
    batch_size = problem.batch_size or 1024
    return (
        _loader(0, _one_class(candidates), batch_size),
        _loader(len(candidates), _one_class(reference), batch_size),
        _Rows(_joined(candidates, reference), written_out=True),
        _half_square,
        problem.options.eta,
        candidates.device,  # not the string 'cpu', for which CORDS takes a solver that ignores lam, eps and v1
        1,
        False,
    )


def _nothing_to_match(problem: Problem) -> bool:
    """Whether the gradients to be matched add up to zero, by which CORDS would divide."""
    return not (problem.reference if problem.options.valid else problem.gradients).sum().any()


def _gradmatch(module: ModuleType, problem: Problem) -> tuple[Any, Any]:
    if _nothing_to_match(problem):
        return [], []
    strategy = module.GradMatchStrategy(
        *_matching(problem),
        'PerClass' if problem.batch_size is None else 'PerBatch',
        log,
        valid=problem.options.valid,
        v1=problem.options.v1,
        lam=problem.options.lam,
        eps=problem.options.eps,
    )
    return strategy.select(problem.budget, {})


def _craig(module: ModuleType, problem: Problem) -> tuple[Any, Any]:
    candidates = problem.gradients
    loader = _loader(0, _one_class(candidates), problem.batch_size or _pairwise_batch(candidates))
    strategy = module.CRAIGStrategy(
        loader,
        loader,
        _Rows(candidates, written_out=True),
        _half_square,
        candidates.device,
        1,
        False,
        False,
        # One class is the same problem as Supervised, without the detour over a sparse matrix.
        'PerClass' if problem.batch_size is None else 'PerBatch',
        log,
        optimizer=problem.options.optimizer,
    )
    return strategy.select(problem.budget, {})


def _submodular(module: ModuleType, problem: Problem, function: str) -> tuple[Any, Any]:
    candidates = problem.gradients
    # Over several classes CORDS sets the similarity across classes to zero, and divides the budget by the number of classes.
    labels = _one_class(candidates) if problem.labels is None else problem.labels.unique(return_inverse=True)[1]
    classes = int(labels.max()) + 1
    loader = _loader(0, labels, _pairwise_batch(candidates))
    strategy = module.SubmodularSelectionStrategy(
        loader,
        loader,
        _Rows(candidates, written_out=True),
        _half_square,
        candidates.device,
        classes,
        False,
        False,
        'PerClass' if classes == 1 else 'Supervised',
        function,
        problem.options.optimizer,
    )
    return strategy.select(problem.budget * classes, {})


def _fixedweight(module: ModuleType, problem: Problem) -> tuple[Any, Any]:
    """Greedy picks that all have one weight.

    As published it cannot run: it calls ``ompwrapper``, which it does not define, in place of its own ``optimalWeightsWrapper``, and hands
    the gradients to its solver as columns where that takes them as rows. Both are mended here.
    """
    if _nothing_to_match(problem):
        return [], []
    strategy = module.FixedWeightStrategy(
        *_matching(problem),
        'PerClass' if problem.batch_size is None else 'PerBatch',
        valid=problem.options.valid,
    )
    strategy.ompwrapper = lambda columns, target, budget: strategy.optimalWeightsWrapper(columns.T, target, budget)
    return strategy.select(problem.budget, {})


def _adapweights(module: ModuleType, problem: Problem) -> tuple[Any, Any]:
    """Non-negative least-squares weights for a subset that is given."""
    candidates = problem.gradients
    subset = problem.options.ss_indices
    if subset is None:
        subset = torch.randperm(len(candidates), generator=problem.generator)[: problem.budget]
    subset = torch.as_tensor(subset).cpu()
    if subset.shape != (problem.budget,) or subset.is_floating_point() or len(subset.unique()) != problem.budget:
        raise InputError(
            f'ss_indices: expected {problem.budget} different positions, the budget, got {len(subset.unique())} of {len(subset)}'
        )
    if not 0 <= int(subset.min()) <= int(subset.max()) < len(candidates):
        raise InputError(f'ss_indices: expected 0 to {len(candidates) - 1}, got {int(subset.min())} to {int(subset.max())}')
    strategy = module.AdapWeightsStrategy(
        *_matching(problem),
        'Supervised',
        log,
        subset.tolist(),
        valid=problem.options.valid,
    )
    return strategy.select(problem.budget, {})


def _pairwise_batch(gradients: LastLayerGradients) -> int:
    return max(1, int((PAIRWISE_BYTES / (4 * gradients.dim)) ** 0.5))


_RUNS: Mapping[str, Callable[[ModuleType, Problem], tuple[Any, Any]]] = {
    'glister': _glister,
    'gradmatch': _gradmatch,
    'craig': _craig,
    'fixedweight': _fixedweight,
    'adapweights': _adapweights,
    'selcon': selcon,
}
