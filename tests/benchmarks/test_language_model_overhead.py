import json

import pytest

TINY = ['--vocabulary', '50', '--width', '8', '--layers', '1', '--batch-size', '4', '--length', '8', '--steps', '6']


@pytest.fixture
def module(script):
    return script('language_model_overhead')


def test_everything_but_other_processes_end_to_end(module, tmp_path, monkeypatch, capsys):
    parsed = []

    def here(way, argv):
        module.main([*argv, '--memory-of', way])
        parsed.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
        return parsed[-1]

    monkeypatch.setattr(module, 'in_a_process_of_its_own', here)
    target = module.main([*TINY, '--out', str(tmp_path)])
    results = json.loads((tmp_path / 'language_model_overhead.json').read_text())
    assert [row['way'] for row in results['times']] == list(module.WAYS)
    assert results['times'][0]['ratio'] == results['times'][0]['ratio_checked'] == 1
    assert all(row['steps'] == 3 for row in results['times'])  # batches 2, 4 and 5 of 0 to 5
    assert all(row['cpu_seconds'] > 0 for row in results['times'])
    logits = 4 * 50 * 4 * 8
    assert all(0 < logits < row['step'] < row['resident'] for row in parsed)
    assert results['memory'] == dict(zip(('plain', 'scores', 'scores and weights'), parsed, strict=True))
    assert 'scores and weights' in target.read_text()


class Event:
    def __init__(self, start, name='[memory]', nbytes=0, duration=0):
        self.given = {'start_ns': start, 'name': name, 'nbytes': nbytes, 'duration_ns': duration}

    def __getattr__(self, name):
        return lambda: self.given[name]


def test_what_the_allocator_held_at_most_in_each_step(module):
    events = [
        Event(3, nbytes=-5),
        Event(1, nbytes=4),
        Event(2, nbytes=7),
        Event(2, 'aten::add', 100),
        Event(6, nbytes=3),
        Event(9, nbytes=50),
    ]
    steps = [Event(1, 'step 0', duration=3), Event(5, 'step 1', duration=2)]
    assert module.peaks_of_steps([*events, *steps]) == {'step 0': 11, 'step 1': 9}


def test_checked_batches(module):
    assert [batch for batch in range(20) if module.is_checked(batch)] == [0, 1, 3, 7, 15]
