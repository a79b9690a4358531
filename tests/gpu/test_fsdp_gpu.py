"""InfoBatch and AdaBatch under Composer's FSDP on every GPU there is; on a CPU ``tests/plan/test_fsdp.py`` runs the same."""

from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'train_fsdp.py'


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize('kind', ['full', 'sharded'])
def test_trained_and_resumed(launch, kind):
    status, said = launch(str(SCRIPT), '--state-dicts', kind, ranks=torch.cuda.device_count())
    assert status == 0, said[-6000:]
