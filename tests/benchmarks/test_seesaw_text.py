import json
import math
from types import SimpleNamespace

import pytest


def summary(seed: int, loss: float, batches: list[int], sizes: list[int]) -> dict:
    epochs = [{'batches': b, 'batch_size': s} for b, s in zip(batches, sizes, strict=True)]
    return {'seed': seed, 'epochs': epochs, 'totals': {'eval_loss': loss, 'train_cpu_seconds': 60.0}}


def arguments(**more) -> SimpleNamespace:
    settings = {'device': 'cpu', 'epochs': 4, 'samples': 4096, 'batch_size': 16, 'growth': 4, 'lr': 3e-3, 'seeds': [17, 18]}
    settings |= {'methods': ['cosine', 'seesaw', 'fixed']}
    return SimpleNamespace(**(settings | more))


@pytest.mark.parametrize('growth', [2, 4, 16])
def test_steps_along_a_cosine(script, growth):
    samples = 100_000
    seen = steps = 0
    while seen < samples:
        share = (1 + math.cos(math.pi * seen / samples)) / 2
        seen += min(growth, 2 ** math.floor(-math.log2(share) + 1e-9))
        steps += 1
    assert script('seesaw_text').steps_of_seesaw(growth) == pytest.approx(steps / samples, rel=1e-3)


def test_the_methods_differ_in_what_is_compared_alone(script, tmp_path):
    jobs = script('seesaw_text').make_sweep(arguments()).jobs(tmp_path)
    assert [job.recipe.run_name for job in jobs] == [f'{m}_seed{s}' for s in (17, 18) for m in ('cosine', 'seesaw', 'fixed')]
    cosine, seesaw, fixed = (job.recipe.settings for job in jobs[:3])
    assert [s['dataset'].pop('batch_size') for s in (cosine, seesaw, fixed)] == [16, 16, 24]
    assert [s['optimizer'].pop('lr') for s in (cosine, seesaw, fixed)] == pytest.approx([3e-3, 3e-3, 3e-3 * math.sqrt(1.5)])
    assert seesaw.pop('algorithms') == {'adabatch': {'policy': 'seesaw', 'max_batch_size': 64}}
    for settings in (cosine, seesaw, fixed):
        settings.pop('run_name')
    assert cosine == seesaw == fixed


def test_table(script):
    runs = {
        'cosine': [summary(17, 2.0, [4, 4], [16, 16]), summary(18, 2.2, [4, 4], [16, 16])],
        'seesaw': [summary(17, 2.1, [4, 1], [16, 64]), summary(18, 2.3, [4, 1], [16, 64])],
        'fixed': [],
    }
    text = script('seesaw_text').markdown(runs)
    assert '| cosine | 2 | 16 | 8 | 60.0 | 2.1000 ± 0.1414 |  |' in text
    assert '| Seesaw | 2 | 16 to 64 | 5 | 60.0 | 2.2000 ± 0.1414 | +0.1000 [+0.1000, +0.1000] |' in text
    # Student's t of two numbers: 12.706 standard errors
    assert script('seesaw_text').interval([0.0, 0.2]) == '+0.1000 [-1.1706, +1.3706]'


@pytest.mark.usefixtures('forked_runs')
def test_one_run_through(script, tmp_path, capsys):
    small = ['model.layers=1', 'model.width=8', 'model.heads=1', 'dataset.seq_len=16', 'dataset.eval_samples=16']
    options = ['--epochs', '2', '--samples', '64', '--seeds', '3', *(part for setting in small for part in ('--set', setting))]
    main = script('seesaw_text').main
    assert main(['--growth', '3']) == 2
    assert capsys.readouterr().err.startswith('error: --growth: expected a power of two')
    assert main(['--out', str(tmp_path / 'runs'), '--results', str(tmp_path), *options]) == 0
    results = json.loads((tmp_path / 'seesaw_text_cpu.json').read_text())
    assert [sum(epoch['batches'] for epoch in run['epochs']) for run in results['runs']] == [8, 7, 6]
    assert '| Seesaw | 1 |' in capsys.readouterr().out
