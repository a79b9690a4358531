"""A problem whose gradients are known: the loss of sample i is half its squared distance from the weights."""

from collections.abc import Callable

import pytest
import torch
from composer.models import ComposerModel
from torch.utils.data import TensorDataset


class Distance(ComposerModel):
    """``|w - x|^2 / 2``, averaged over the batch: the gradient of sample x is ``w - x``."""

    def __init__(self, start: torch.Tensor, loss_scale: float = 1.0) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(start.clone())
        self.loss_scale = loss_scale

    def forward(self, batch):
        return self.weights - batch[0]

    def loss(self, outputs, batch):
        return self.loss_scale * 0.5 * outputs.square().sum(dim=1).mean()


@pytest.fixture
def distance() -> Callable[..., Distance]:
    return Distance


@pytest.fixture
def points() -> Callable[..., TensorDataset]:
    """Makes ``count`` points in ``dimensions`` dimensions, each coordinate with mean 0 and variance (over count) 1."""

    def make(count: int, dimensions: int) -> TensorDataset:
        values = torch.randn(count, dimensions, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        values = (values - values.mean(dim=0)) / values.std(dim=0, correction=0)
        return TensorDataset(values.float(), torch.zeros(count))

    return make
