import json

import pytest

# A small network on generated images instead of a ResNet-18 on CIFAR-10
SMALL = [
    'dataset.name=synthetic',
    'dataset.num_samples=64',
    'dataset.eval_samples=32',
    'dataset.image_size=8',
    'dataset.batch_size=16',
    'model.name=resnet20_cifar',
]
OPTIONS = ['--epochs', '3', '--seeds', '5', '--methods', 'baseline', 'infobatch', '--workers', '0', '--save-interval', '1ep']


@pytest.fixture
def arguments(tmp_path):
    return ['--out', str(tmp_path), *OPTIONS, *(part for setting in SMALL for part in ('--set', setting))]


def test_in_portions_and_what_is_done_is_not_repeated(script, tmp_path, arguments, capsys):
    gpu_cifar10 = script('gpu_cifar10')
    names = ['baseline_3ep_seed5', 'infobatch_3ep_seed5']

    def results() -> dict:
        return json.loads((tmp_path / 'gpu_cifar10.json').read_text())

    assert gpu_cifar10.main([*arguments, '--minutes', '0.02']) == 3  # a run is started, and stopped before its end
    assert (tmp_path / names[0] / 'train.log').exists()
    assert (results()['runs'], results()['pending']) == ([], names)

    assert gpu_cifar10.main([*arguments, '--minutes', '5']) == 0
    runs = {run['run_name']: run for run in results()['runs']}
    assert sorted(runs) == names
    assert results()['pending'] == []
    baseline, infobatch = (runs[name] for name in names)
    assert baseline['totals']['samples_seen'] == 3 * 64
    saved = infobatch['totals']['samples_saved']
    assert saved == 3 * 64 - infobatch['totals']['samples_seen'] > 0
    assert {'infobatch'} == set(infobatch['recipe']['algorithms']) - set(baseline['recipe']['algorithms'])
    (found,) = results()['efficiency']
    assert found['saved_samples'] == pytest.approx(saved / 192)
    time_ratio = infobatch['totals']['train_seconds'] / baseline['totals']['train_seconds']
    assert found['efficiency'] == pytest.approx((1 - time_ratio) / (saved / 192))

    before = [(tmp_path / name / 'summary.json').stat().st_mtime_ns for name in names]
    assert gpu_cifar10.main([*arguments, '--minutes', '5']) == 0
    assert [(tmp_path / name / 'summary.json').stat().st_mtime_ns for name in names] == before
    assert 'infobatch_3ep' in capsys.readouterr().out


def test_bad_input_costs_no_minute(script, tmp_path, arguments, capsys):
    assert script('gpu_cifar10').main([*arguments, '--set', 'optimizer.learning_rate=1']) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ')
    assert 'learning_rate' in captured.err
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_is_named(script, tmp_path, arguments, capsys):
    assert script('gpu_cifar10').main([*arguments, '--set', 'dataset.batch_size=65', '--minutes', '5']) == 1
    assert 'baseline_3ep_seed5: error:' in capsys.readouterr().err
