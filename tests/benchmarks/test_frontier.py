from types import SimpleNamespace

import pytest


def run(method, seed, accuracy, samples):
    totals = {'eval_accuracy': accuracy, 'samples_seen': samples, 'train_cpu_seconds': samples / 100}
    return SimpleNamespace(method=method, summary={'seed': seed, 'totals': totals, 'epochs': [{'batches': samples / 10}]})


def test_methods_are_set_against_the_plain_runs_by_every_budget(script):
    module = script('frontier')
    noise = (-0.001, 0.0, 0.001)
    runs = [run(f'baseline+{n}ep', seed, 0.1 * n + noise[seed], 1000 * 2**n) for n in (1, 2, 3, 4) for seed in range(3)]
    runs += [run('method+2ep', seed, 0.3 + noise[seed], 4000) for seed in range(3)]
    *plain, method = module.frontier(runs)
    assert [row['samples'] for row in plain] == [2000, 4000, 8000, 16000]
    assert 'factor by samples' not in plain[0]
    for unit in ('CPU seconds', 'samples', 'steps'):  # as accurate as plain runs of twice the budget
        assert method[f'factor by {unit}'].startswith('2.00 (1.9')
    assert module.table([*plain, method]).splitlines()[-1].startswith('| method+2ep | 3 | 30.00 ± 0.10 | 40 | 4,000 | 400 | 2.00 (')


def test_runs_without_a_baseline_are_refused_in_one_line(script, tmp_path, capsys):
    module = script('frontier')
    assert module.main([str(tmp_path), '--name', 'x', '--out', str(tmp_path)]) == 2
    assert capsys.readouterr().err.count('\n') == 1
    with pytest.raises(module.InputError, match='baseline: expected runs of at least two lengths'):
        module.frontier([run('method', seed, 0.5, 10) for seed in range(2)])
