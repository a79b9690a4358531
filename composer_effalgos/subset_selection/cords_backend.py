"""Selection with the CORDS 0.0.4 package, the reference for this package's own strategies.

CORDS's strategy classes run unchanged on a stub model, stub dataloaders and a stub loss built from the gradients. They see one class at a
time: this package splits by class, because CORDS rounds every class's budget up (GLISTER, GradMatch, CRAIG) or down (the submodular
functions) and fails on a class without samples.
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

INSTALL_COMMAND = 'pip install apricot-select numba scipy && pip install --no-deps cords==0.0.4'
PRIVATE_PACKAGE = '_composer_effalgos_cords'
PAIRWISE_BYTES = 2**26  # for the pairwise differences between two batches, which CRAIG and the submodular functions materialise

log = logging.getLogger(__name__)


def solver(strategy: str) -> Solver:
    """Returns the solver that runs a CORDS strategy.

    Args:
        strategy (str): ``glister``, ``gradmatch``, ``craig``, ``fixedweight``, ``adapweights``, ``selcon``, or a submodular function.

    Raises:
        InputError: if CORDS or one of its dependencies is not installed.
    """
    modules = _cords_modules()
    run = _RUNS.get(strategy, functools.partial(_submodular, function=strategy))

    def solve(problem: Problem) -> Selection:
        # CORDS draws from the global generators of Python, NumPy and torch, and pins memory even without an accelerator.
        quiet = contextlib.redirect_stdout(io.StringIO())  # some strategies print
        with preserve_rng(seed_of(problem.generator)), warnings.catch_warnings(), torch.enable_grad(), quiet:
            warnings.filterwarnings('ignore', message='.*pin_memory.*')
            indices, weights = run(modules[strategy if strategy in modules else 'submodular'], problem)
        device = problem.gradients.device
        positions = torch.tensor([int(index) for index in indices], dtype=torch.int64, device=device)
        return positions, torch.as_tensor(np.asarray(weights, dtype=np.float32), device=device)

    return solve


@functools.cache
def _cords_modules() -> dict[str, ModuleType]:
    """Imports CORDS's strategy modules under a private name, so that patching them does not affect an ``import cords`` elsewhere."""
    spec = importlib.util.find_spec('cords')
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f'backend: cords is not installed; to install it, run: {INSTALL_COMMAND}')
    root = Path(next(iter(spec.submodule_search_locations))) / 'selectionstrategies'
    # selectionstrategies/SL/__init__.py fails to import: it needs torchtext and a dataset that scikit-learn has removed. Empty packages
    # replace it and its parent.
    for name, folder in ((PRIVATE_PACKAGE, root), (f'{PRIVATE_PACKAGE}.SL', root / 'SL')):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    try:
        with np.errstate(), selcon_data_sets():  # importing CORDS's helpers permanently turns NumPy's warnings into errors
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
    # The submodular class does not pass a logger to its base class.
    loaded['base'].DataSelectionStrategy.__init__.__defaults__ = (log,)
    # CRAIG and the submodular functions read the samples through a shuffling sampler but assume that they are in order.
    for name in ('craig', 'submodular'):
        vars(loaded[name])['SubsetRandomSampler'] = torch.Tensor.tolist
    # Stochastic GLISTER samples more candidates than remain.
    vars(loaded['glister'])['random'] = types.SimpleNamespace(sample=lambda rows, k: random.sample(rows, min(k, len(rows))))
    return loaded


class _Rows(nn.Module):
    """Stub model: maps row numbers to the outputs for which the loss has those rows' gradients."""

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
        # Only the gradient of the loss is known. A step size of zero keeps the validation gradient constant.
        outputs = joined.error
        labels, reference_labels = _one_class(candidates), _one_class(reference)
        loss, eta = _half_square, 0.0
    picks = problem.item_budget
    batch_size = problem.batch_size or 1024
    strategy = module.GLISTERStrategy(
        _loader(0, labels, batch_size),
        # CORDS would divide a validation set smaller than a batch into zero batches.
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
        r=min(problem.options.r, picks),  # with more rounds than picks, every round picks int(picks / r) = 0 and the loop never ends
    )
    indices, _ = strategy.select(problem.budget, {})
    return indices, [1.0] * len(indices)  # RGreedy overshoots the budget but returns only ``budget`` weights


def _matching(problem: Problem) -> tuple[Any, ...]:
    """Returns the leading arguments of the three gradient-matching strategies."""
    candidates, reference = problem.gradients, problem.reference
    batch_size = problem.batch_size or 1024
    return (
        _loader(0, _one_class(candidates), batch_size),
        _loader(len(candidates), _one_class(reference), batch_size),
        _Rows(_joined(candidates, reference), written_out=True),
        _half_square,
        problem.options.eta,
        candidates.device,  # for the string 'cpu' CORDS uses a solver that ignores lam, eps and v1
        1,
        False,
    )


def _nothing_to_match(problem: Problem) -> bool:
    """Whether the target gradients sum to zero; CORDS would divide by that sum."""
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
        # With one class this is the same problem as Supervised, without a sparse matrix.
        'PerClass' if problem.batch_size is None else 'PerBatch',
        log,
        optimizer=problem.options.optimizer,
    )
    return strategy.select(problem.budget, {})


def _submodular(module: ModuleType, problem: Problem, function: str) -> tuple[Any, Any]:
    candidates = problem.gradients
    # With several classes CORDS sets the similarity between classes to zero and divides the budget by the number of classes.
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
    """Greedy selection with equal weights.

    The published code cannot run: it calls an undefined ``ompwrapper`` instead of its own ``optimalWeightsWrapper``, and passes the
    gradients as columns to a solver that expects rows. Both are fixed here.
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
    """Non-negative least-squares weights for a given subset."""
    candidates = problem.gradients
    subset = problem.options.ss_indices
    if subset is None:
        subset = torch.randperm(len(candidates), generator=problem.generator)[: problem.budget]
    subset = torch.as_tensor(subset).cpu()
    if subset.shape != (problem.budget,) or subset.is_floating_point() or len(subset.unique()) != problem.budget:
        raise InputError(
            f'ss_indices: expected {problem.budget} distinct positions (the budget), got {len(subset.unique())} distinct of {len(subset)}'
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
