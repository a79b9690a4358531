import json
from types import SimpleNamespace

import pytest


def summary(seconds: list[float], batches: list[int], accuracy: float) -> dict:
    epochs = [{'seconds': s, 'batch_size': b, 'batches': 960 // b} for s, b in zip(seconds, batches, strict=True)]
    return {'epochs': epochs, 'totals': {'train_seconds': sum(seconds), 'eval_accuracy': accuracy}}


def arguments(**more) -> SimpleNamespace:
    settings = {'device': 'cpu', 'data': 'data', 'model': 'alexnet_cifar', 'samples': 960, 'epochs': 11, 'batch_size': 16, 'growths': 2}
    return SimpleNamespace(**(settings | {'lr': 0.02, 'seeds': [3, 4], 'workers': 0} | more))


def test_the_three_methods_differ_in_what_is_compared_alone(script, tmp_path):
    jobs = script('adabatch').make_sweep(arguments()).jobs(tmp_path)
    assert [job.recipe.run_name for job in jobs] == [f'{m}_seed{s}' for s in (3, 4) for m in ('small', 'adabatch', 'large')]
    small, grown, large = (job.recipe.settings for job in jobs[:3])
    assert [s['dataset']['batch_size'] for s in (small, grown, large)] == [16, 16, 64]
    assert small['scheduler'] == large['scheduler'] == {'name': 'multi_step', 'milestones': ['3ep', '6ep'], 'gamma': 0.375}
    assert grown['scheduler'] == {'name': 'constant'}
    algorithm = jobs[1].recipe.algorithms[0].build()
    assert (algorithm.growth_factor, algorithm.lr_factor) == (2, 0.75)
    assert [algorithm.policy.times[i].to_timestring() for i in (0, 1)] == ['3ep', '6ep']
    for settings in (small, grown, large):
        for key in ('run_name', 'scheduler', 'algorithms'):
            settings.pop(key, None)
        del settings['dataset']['batch_size']
    assert small == grown == large
    on_gpu = script('adabatch').make_sweep(arguments(device='gpu')).jobs(tmp_path)[1].recipe.settings
    assert (on_gpu['precision'], on_gpu['loader'], list(on_gpu['algorithms'])) == ('amp_bf16', 'device', ['adabatch', 'channels_last'])


def test_tables(script):
    runs = {
        'small': [summary([4.0, 4.0], [16, 16], 0.80), summary([6.0, 6.0], [16, 16], 0.82)],
        'adabatch': [summary([4.0, 1.0], [16, 32], 0.81)],
        'large': [],
    }
    text = script('adabatch').markdown(runs, 'settings')
    assert '| fixed small batch | 16 | 120 | 10.0 | 1.00 | 81.00 | 80.00, 82.00 | +0.00 |' in text
    assert '| AdaBatch | 16 to 32 | 90 | 5.0 | 2.00 | 81.00 | 81.00 | +0.00 |' in text
    assert 'fixed large' not in text
    assert '| fixed small batch | 16 | 4 | 5.00 | 4.00 |' in text
    assert '| AdaBatch | 32 | 1 | 1.00 | 1.00 |' in text


@pytest.mark.parametrize('options', [['--growths', '30'], ['--growths', '0'], ['--set', 'optimizer.learning_rate=1']])
def test_bad_input_costs_no_minute(script, tmp_path, capsys, options):
    out = tmp_path / 'runs'
    assert script('adabatch').main(['--out', str(out), '--results', str(tmp_path / 'results'), *options]) == 2
    assert capsys.readouterr().err.startswith('error: ')
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures('forked_runs')
def test_one_run_through(script, tmp_path, capsys):
    small = ['dataset.name=synthetic', 'dataset.path=null', 'dataset.num_samples=64', 'dataset.image_size=8']
    small += ['model.name=alexnet_cifar', 'dataset.eval_samples=32']
    options = ['--epochs', '2', '--growths', '1', '--batch-size', '16', *(part for setting in small for part in ('--set', setting))]
    main = script('adabatch').main
    assert main(['--out', str(tmp_path / 'runs'), '--results', str(tmp_path), '--minutes', '0', *options]) == 3
    assert main(['--out', str(tmp_path / 'runs'), '--results', str(tmp_path), *options]) == 0
    results = json.loads((tmp_path / 'adabatch_cpu.json').read_text())
    batches = [[epoch['batch_size'] for epoch in run['epochs']] for run in results['runs']]
    assert batches == [[16, 16], [16, 32], [32, 32]]
    assert '16 to 32' in capsys.readouterr().out
