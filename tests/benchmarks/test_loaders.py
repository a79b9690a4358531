import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

TINY = [
    '--device',
    'cpu',
    '--samples',
    '32',
    '--batch-size',
    '8',
    '--repeats',
    '1',
    '--steps',
    '2',
    '--models',
    'resnet20_cifar',
    'torchvision/shufflenet_v2_x0_5',
]
SAVING = ['--saving-samples', '128', '--saving-epochs', '3', '--saving-repeats', '1']

intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted), max_size=8)


def test_idle_time_is_what_counting_gives(script):
    idle_within = script('loaders').idle_within

    @given(busy=intervals, cuts=st.sets(st.integers(0, 60), max_size=10))
    def check(busy, cuts):
        edges = sorted(cuts)
        windows = list(zip(edges[::2], edges[1::2], strict=False))
        covered = np.zeros(60, bool)
        for start, end in busy:
            covered[start:end] = True
        assert idle_within(windows, busy) == sum(int((~covered[start:end]).sum()) for start, end in windows)

    check()


def check(load, last):
    paths = [row['path'] for row in load['training']]
    assert paths[:2] == ['DataLoader', 'workers']
    assert paths[-len(last) :] == last
    assert [row['path'] for row in load['alone']] == [path for path in paths if path not in ('workers', 'no loading')]
    for row in load['training']:
        assert row['images_per_second'] > 0
        assert 0 <= row['in_loader'] < 1
        assert row['gpu_waits'] is None


def test_small_images_end_to_end(script, tmp_path, capsys):
    target = script('loaders').main([*TINY, '--large-samples', '0', *SAVING, '--out', str(tmp_path)])
    assert target == tmp_path / 'loaders_cpu.md'
    results = json.loads((tmp_path / 'loaders_cpu.json').read_text())
    (small,) = results['loads']
    check(small, ['device', 'no loading'])
    assert results['saving']['saved_samples'] > 0
    assert 'InfoBatch on the device path' in target.read_text()
    assert '# Data paths' in capsys.readouterr().out


def test_large_images_end_to_end(script, tmp_path):
    script('loaders').main([*TINY, '--large-samples', '10', '--large-batch-size', '5', '--saving-samples', '0', '--out', str(tmp_path)])
    results = json.loads((tmp_path / 'loaders_cpu.json').read_text())
    check(results['loads'][1], ['no loading'])
    assert results['saving'] is None


def test_generated_images_can_be_learnt(script):
    images = script('loaders').small_images(500, 0)
    flat = images.images.reshape(500, -1).astype(float)
    means = np.stack([flat[images.targets.numpy() == label].mean(0) for label in range(10)])
    nearest = ((flat[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == images.targets.numpy()).mean() > 0.95


def test_the_profile_counts_waiting_only(script):
    assert script('loaders').idle_within([(0, 10), (20, 30)], [(5, 25), (22, 24)]) == pytest.approx(5 + 5)
    assert script('loaders').idle_within([(0, 10)], []) == pytest.approx(10)
