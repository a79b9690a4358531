import json
import math

import pytest
import torch


def test_two_sizes_end_to_end(script, tmp_path):
    plan_scale = script('plan_scale')
    sizes = [20_000, 400_000]
    plan_scale.main(['--out', str(tmp_path), '--samples', *map(str, sizes), '--repeats', '2'])
    results = json.loads((tmp_path / 'plan_scale.json').read_text())
    assert [row['samples'] for row in results['rows']] == sizes
    for row in results['rows']:
        scores = torch.rand(row['samples'], generator=torch.Generator().manual_seed(0))
        below = int((scores.double() < scores.double().mean()).sum())
        assert row['kept'] == row['samples'] - below + math.floor(below / 2)
        assert len(row['plan_seconds']) == len(row['randperm_seconds']) == 2
        assert row['ratio'] == pytest.approx(row['plan_seconds'][1] / row['randperm_seconds'][1])
    # the kept indices (8 bytes) and weights (4 bytes) at least are in the peak
    assert results['rows'][1]['peak_bytes'] >= 12 * results['rows'][1]['kept']
    assert '400,000' in (tmp_path / 'plan_scale.md').read_text()


def test_the_exponent_of_known_growth(script):
    plan_scale = script('plan_scale')
    rows = [{'samples': n, 'nanoseconds_per_sample': 3.0 * n**0.5} for n in (10, 100, 1000)]
    assert plan_scale.exponent(rows) == pytest.approx(1.5)
    assert plan_scale.exponent(rows[:1]) is None
