import json

import pytest

# A small network on generated images instead of a ResNet-18 on CIFAR-10
SMALL = [
    'dataset.name=synthetic',
    'dataset.num_samples=64',
    'dataset.eval_samples=32',
    'dataset.image_size=8',
    'dataset.batch_size=16',
    'dataset.num_workers=0',
    'model.name=resnet20_cifar',
    'max_duration=3ep',
]


@pytest.fixture
def arguments(tmp_path):
    sweep = 'yamls/sweeps/infobatch.yaml'
    return [sweep, *SMALL, '--runs', str(tmp_path / 'runs'), '--out', str(tmp_path / 'out'), '--seeds', '5', '--name', 'small']


def test_a_sweep_is_trained_and_recorded(script, tmp_path, arguments, capsys):
    sweep = script('sweep')
    arguments += ['--only', 'baseline', 'infobatch']
    assert sweep.main([*arguments, '--minutes', '0']) == 3
    assert not (tmp_path / 'out').exists()
    assert sweep.main(arguments) == 0
    content = json.loads((tmp_path / 'out' / 'small.json').read_text())
    baseline, infobatch = content['methods']
    assert (baseline['method'], baseline['samples_seen'], infobatch['method']) == ('baseline', 3 * 64, 'infobatch')
    saved = 1 - infobatch['samples_seen'] / (3 * 64)
    assert saved > 0
    (found,) = content['efficiency']
    assert found['saved_samples'] == pytest.approx(saved)
    assert found['efficiency'] == pytest.approx((1 - infobatch['train_seconds'] / baseline['train_seconds']) / saved)
    assert content['versions']['torch']
    assert '| infobatch | 1 |' in (tmp_path / 'out' / 'small.md').read_text()


def test_bad_input_costs_no_minute(script, tmp_path, arguments, capsys):
    assert script('sweep').main([*arguments, 'optimizer.learning_rate=1']) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ')
    assert 'learning_rate' in captured.err
    assert not list(tmp_path.iterdir())
