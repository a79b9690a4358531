"""What waits for a GPU: the order, the portions, and the arguments of the commands."""

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest

from composer_effalgos.report.sweep import load_sweep


@pytest.fixture
def ran(script, monkeypatch):
    """The steps that ran, in place of running them; their statuses are to be filled in."""
    gpu = script('gpu')
    record = SimpleNamespace(main=gpu.main, names=[], portions=[], status={})
    steps = gpu.steps(Path('data'), Path('out'), Path('runs'))

    def run(command, check):
        name = next(step.name for step in steps if step.words == command[1 : 1 + len(step.words)])
        record.names.append(name)
        record.portions.append('--minutes' in command)
        return SimpleNamespace(returncode=record.status.get(name, 0))

    monkeypatch.setattr(gpu, 'subprocess', SimpleNamespace(run=run))
    return record


NAMES = ['tests', 'overhead', 'loaders', 'frontier runs', 'frontier']


def test_what_is_done_is_not_done_again(ran, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ['--data', 'data', '--out', 'out', '--runs', 'runs', '--minutes', '60']
    ran.status['frontier runs'] = 3
    assert ran.main(arguments) == 3
    assert (ran.names, ran.portions) == (NAMES[:4], [False, False, False, True])
    ran.status.clear()
    assert ran.main(arguments) == 0
    assert ran.names[4:] == NAMES[3:]
    assert ran.main(arguments) == 0
    assert len(ran.names) == 6


def test_a_step_starts_where_there_is_time_for_it_and_a_failed_one_is_named(ran, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran.status['tests'] = 1
    assert ran.main(['--data', 'data', '--out', 'out', '--minutes', '1']) == 3
    assert ran.names == ['tests'], 'the first of a portion, whatever it takes'
    assert ran.main(['--data', 'data', '--out', 'out']) == 1
    assert ran.names == NAMES
    assert 'failed: tests; take them out of runs/gpu_steps.json' in capsys.readouterr().out


class ReadError(Exception):
    """Raised by a script once it has read its arguments."""


def test_every_script_takes_its_arguments(script, monkeypatch):
    """What the scripts then do has tests of its own."""
    steps = {step.name: step.words for step in script('gpu').steps(Path('data'), Path('out'), Path('runs'))}
    read = argparse.ArgumentParser.parse_args

    def parse_args(*arguments):
        read(*arguments)
        raise ReadError

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
    for name in ('overhead', 'loaders', 'frontier'):
        path, *words = steps[name]
        with pytest.raises(ReadError):
            script(Path(path).stem).main(words)
    _, _, command, sweep, override, *out = steps['frontier runs']
    assert (command, out) == ('bench', ['--out', 'runs/frontier_cifar10_gpu'])
    assert load_sweep(sweep).jobs(Path(out[1]), overrides=[override])
    assert all(Path(folder).is_dir() for folder in steps['tests'] if folder.startswith('tests/'))
