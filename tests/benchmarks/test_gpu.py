"""What waits for a GPU: the order, the portions, and a dry run of the commands."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture
def ran(script, monkeypatch):
    """The steps that ran, in place of running them; their statuses are to be filled in."""
    gpu = script('gpu')
    record = SimpleNamespace(main=gpu.main, names=[], portions=[], status={})
    steps = gpu.steps(Path('data'), Path('out'), Path('runs'), tiny=False)

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


def test_dry_run(script, tmp_path):
    for split in ('train', 'test'):
        images = []
        for pixels in np.random.default_rng(0).integers(0, 256, (80, 32, 32, 3), dtype=np.uint8):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, 'PNG')
            images.append(buffer.getvalue())
        pq.write_table(pa.table({'image': images, 'label': np.arange(80) % 10}), tmp_path / f'{split}.parquet')
    runs, out = tmp_path / 'runs', tmp_path / 'out'
    assert script('gpu').main(['--tiny', '--data', str(tmp_path), '--out', str(out), '--runs', str(runs)]) == 0
    assert json.loads((runs / 'gpu_steps.json').read_text()) == dict.fromkeys(NAMES, 0)
    assert {path.stem for path in out.glob('*.md')} == {'infobatch_overhead_cpu', 'loaders_cpu', 'frontier_cifar10_gpu'}
