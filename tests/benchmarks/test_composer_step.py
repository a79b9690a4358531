import json

import pytest


def test_everything_end_to_end(script, tmp_path, capsys):
    module = script('composer_step')
    target = module.main(['--device', 'cpu', '--networks', 'linear', '--batch-size', '16', '--steps', '20', '--out', str(tmp_path)])
    results = json.loads((tmp_path / 'composer_step_cpu.json').read_text())
    (network,) = results['networks']
    assert [way['way'] for way in network['ways']] == ['plain PyTorch loop', *(name for name, _, _ in module.VARIANTS)]
    plain, bare, *_ = network['ways']
    assert plain['cpu_over_plain'] == bare['cpu_over_bare'] == 0
    assert bare['cpu_over_plain'] > 0  # Composer's loop does more than four lines
    places = {place['what']: place for place in network['profile']}
    assert set(places) >= {'events of algorithms and callbacks', 'deep copy of each microbatch', 'the timestamp'}
    assert places['the timestamp']['calls_a_step'] == 1
    assert 'plain PyTorch loop' in capsys.readouterr().out
    assert target.name == 'composer_step_cpu.md'


def test_differences_are_step_by_step(script):
    module = script('composer_step')
    turns = [
        [module.Turn(0, step, 1, seconds, seconds / 2) for step, seconds in enumerate(times)] for times in ([1, 2, 9], [1, 1, 2], [1, 2, 4])
    ]
    found = module.compare_turns(*turns)
    assert found['microseconds'] == pytest.approx(2e6)
    assert found['over_plain'] == pytest.approx(1e6)  # of 0, 1, 7
    assert found['cpu_over_bare'] == pytest.approx(0)  # of 0, 0, 2.5
