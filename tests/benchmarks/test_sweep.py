import json
from collections import namedtuple

import pytest

from composer_effalgos.utils.errors import InputError

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


@pytest.mark.usefixtures('forked_runs')
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
    (tmp_path / 'search.json').write_text('{"trials": [{"name": "baseline"}]}')
    (tmp_path / 'search.md').write_text('| combination |')
    searched = sweep.report(tmp_path / 'runs', [], tmp_path / 'out', 'best', 'Best', [], search=tmp_path)
    assert searched.read_text().rstrip().endswith('1 runs with one seed:\n\n| combination |')


def test_bad_input_costs_no_minute(script, tmp_path, arguments, capsys):
    assert script('sweep').main([*arguments, 'optimizer.learning_rate=1']) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ')
    assert 'learning_rate' in captured.err
    assert not list(tmp_path.iterdir())


def test_time_to_equal_accuracy(script):
    sweep = script('sweep')
    row = namedtuple('row', 'method accuracy train_seconds samples_seen runs')
    rows = [
        row('baseline+8ep', 0.95, 5.0, 80, (1, 2)),
        row('baseline+16ep', 0.97, 10.0, 160, (1, 2)),
        row('infobatch+adabatch+8ep', 0.9681, 4.0, 60, (1, 2)),
        row('infobatch+adabatch+16ep', 0.98, 8.0, 120, (1, 2)),
        row('glister+8ep', 0.91, 2.0, 24, (1, 2)),
        row('glister+16ep', 0.9, 4.0, 48, (1, 2)),
    ]
    found = {item['method']: (item['run'], item['times_faster']) for item in sweep.equal_accuracy(rows, 'baseline+16ep')}
    assert found == {
        'baseline': ('baseline+16ep', 1.0),
        'infobatch+adabatch': ('infobatch+adabatch+8ep', 2.5),
        'glister': ('glister+8ep', None),
    }
    text = sweep.equal_accuracy_table(sweep.equal_accuracy(rows, 'baseline+16ep'), 'baseline+16ep')
    assert '| infobatch+adabatch | infobatch+adabatch+8ep | 96.81 | 60 | 4.0 | 2.50 |' in text
    assert '| glister | none; most accurate: glister+8ep | 91.00 | 24 | 2.0 | – |' in text
    with pytest.raises(InputError, match="--equal-to: 'baseline' is none of the methods"):
        sweep.equal_accuracy(rows, 'baseline')
