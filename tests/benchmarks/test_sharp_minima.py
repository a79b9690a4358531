import json

import pytest

SMALL = [
    'dataset.name=digits',
    'dataset.limit=64',
    'dataset.num_workers=0',
    'model.image_size=8',
    'model.conv_stride=2',
    'save_interval=1ep',
    'device=cpu',
]


@pytest.fixture
def arguments(tmp_path):
    overrides = [part for setting in SMALL for part in ('--set', setting)]
    return ['--epochs', '1', '--batches', '16', '64', '--runs', str(tmp_path / 'runs'), '--out', str(tmp_path / 'out'), *overrides]


@pytest.mark.usefixtures('forked_runs')
def test_two_runs_and_what_lies_between_them(script, tmp_path, arguments):
    sharp_minima = script('sharp_minima')
    assert sharp_minima.main([*arguments, '--minutes', '0']) == 3
    assert not (tmp_path / 'out').exists()
    assert sharp_minima.main([*arguments, '--samples', '48', '--sharpness-samples', '16']) == 0
    out = tmp_path / 'out'
    assert {path.name for path in out.iterdir()} == {f'sharp_minima_c1.{ending}' for ending in ('csv', 'json', 'md', 'png', 'svg')}
    found = json.loads((out / 'sharp_minima_c1.json').read_text())
    assert (found['about']['train_samples'], found['about']['sharpness_samples']) == (48, 16)
    assert {'hardware', 'versions', 'command', 'sharpness', 'as_saved', 'distances'} <= found.keys()
    text = (out / 'sharp_minima_c1.md').read_text()
    assert '| 16 | 4 |' in text  # batch, steps
    assert '| 64 | 1 |' in text
    assert '(sharp_minima_c1.png)' in text
    assert text.count('| full |') == text.count('| random 100 |') == 2


def test_bad_input_costs_no_minute(script, tmp_path, arguments, capsys):
    assert script('sharp_minima').main([*arguments, '--set', 'optimizer.learning_rate=1']) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith('error: ')
    assert 'learning_rate' in captured.err
    assert not list(tmp_path.iterdir())
