"""Starts a row of the table of algorithms."""

from collections.abc import Callable

import pytest
import torch
from algorithm_settings import SETTINGS
from composer import Trainer


@pytest.fixture
def start(make_trainer: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """Makes a trainer for a row, on so many samples of its problem."""

    def make(row: str, samples: int, **arguments) -> Trainer:
        torch.manual_seed(0)
        dataset, model = SETTINGS[row].problem(samples)
        return make_trainer(SETTINGS[row].algorithms(samples), **{'dataset': dataset, 'model': model, **arguments})

    return make
