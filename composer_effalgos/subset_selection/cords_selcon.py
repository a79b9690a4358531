"""SELCON of the CORDS 0.0.4 package: subset selection for linear regression under a bound on the validation loss."""

import contextlib
import logging
import sys
import types
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

from composer_effalgos.subset_selection.problem import Problem
from composer_effalgos.utils.errors import InputError

MULTIPLIER_STEPS = 1000  # limit on SELCON's first loop, which as published never ends if the bound cannot be met

log = logging.getLogger(__name__)


@contextlib.contextmanager
def data_sets() -> Iterator[None]:
    """Stubs the dataset module that SELCON imports: its package needs torchtext and a dataset that scikit-learn has removed."""
    name = 'cords.utils.data.datasets.SL.custom_dataset_selcon'
    before, stand_in = sys.modules.get(name), types.ModuleType(name)
    for unused in ('CustomDataset_SELCON', 'CustomDataset_WithId_SELCON'):
        setattr(stand_in, unused, Dataset)
    stand_in.SubsetDataset_WithId_SELCON = _SubsetWithNumbers  # type: ignore[attr-defined]
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


class _WithNumbers(Dataset):
    """Returns inputs, targets and sample indices, as SELCON's datasets do."""

    def __init__(self, data: Tensor, targets: Tensor) -> None:
        self.data, self.targets = data, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.data[index], self.targets[index], index


class _SubsetWithNumbers(_WithNumbers):
    """A subset of such a dataset, with sample indices from 0."""

    def __init__(self, dataset: _WithNumbers, rows: list[int]) -> None:
        super().__init__(dataset.data[rows], dataset.targets[rows])


class _CountsSamples(DataLoader):
    """Reports the number of samples as its length: SELCON uses ``len(loader)`` as the number of samples."""

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


def selcon(module: ModuleType, problem: Problem) -> tuple[Any, Any]:
    """SELCON (Sivasubramanian et al., arXiv 2106.12491) on the last layer: a linear regression from the embeddings to the targets.

    The layer is fitted to the predictions that the errors of the squared loss imply, ``prediction = target + error / 2``. CORDS returns the
    value of each sample (smaller is better) as its weight; here all weights are one, as in the paper.

    Raises:
        InputError: if there is no embedding, the model has more than one output, the budget is 1, or the bound ``delta`` is not met.
    """
    candidates, reference, options = problem.gradients, problem.reference, problem.options
    targets, reference_targets = problem.labels, problem.reference_labels
    assert targets is not None
    assert reference_targets is not None
    if candidates.embedding is None or reference.embedding is None or candidates.error.shape[1] != 1:
        raise InputError('gradients: expected embeddings and one error per sample, [N, 1], for selcon')
    if problem.budget == 1:
        raise InputError('budget: expected at least 2 for selcon, which divides by the number of other samples in the subset, got 1')
    inputs, device = candidates.embedding, candidates.device
    predictions = targets + candidates.error[:, 0] / 2
    # gelsd handles rank-deficient inputs, such as a feature that is always zero after a ReLU
    solution = torch.linalg.lstsq(
        torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1).double().cpu(), predictions[:, None].double().cpu(), driver='gelsd'
    ).solution[:, 0]
    model = _Regression(solution.float().to(device))
    theta = {name: value.clone() for name, value in model.state_dict().items()}
    criterion = _BoundedSquaredLoss(options.delta, 2 * len(reference) * MULTIPLIER_STEPS)
    # Adam's moments before the first step
    moments = [{'step': 0, 'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)} for p in model.parameters()]
    batch_size = options.batch_size or 1000
    train, validation = _WithNumbers(inputs, targets), _WithNumbers(reference.embedding, reference_targets)
    strategy = module.SELCONstrategy(
        train,
        validation,
        _CountsSamples(train, batch_size=batch_size),
        DataLoader(validation, batch_size=1),  # SELCON's validation and training sums only have matching shapes with one sample per batch
        model,
        nn.MSELoss(reduction='none'),
        device,
        1,
        torch.tensor([float(options.delta)], device=device),
        options.num_epochs,
        True,
        options.lam,
        options.lr,
        log,
        types.SimpleNamespace(state=dict(enumerate(moments))),
        batch_size,
        criterion,
    )
    indices, _ = strategy.select(problem.budget, theta)
    return indices, [1.0] * len(indices)


class _Regression(nn.Module):
    """One linear layer with one output."""

    def __init__(self, weight_and_bias: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(len(weight_and_bias) - 1, 1, device=weight_and_bias.device)
        with torch.no_grad():
            self.linear.weight.copy_(weight_and_bias[None, :-1])
            self.linear.bias.copy_(weight_and_bias[-1:])

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs).view(-1)


class _BoundedSquaredLoss:
    """The squared loss, limited to ``calls`` calls: SELCON's first loop only ends when the validation loss meets its bound."""

    def __init__(self, delta: float, calls: int) -> None:
        self.delta, self.calls = delta, calls

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise InputError(
                f'delta: expected a validation loss of {self.delta} within {MULTIPLIER_STEPS} steps, got more; use a larger delta or lr'
            )
        return mse_loss(outputs, targets)
