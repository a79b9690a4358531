"""Composer's FSDP with gloo on a CPU: kept samples, batch sizes, resumption from sharded checkpoints, and the gradient's noise."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / 'scripts'


@pytest.mark.distributed
def test_trained_and_resumed_on_two_ranks(forked):
    status, said = forked(str(SCRIPTS / 'train_fsdp.py'), '--device', 'cpu', ranks=2)
    assert status == 0, said[-6000:]


@pytest.mark.distributed
def test_noise_and_signal_are_those_of_whole_gradients(forked):
    status, said = forked(str(SCRIPTS / 'noise_under_fsdp.py'), ranks=2)
    assert status == 0, said[-6000:]
