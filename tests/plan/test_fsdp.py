"""InfoBatch and AdaBatch under Composer's FSDP, with gloo on a CPU: kept samples, sizes, and resumption from sharded checkpoints."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'train_fsdp.py'


@pytest.mark.slow
@pytest.mark.distributed
def test_trained_and_resumed_on_two_ranks(launch):
    status, said = launch(str(SCRIPT), '--device', 'cpu', ranks=2)
    assert status == 0, said[-6000:]
