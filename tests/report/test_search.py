import io
import itertools
import json
import sys

import pytest
import yaml
from rich.console import Console

from composer_effalgos import cli
from composer_effalgos.report import load_sweep, run_search, run_sweep, runner
from composer_effalgos.report.search import Trial, _table, factor
from composer_effalgos.utils.errors import InputError

pytest.importorskip('optuna')

RECIPE = """# A recipe
max_duration: 6ep
dataset: {name: digits, batch_size: 64}
model: {name: resnet20_cifar}
optimizer: {name: sgd, lr: 0.1}
"""
SPACE = """
recipe: tiny.yaml
targets: [0.5, 0.8]
search:
  batch: {b64: {}, b32: {dataset: {batch_size: 32}}, b16: {dataset: {batch_size: 16}}}
  rate: {r1: {}, r2: {optimizer: {lr: 0.2}}, r3: {optimizer: {lr: 0.3}}}
"""
# In place of training: an epoch takes as many seconds as the batch has samples, and adds the learning rate to the accuracy
FAKE = """
import json, sys, time, yaml
from pathlib import Path
recipe = yaml.safe_load(Path(sys.argv[1]).read_text())
folder = Path(recipe['save_folder']) / recipe['run_name']
with (folder.parent / 'ran.txt').open('a') as file:
    file.write(recipe['run_name'] + '\\n')
batch, lr = recipe['dataset']['batch_size'], recipe['optimizer']['lr']
if recipe['optimizer'].get('momentum'):
    sys.exit('error: momentum')
keys = ('train_seconds', 'train_cpu_seconds', 'samples_seen', 'samples_full', 'samples_saved', 'saved_fraction', 'selection_seconds',
        'peak_memory_bytes')
summary = dict(run_name=recipe['run_name'], recipe=recipe, seed=recipe['seed'], world_size=1, device='cpu', versions={},
               epochs=[], totals=dict.fromkeys(keys, 0) | {'eval_accuracy': 0.5})
rest = dict.fromkeys(('samples', 'batches', 'batch_size', 'lr', 'selection_seconds'), 0)
for epoch in range(int(recipe['max_duration'].removesuffix('ep'))):
    summary['epochs'].append(rest | dict(epoch=epoch, seconds=batch, eval_accuracy=min(1, 0.05 + lr * (epoch + 1))))
    (folder / 'part').write_text(json.dumps(summary))
    (folder / 'part').rename(folder / 'summary.json')
    time.sleep(recipe.get('dist_timeout', 0))
"""


def seconds_to(target: float, batch: int, lr: float) -> float | None:
    """By hand, what the fake gives within its six epochs."""
    return next((batch * epoch for epoch in range(1, 7) if 0.05 + lr * epoch > target), None)


@pytest.fixture
def space(tmp_path, monkeypatch):
    """A search space whose runs are faked."""
    (tmp_path / 'tiny.yaml').write_text(RECIPE)
    (tmp_path / 'space.yaml').write_text(SPACE)
    (tmp_path / 'fake.py').write_text(FAKE)
    monkeypatch.setattr(runner, '_command', lambda recipe, ranks: [sys.executable, str(tmp_path / 'fake.py'), str(recipe)])
    return tmp_path / 'space.yaml'


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


def found(out) -> list[dict]:
    return json.loads((out / 'search.json').read_text())['trials']


def test_the_whole_space_gives_the_best_of_all(space, tmp_path):
    out = tmp_path / 'out'
    assert run_search(space, out, trials=9, console=quiet()).status == 0
    by_hand = {(b, r): seconds_to(0.8, b, r) for b, r in itertools.product((64, 32, 16), (0.1, 0.2, 0.3))}
    trials = found(out)
    assert len({trial['name'] for trial in trials}) == 9
    assert (trials[0]['name'], trials[0]['seconds']) == ('b16+r3', min(value for value in by_hand.values() if value is not None))
    for trial in trials:
        batch, rate = (int(trial['choices']['batch'][1:]), int(trial['choices']['rate'][1:]) / 10)
        assert trial['seconds'] in (by_hand[batch, rate], None)
        assert trial['seconds'] is None or trial['epoch'] * batch == trial['seconds']
        if trial['seconds'] is None:  # it never gets there, or was cut off by a better one
            assert by_hand[batch, rate] is None or by_hand[batch, rate] >= trials[0]['seconds']
    assert (out / 'search.md').read_text().splitlines()[2].startswith('| b16+r3 | 48.0 | 1.00 | 3 |')
    # the first choices and the best three, ready for effalgos bench
    jobs = load_sweep(out / 'best.yaml').jobs(tmp_path / 'confirmed')
    names = list(dict.fromkeys(job.method for job in jobs))
    assert names == ['baseline', *[trial['name'] for trial in trials[:3]]]
    assert {job.recipe.seed for job in jobs} == {17, 18, 19}
    best = next(job.recipe.settings for job in jobs if job.method == 'b16+r3')
    assert (best['dataset']['batch_size'], best['optimizer']['lr'], best['max_duration']) == (16, 0.3, '6ep')


def test_the_factor_is_against_the_quickest_plain_combination():
    def trial(name, seconds, *, plain):
        return Trial(name, {}, None if seconds is None else 1, seconds, 0.8, 6, stopped=False, plain=plain)

    trials = [
        trial('slow', 90.0, plain=True),
        trial('quick', 60.0, plain=True),
        trial('pruned', 40.0, plain=False),
        trial('not there', None, plain=False),
    ]
    assert [factor(item, trials) for item in trials] == [60 / 90, 1.0, 1.5, None]
    assert factor(trials[2], trials[2:]) is None, 'no plain run got there'
    assert r'| a\|b | 5.0 | 12.00 | 1 | 80.00 | 6 |  |' in _table([*trials, trial('a|b', 5.0, plain=False)], 0.9)


def test_it_goes_on_where_it_stopped(space, tmp_path):
    out = tmp_path / 'out'
    run_search(space, out, trials=3, console=quiet())
    ran = (out / 'ran.txt').read_text().split()
    assert ran[0] == 'baseline_seed17', 'the first choices begin'
    assert len(set(ran)) == 3
    run_search(space, out, trials=3, console=quiet())
    assert (out / 'ran.txt').read_text().split() == ran
    run_search(space, out, trials=9, console=quiet())
    assert sorted(set((out / 'ran.txt').read_text().split())) == sorted((out / 'ran.txt').read_text().split())
    assert len(found(out)) == 9
    outcome = run_search(space, tmp_path / 'other', trials=3, minutes=0, console=quiet())
    assert (outcome.status, outcome.pending) == (3, ['3 trials'])


def test_runs_stopped_at_one_target_do_not_pass_for_another(space, tmp_path):
    out = tmp_path / 'out'
    run_search(space, out, trials=1, target=0.5, console=quiet())
    with pytest.raises(InputError, match=r'stopped at an accuracy of 0\.5, not 0\.6'):
        run_search(space, out, trials=1, target=0.6, console=quiet())
    best = tmp_path / 'best.yaml'
    best.write_text((out / 'best.yaml').read_text())
    with pytest.raises(InputError, match='holds runs of effalgos search'):
        run_sweep(best, out, console=quiet())


def test_finished_runs_with_other_settings_are_refused_not_reused(space, tmp_path):
    out = tmp_path / 'out'
    run_search(space, out, ['optimizer.lr=0.3'], trials=2, console=quiet())
    ran, before = (out / 'ran.txt').read_text(), (out / 'search.json').read_text()
    with pytest.raises(InputError, match=r'baseline_seed17/recipe\.yaml: optimizer\.lr: 0\.3 there, 0\.2 now; .*--fresh'):
        run_search(space, out, ['optimizer.lr=0.2'], trials=2, console=quiet())
    assert ((out / 'ran.txt').read_text(), (out / 'search.json').read_text()) == (ran, before)
    run_search(space, out, ['optimizer.lr=0.2'], trials=2, fresh=True, console=quiet())
    assert (out / 'ran.txt').read_text().split() == 2 * ran.split()
    assert {json.loads(path.read_text())['recipe']['optimizer']['lr'] for path in out.glob('*/summary.json')} == {0.2}


def test_a_run_that_cannot_win_is_stopped(space, tmp_path):
    """The first needs 3 epochs of 16 s; one with epochs of 64 s is slower before its first evaluation is known to fail."""
    space.write_text(
        SPACE.replace('b64: {}, b32: {dataset: {batch_size: 32}}, ', 'b16: {}, ')
        .replace('b16: {dataset: {batch_size: 16}}', 'b64: {dataset: {batch_size: 64}, dist_timeout: 1.0}')
        .replace('r1: {}, ', 'r3: {}, ')
        .replace(', r3: {optimizer: {lr: 0.3}}', '')
    )
    (tmp_path / 'tiny.yaml').write_text(RECIPE.replace('batch_size: 64', 'batch_size: 16').replace('lr: 0.1', 'lr: 0.3'))
    run_search(space, tmp_path / 'out', trials=4, console=quiet())
    trials = {trial['name']: trial for trial in found(tmp_path / 'out')}
    assert (trials['baseline']['seconds'], trials['baseline']['stopped']) == (48, False)
    assert (trials['b64']['seconds'], trials['b64']['stopped']) == (None, True)
    assert trials['b64']['epochs'] < 6


def test_a_failed_trial_is_named_and_the_search_goes_on(space, tmp_path, monkeypatch, capsys):
    space.write_text(SPACE.replace('r2: {optimizer: {lr: 0.2}}', 'r2: {optimizer: {momentum: 0.9}}'))
    command = ['effalgos', 'search', str(space), '--out', str(tmp_path / 'out'), '--trials', '9', '--target', '0.6']
    monkeypatch.setattr(sys, 'argv', command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all('r2_seed17: momentum (see ' in line for line in lines)
    assert len(found(tmp_path / 'out')) == 6


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (SPACE.replace('search:', 'matrix:'), 'search: missing'),
        (SPACE.replace('targets: [0.5, 0.8]', ''), 'targets: missing'),
        (SPACE.replace('r2: ', 'b32: '), "search: two choices are named 'b32'"),
        (SPACE.replace('{optimizer: {lr: 0.2}}', '{}'), 'two combinations have the same name'),
        (SPACE.replace('lr: 0.3', 'learning_rate: 0.3'), 'learning_rate'),
    ],
)
def test_what_is_wrong_is_named_before_the_first_run(space, tmp_path, text, message):
    space.write_text(text)
    with pytest.raises(InputError, match=message):
        run_search(space, tmp_path / 'out', console=quiet())
    assert not (tmp_path / 'out').exists()


def test_best_yaml_is_a_sweep_with_its_overrides(space, tmp_path):
    run_search(space, tmp_path / 'out', ['max_duration=5ep'], trials=1, console=quiet())
    content = yaml.safe_load((tmp_path / 'out' / 'best.yaml').read_text())
    assert content['targets'] == [0.8]
    assert content['methods']['baseline']['max_duration'] == '5ep'


def test_best_yaml_trains_what_the_search_trained(space, tmp_path):
    """Layers that remove the recipe's sections before they set them, overrides that do, and interpolations."""
    (tmp_path / 'tiny.yaml').write_text(
        RECIPE + 'scheduler: {name: linear, t_max: "${max_duration}"}\nalgorithms: {infobatch: {delta: 0.5}}\n'
    )
    space.write_text(
        SPACE.replace('search:', 'settings: {algorithms: null, max_duration: 5ep}\nsearch:')
        .replace('r2: {optimizer: {lr: 0.2}}', 'blurpool: {algorithms: {blurpool: {}}}')
        .replace('r3: {optimizer: {lr: 0.3}}', 'device: {loader: {name: device}}')
    )
    overrides = ['model=null', 'model.name=resnet18_cifar', 'optimizer.weight_decay=${optimizer.lr}']
    for given in ([], overrides):
        out = tmp_path / f'out{len(given)}'
        run_search(space, out, given, target=0.5, trials=9, console=quiet())
        jobs = load_sweep(out / 'best.yaml').jobs(tmp_path / 'confirmed', seeds=[17])
        assert len(jobs) == 4
        for job in jobs:
            trained = json.loads((out / job.recipe.run_name / 'summary.json').read_text())['recipe']
            found = {key: value for key, value in job.recipe.settings.items() if key in trained or value is not None}
            assert found == trained | {'save_folder': str(tmp_path / 'confirmed')}
        assert {tuple(job.recipe.settings['algorithms'] or ()) for job in jobs} == {(), ('blurpool',)}


def test_a_trial_without_an_accuracy_says_so(space, tmp_path):
    fake = tmp_path / 'fake.py'
    fake.write_text(fake.read_text().replace('eval_accuracy=min(1, 0.05 + lr * (epoch + 1))', 'eval_accuracy=None'))
    console = quiet()
    assert run_search(space, tmp_path / 'out', trials=2, console=console).status == 0
    said = console.file.getvalue()
    assert said.count('target not reached, no accuracy measured') == 2
    assert '| – | – | – | 6 | not reached |' in said
    assert [trial['accuracy'] for trial in found(tmp_path / 'out')] == [None, None]
