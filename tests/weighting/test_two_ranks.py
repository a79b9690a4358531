"""Weights over the losses of all ranks, and of each."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / 'scripts' / 'weighting_over_ranks.py'


@pytest.mark.distributed
def test_over_ranks(forked):
    status, said = forked(str(SCRIPT), ranks=2)
    assert status == 0, said[-4000:]
