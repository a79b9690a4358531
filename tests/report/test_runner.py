import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from composer_effalgos import cli
from composer_effalgos.report import load_sweep, run_sweep, runner
from composer_effalgos.utils.errors import InputError

RECIPE = """# One epoch of digits
max_duration: 1ep
dataset: {name: digits, batch_size: 256, limit: 512}
model: {name: resnet20_cifar}
optimizer: {name: sgd, lr: 0.1}
"""
SWEEP = """
recipe: tiny.yaml
methods:
  baseline: {seeds: [1, 2]}
  broken: {seeds: [1], load_path: no_such_checkpoint.pt}
"""
# In place of training: notes that it ran, and does what the recipe's optimizer settings say
FAKE = """
import json, os, sys, time, yaml
from pathlib import Path
recipe = yaml.safe_load(Path(sys.argv[1]).read_text())
folder = Path(recipe['save_folder']) / recipe['run_name']
with (folder.parent / 'ran.txt').open('a') as file:
    file.write(recipe['run_name'] + '\\n')
time.sleep(float(os.environ.get('FAKE_SECONDS', 0)))
if recipe['optimizer'].get('momentum'):
    sys.exit('error: momentum')
keys = ('train_seconds', 'train_cpu_seconds', 'samples_seen', 'samples_full', 'samples_saved', 'saved_fraction', 'selection_seconds',
        'peak_memory_bytes')
epoch = dict.fromkeys(('epoch', 'seconds', 'samples', 'batches', 'batch_size', 'lr', 'selection_seconds'), 0) | {'eval_accuracy': 0.5}
summary = dict(run_name=recipe['run_name'], recipe=recipe, seed=recipe['seed'], world_size=1, device='cpu', versions={},
               epochs=[epoch], totals=dict.fromkeys(keys, 0) | {'eval_accuracy': 0.5})
(folder / 'summary.json').write_text(json.dumps(summary))
"""


@pytest.fixture
def sweep(tmp_path) -> Path:
    """A sweep in a folder whose name YAML would read as a mapping, if it were not quoted."""
    folder = tmp_path / 'my: sweeps'
    folder.mkdir()
    (folder / 'tiny.yaml').write_text(RECIPE)
    (folder / 'sweep.yaml').write_text(SWEEP)
    return folder / 'sweep.yaml'


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Replaces training by a script; gives the names of the runs that it was called for."""
    script, ran = tmp_path / 'fake.py', tmp_path / 'out' / 'ran.txt'
    script.write_text(FAKE)
    monkeypatch.setattr(runner, '_command', lambda recipe, ranks: [sys.executable, str(script), str(recipe)])
    return lambda: ran.read_text().split() if ran.exists() else []


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160, no_color=True)


def test_a_run_that_fails_is_named_and_the_others_go_on(sweep, tmp_path, monkeypatch, forked_runs):
    console = quiet()
    monkeypatch.chdir(tmp_path)
    out = tmp_path / 'out: put'
    outcome = run_sweep(sweep, out, seeds=[2], console=console)
    assert (outcome.status, outcome.pending) == (1, [])
    assert len(outcome.failures) == 1
    assert outcome.failures[0].startswith('broken_seed2: ')
    assert 'no_such_checkpoint.pt' in outcome.failures[0]
    assert '\n' not in outcome.failures[0]
    summary = json.loads((out / 'baseline_seed2' / 'summary.json').read_text())
    assert (summary['seed'], summary['recipe']['seed'], len(summary['epochs'])) == (2, 2, 1)
    text = console.file.getvalue()
    assert f'{100 * summary["totals"]["eval_accuracy"]:.2f}' in next(line for line in text.splitlines() if line.startswith('baseline '))
    assert f'Report: {out}/report.html' in text
    assert (out / 'report.html').is_file()


def test_finished_runs_are_kept_and_failed_ones_tried_again(sweep, tmp_path, fake):
    sweep.write_text(SWEEP.replace('load_path: no_such_checkpoint.pt', 'optimizer: {momentum: 0.9}'))
    outcome = run_sweep(sweep, tmp_path / 'out', console=quiet())
    assert outcome.failures == [f'broken_seed1: momentum (see {tmp_path}/out/broken_seed1/train.log)']
    assert fake() == ['baseline_seed1', 'broken_seed1', 'baseline_seed2']
    assert run_sweep(sweep, tmp_path / 'out', console=quiet()).status == 1
    assert fake()[3:] == ['broken_seed1']
    run_sweep(sweep, tmp_path / 'out', fresh=True, only=['baseline'], console=quiet())
    assert fake()[4:] == ['baseline_seed1', 'baseline_seed2']


def test_other_settings_are_refused_not_mixed(sweep, tmp_path, fake):
    assert run_sweep(sweep, tmp_path / 'out', only=['baseline'], console=quiet()).status == 0
    with pytest.raises(InputError, match=r'baseline_seed1/recipe\.yaml: optimizer\.lr: 0\.1 there, 0\.2 now.*--fresh'):
        run_sweep(sweep, tmp_path / 'out', ['optimizer.lr=0.2'], only=['baseline'], console=quiet())
    assert len(fake()) == 2
    run_sweep(sweep, tmp_path / 'out', ['optimizer.lr=0.2'], only=['baseline'], fresh=True, console=quiet())
    assert len(fake()) == 4


def test_a_limit_of_time_leaves_the_rest_for_the_next_call(sweep, tmp_path, fake, monkeypatch):
    monkeypatch.setenv('FAKE_SECONDS', '60')
    outcome = run_sweep(sweep, tmp_path / 'out', only=['baseline'], minutes=1 / 60, console=quiet())
    assert (outcome.status, outcome.pending) == (3, ['baseline_seed1', 'baseline_seed2'])
    monkeypatch.delenv('FAKE_SECONDS')
    assert run_sweep(sweep, tmp_path / 'out', only=['baseline'], console=quiet()).status == 0
    assert fake()[-2:] == ['baseline_seed1', 'baseline_seed2']


def test_runs_side_by_side_overlap_and_one_that_fails_stops_no_other(sweep, tmp_path, fake, monkeypatch):
    sweep.write_text(SWEEP.replace('load_path: no_such_checkpoint.pt', 'optimizer: {momentum: 0.9}'))
    monkeypatch.setenv('FAKE_SECONDS', '1')
    outcome = run_sweep(sweep, tmp_path / 'out', max_parallel=3, console=quiet())
    assert outcome.failures == [f'broken_seed1: momentum (see {tmp_path}/out/broken_seed1/train.log)']
    assert sorted(fake()) == ['baseline_seed1', 'baseline_seed2', 'broken_seed1']
    starts, ends = (
        [(tmp_path / 'out' / name / file).stat().st_mtime for name in ('baseline_seed1', 'baseline_seed2')]
        for file in ('recipe.yaml', 'summary.json')
    )
    assert max(starts) < min(ends)


def test_at_the_deadline_all_that_run_are_stopped(sweep, tmp_path, fake, monkeypatch):
    monkeypatch.setenv('FAKE_SECONDS', '60')
    outcome = run_sweep(sweep, tmp_path / 'out', only=['baseline'], max_parallel=2, minutes=1 / 30, console=quiet())
    assert (outcome.status, outcome.pending) == (3, ['baseline_seed1', 'baseline_seed2'])
    with runner.locked(tmp_path / 'out'):  # no run holds it any more
        assert sorted(fake()) == ['baseline_seed1', 'baseline_seed2']


@pytest.mark.parametrize('minutes', [float('nan'), float('inf'), -1.0])
def test_a_limit_of_time_that_never_comes_is_refused(sweep, tmp_path, fake, minutes):
    with pytest.raises(InputError, match='--minutes: expected a number at least 0'):
        run_sweep(sweep, tmp_path / 'out', minutes=minutes, console=quiet())
    assert fake() == []


@pytest.mark.parametrize('kind', ['folder', 'binary', 'text', 'deep', 'fifo', 'dangling', 'device'])
@pytest.mark.parametrize('place', ['recipe.yaml', 'summary.json', '.'])
def test_what_is_no_run_in_a_runs_place(sweep, tmp_path, fake, kind, place):
    """A line that names it, or a run: never a traceback and never a wait."""
    path = tmp_path / 'out' / 'baseline_seed1'
    if place != '.':
        path.mkdir(parents=True)
        path = path / place
    path.parent.mkdir(exist_ok=True)
    make = {
        'folder': path.mkdir,
        'binary': lambda: path.write_bytes(b'\xff\x00\x81'),
        'text': lambda: path.write_text('- a'),
        'deep': lambda: path.write_text('[' * 100_000),
        'fifo': lambda: os.mkfifo(path),
        'dangling': lambda: path.symlink_to('nowhere'),
        'device': lambda: path.symlink_to('/dev/zero'),
    }
    make[kind]()
    harmless = place == 'summary.json' or (place, kind) == ('.', 'folder')
    if harmless:
        assert run_sweep(sweep, tmp_path / 'out', seeds=[1], only=['baseline'], console=quiet()).status == 0
        return
    with pytest.raises(InputError, match=re.escape(str(path))) as error:
        run_sweep(sweep, tmp_path / 'out', seeds=[1], only=['baseline'], console=quiet())
    assert '\n' not in str(error.value)
    assert path.exists() or path.is_symlink()
    if place == 'recipe.yaml':  # what it says helps
        assert run_sweep(sweep, tmp_path / 'out', seeds=[1], only=['baseline'], fresh=True, console=quiet()).status == 0


def test_every_recipe_is_checked_before_the_first_run(sweep, tmp_path):
    sweep.write_text(SWEEP.replace('load_path', 'loadpath'))
    with pytest.raises(InputError, match='loadpath'):
        run_sweep(sweep, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_a_folder_in_use_is_refused_and_one_that_is_a_file(sweep, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(runner, 'GRACE', 0.1)
    (tmp_path / 'out').mkdir()
    with runner.locked(tmp_path / 'out'), pytest.raises(InputError, match='another sweep is at work'):
        run_sweep(sweep, tmp_path / 'out', console=quiet())
    assert fake() == []
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot be made'):
        run_sweep(sweep, tmp_path / 'file', console=quiet())


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere a run outlives a sweep that is killed')
def test_a_killed_sweep_takes_its_run_along_and_goes_on(sweep, tmp_path, fake):
    script = f"""
import sys
from composer_effalgos.report import run_sweep, runner
runner._command = lambda recipe, ranks: [sys.executable, {str(tmp_path / 'fake.py')!r}, str(recipe)]
run_sweep({str(sweep)!r}, {str(tmp_path / 'out')!r}, only=['baseline'])
"""
    process = subprocess.Popen([sys.executable, '-c', script], stdout=subprocess.DEVNULL, env={**os.environ, 'FAKE_SECONDS': '60'})
    while not fake():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    start = time.monotonic()
    # were the run still there, it would hold the folder for its minute
    with runner.locked(tmp_path / 'out'):
        assert time.monotonic() - start < 30
    (job, _) = load_sweep(sweep).jobs(tmp_path / 'out', only=['baseline'])
    assert not runner.finished(job)


def test_the_command_line_has_an_error_line_and_a_status(sweep, tmp_path, monkeypatch, capsys, fake):
    sweep.write_text(SWEEP.replace('load_path: no_such_checkpoint.pt', 'optimizer: {momentum: 0.9}'))
    monkeypatch.setattr(sys, 'argv', ['effalgos', 'bench', str(sweep), '--out', str(tmp_path / 'out'), 'optimizer.nesterov=false'])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert capsys.readouterr().err == f'error: broken_seed1: momentum (see {tmp_path}/out/broken_seed1/train.log)\n'
    assert json.loads((tmp_path / 'out' / 'baseline_seed1' / 'summary.json').read_text())['recipe']['optimizer']['nesterov'] is False
    monkeypatch.setattr(sys, 'argv', ['effalgos', 'bench', str(tmp_path / 'no.yaml')])
    assert cli.main() == 2
    assert capsys.readouterr().err.startswith('error: ')
