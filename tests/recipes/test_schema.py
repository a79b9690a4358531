import contextlib
import os
import re
import string
from pathlib import Path

import composer.callbacks
import composer.loggers
import pytest
import torch
from composer.algorithms import BlurPool, SqueezeExcite
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_effalgos import InfoBatch
from composer_effalgos.recipes import components
from composer_effalgos.recipes.schedulers import OneCycleScheduler
from composer_effalgos.recipes.schema import OURS, load_recipe, parse_recipe
from composer_effalgos.recipes.settings import _Interpolated, list_recipes, read_settings, recipe_folder
from composer_effalgos.utils.errors import InputError
from tests.fuzz.mutate import limit

# The recipe in the documentation
CIFAR = """
run_name: cifar10_resnet18_infobatch
seed: 17
max_duration: 30ep
precision: amp_bf16
save_folder: runs
dataset: {name: cifar10, path: data, batch_size: 128, num_workers: 8}     # batch_size is global
model: {name: resnet18_cifar, num_classes: 10}
optimizer: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 5.0e-4, nesterov: true}
scheduler: {name: one_cycle, max_lr: 0.1}
algorithms:                       # by snake_case name
  infobatch: {prune_ratio: 0.5, delta: 0.875}
  blurpool: {}
  squeeze_excite: {latent_channels: 64, min_channels: 128}
callbacks: {speed_monitor: {window_size: 50}}
loggers: {tensorboard: {}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / 'cifar.yaml'
    path.write_text(CIFAR)
    return path


def minimal(**changes) -> dict:
    settings = {
        'max_duration': '1ep',
        'dataset': {'name': 'synthetic', 'batch_size': 8},
        'model': {'name': 'resnet20_cifar'},
        'optimizer': {'name': 'sgd', 'lr': 0.1},
    }
    return settings | changes


def test_the_documented_recipe_is_read_as_it_is_written(recipe_file):
    recipe = load_recipe(recipe_file)
    assert (recipe.run_name, recipe.seed, recipe.max_duration, recipe.precision) == ('cifar10_resnet18_infobatch', 17, '30ep', 'amp_bf16')
    assert recipe.run_folder == Path('runs/cifar10_resnet18_infobatch')
    assert (recipe.dataset.name, recipe.dataset.path, recipe.dataset.batch_size, recipe.dataset.num_workers) == ('cifar10', 'data', 128, 8)
    assert (recipe.model.name, recipe.model.num_classes, recipe.model.pretrained) == ('resnet18_cifar', 10, False)
    assert (recipe.optimizer.target, recipe.optimizer.kwargs['weight_decay']) == (torch.optim.SGD, 5e-4)
    assert (recipe.scheduler.target, recipe.scheduler.kwargs) == (OneCycleScheduler, {'max_lr': 0.1})
    assert [(item.target, item.kwargs) for item in recipe.algorithms] == [
        (InfoBatch, {'prune_ratio': 0.5, 'delta': 0.875}),
        (BlurPool, {}),
        (SqueezeExcite, {'latent_channels': 64, 'min_channels': 128}),
    ]
    assert [(item.target, item.kwargs) for item in recipe.callbacks] == [(composer.callbacks.SpeedMonitor, {'window_size': 50})]
    assert [(item.target, item.kwargs) for item in recipe.loggers] == [(composer.loggers.TensorboardLogger, {})]
    assert recipe.settings['dataset'] == {'name': 'cifar10', 'path': 'data', 'batch_size': 128, 'num_workers': 8}


def test_overrides_change_add_and_replace(recipe_file):
    overrides = ['seed=3', 'optimizer.lr=5e-2', 'algorithms.ema.half_life=10ba', 'save_interval=1ep', 'dataset.limit=100']
    recipe = load_recipe(recipe_file, [*overrides, 'loggers=null', 'algorithms.blurpool=null'])
    assert (recipe.seed, recipe.optimizer.kwargs['lr'], recipe.trainer) == (3, 0.05, {'save_interval': '1ep'})
    assert [item.key.rsplit('.')[-1] for item in recipe.algorithms] == ['infobatch', 'blurpool', 'squeeze_excite', 'ema']
    assert (recipe.dataset.options, recipe.loggers) == ({'limit': 100}, [])
    assert recipe.settings['algorithms']['ema'] == {'half_life': '10ba'}


def test_interpolation_is_resolved(recipe_file):
    recipe = load_recipe(recipe_file, ['scheduler.max_lr=${optimizer.lr}', 'optimizer.lr=0.3'])
    assert recipe.scheduler.kwargs['max_lr'] == 0.3


def test_the_file_names_the_run_where_the_recipe_does_not(recipe_file):
    recipe_file.write_text(CIFAR.replace('run_name: cifar10_resnet18_infobatch', ''))
    assert load_recipe(recipe_file).run_name == 'cifar'


@pytest.mark.parametrize(
    ('override', 'expected'),
    [
        ('seeed=1', "seeed: unknown key; did you mean 'seed'?"),
        ('save_intervall=1ep', "save_intervall: unknown key; did you mean 'save_interval'?"),
        ('train_dataloader=1', 'train_dataloader: unknown key'),
        ('seed=x', "seed: expected an integer, got 'x' (str)"),
        ('seed=-1', 'seed: expected a number in [0, 4294967295], got -1'),
        ('run_name=../up', "run_name: expected a plain folder name of at most 200 bytes, got '../up'"),
        ('run_name=7', 'run_name: expected a string, got 7 (int)'),
        ('max_duration=null', 'max_duration: missing'),
        ('max_duration=2epp', "max_duration: expected a time string such as '10ep' or '500ba', got '2epp'"),
        ('max_duration=0ep', 'max_duration: expected a positive number'),
        ('max_duration=10sec', 'max_duration: expected a positive number of epochs, batches or samples'),
        ('max_duration=1000tok', "max_duration: expected a positive number of epochs, batches or samples such as '10ep', got '1000tok'"),
        ('precision=amp_bf61', "precision: unknown precision; did you mean 'amp_bf16'?"),
        ('eval_interval=3x', "eval_interval: expected an integer or a time string such as '10ep', got '3x' (str)"),
        ('eval_interval=0ep', "eval_interval: expected a time above 0 such as '1ep', or 0 for no evaluation, got '0ep'"),
        ('save_interval=0ba', "save_interval: expected a time above 0 such as '1ep', or no such key for no checkpoints, got '0ba'"),
        ('save_interval=0', 'save_interval: expected a time above 0'),
        ('save_filename=../../x.pt', "save_filename: expected a name inside the folder of checkpoints, got '../../x.pt'"),
        (
            'save_latest_filename=newest.pt',
            'save_latest_filename: expected latest-rank{rank}.pt, which names the checkpoint to resume from',
        ),
        ('save_latest_filename=null', 'save_latest_filename: expected latest-rank{rank}.pt'),
        ('train_subset_num_batches=0', 'train_subset_num_batches: expected a number of batches from 1, or -1 for all, got 0'),
        ('eval_subset_num_batches=-2', 'eval_subset_num_batches: expected a number of batches from 1, or -1 for all, got -2'),
        ('device_train_microbatch_size=0', 'device_train_microbatch_size: expected a whole number of samples from 1, or auto, got 0'),
        ('device_train_microbatch_size=-4', 'device_train_microbatch_size: expected a whole number'),
        ('device_train_microbatch_size=2.5', 'device_train_microbatch_size: expected a whole number'),
        ('device_train_microbatch_size=x', 'device_train_microbatch_size: expected a whole number'),
        ('optimizer.lr=.nan', 'optimizer.lr: expected a finite number that fits into 32 bits, got nan'),
        ('optimizer.lr=.inf', 'optimizer.lr: expected a finite number that fits into 32 bits, got inf'),
        ('optimizer.lr=1e300', 'optimizer.lr: expected a finite number that fits into 32 bits, got 1e+300'),
        ('optimizer.betas=[.inf]', 'optimizer.betas[0]: expected a finite number'),
        ('scheduler.t_max=0ep', "scheduler.t_max: expected a time above 0 in one of the units 'ep', 'ba', 'sp', 'tok', 'dur', got '0ep'"),
        ('scheduler.t_max=1sec', "scheduler.t_max: expected a time above 0 in one of the units 'ep', 'ba', 'sp', 'tok', 'dur', got '1sec'"),
        ('autoresume=1', 'autoresume: expected true or false, got 1 (int)'),
        ('dataset=null', 'dataset: missing'),
        ('dataset=cifar10', "dataset: expected a mapping, got 'cifar10' (str)"),
        ('dataset.name=cifar11', "dataset.name: unknown dataset; did you mean 'cifar10'?"),
        ('dataset.batch_size=1.5', 'dataset.batch_size: expected an integer, got 1.5 (float)'),
        ('dataset.batch_size=0', 'dataset.batch_size: expected a number in [1, 1099511627776], got 0'),
        ('dataset.batch_siz=1', "dataset.batch_siz: unknown key; did you mean 'batch_size'?"),
        ('dataset.augmnt=true', "dataset.augmnt: unknown key; did you mean 'augment'?"),
        ('dataset.augment=maybe', "dataset.augment: expected true or false, got 'maybe' (str)"),
        ('dataset.num_workers=-1', 'dataset.num_workers: expected a number in [0, 1024], got -1'),
        ('model.num_class=3', "model.num_class: unknown key; did you mean 'num_classes'?"),
        ('model.name=3', 'model.name: expected a string, got 3 (int)'),
        ('optimizer.lrr=1', "optimizer.lrr: unknown argument; did you mean 'lr'?"),
        ('optimizer.name=sdg', "optimizer.name: sdg: unknown optimizer; did you mean 'sgd'?"),
        ('optimizer.name=null', 'optimizer.name: missing; expected a string'),
        ('optimizer.nesterov=3', 'optimizer.nesterov: expected true or false, got 3 (int)'),
        ('optimizer.params=3', 'optimizer.params: unknown argument'),
        ('scheduler.name=one_cicle', "scheduler.name: one_cicle: unknown scheduler; did you mean 'one_cycle'?"),
        ('scheduler.t_max=1dr', "scheduler.t_max: expected a time string such as '10ep', got '1dr' (str)"),
        ('scheduler.max_lr=null', 'scheduler.max_lr: expected a number, got None'),
        ('algorithms=x', 'algorithms: expected a mapping'),
        ('algorithms.infobach={}', "algorithms.infobach: unknown algorithm; did you mean 'infobatch'?"),
        ('algorithms.info_batch={}', 'algorithms.info_batch: the same algorithm is named twice; keep one'),
        ('algorithms.infobatch.prune_ration=0.1', "algorithms.infobatch.prune_ration: unknown argument; did you mean 'prune_ratio'?"),
        ('algorithms.infobatch.prune_ratio=half', "algorithms.infobatch.prune_ratio: expected a number, got 'half' (str)"),
        ('algorithms.gradient_clipping={}', 'algorithms.gradient_clipping.clipping_type: missing; expected a string'),
        ('algorithms.blurpool=3', 'algorithms.blurpool: expected a mapping, got 3 (int)'),
        ('callbacks.speed_monitr={}', "callbacks.speed_monitr: unknown callback; did you mean 'speed_monitor'?"),
        ('loggers.tensorbord={}', "loggers.tensorbord: unknown logger; did you mean 'tensorboard'?"),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(recipe_file, override, expected):
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file, [override])
    message = str(caught.value)
    assert message.startswith(f'{recipe_file}: {expected}')
    assert '\n' not in message


@pytest.mark.parametrize('override', ['nonsense', '=3', 'a=[1', 'algorithms=[1]'])
def test_a_broken_override_is_quoted(recipe_file, override):
    with pytest.raises(InputError) as caught:
        load_recipe(recipe_file, [override])
    assert str(caught.value).startswith(f'override {override!r}: ')


@given(key=st.sampled_from(OURS), position=st.integers(0, 20), letter=st.sampled_from(string.ascii_lowercase), kind=st.sampled_from('dir'))
def test_a_slip_of_one_letter_is_mended(key, position, letter, kind):
    position %= len(key)
    slip = key[:position] + {'d': '', 'i': letter + key[position], 'r': letter}[kind] + key[position + 1 :]
    assume(slip != key)
    with pytest.raises(InputError, match=f"unknown key; did you mean '{key}'"):
        parse_recipe(minimal(**{slip: 1}))


@given(
    name=st.sampled_from(sorted({'infobatch', 'adabatch', 'subset_selection', 'label_smoothing', 'progressive_resizing', 'channels_last'})),
    position=st.integers(0, 30),
)
def test_an_algorithm_with_a_letter_missing_is_mended(name, position):
    position %= len(name)
    slip = name[:position] + name[position + 1 :]
    assume(slip.replace('_', '') != name.replace('_', ''))
    with pytest.raises(InputError, match=f"unknown algorithm; did you mean '{name}'"):
        parse_recipe(minimal(algorithms={slip: {}}))


def test_every_algorithm_is_accepted_with_nothing_but_its_required_arguments():
    required = {
        'pruning': {'rule': 'infobatch'},
        'alibi': {'max_sequence_length': 8},
        'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1},
        'stochastic_depth': {'target_layer_name': 'ResNetBottleneck'},
    }
    for name in components.algorithms():
        recipe = parse_recipe(minimal(algorithms={name: required.get(name)}))
        assert recipe.algorithms[0].kwargs == required.get(name, {})


def test_a_missing_recipe(tmp_path):
    for path, got in ((tmp_path / 'none.yaml', r'none \(no such file or directory\)'), (tmp_path, 'a folder')):
        with pytest.raises(InputError, match=f'expected a file, got {got}; give the path of a YAML file'):
            load_recipe(path)


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        (b'seed: 1\nmodel: {name: x\nseed: 2\n', 'line 3: not valid YAML'),
        (b'seed: 1\nseed: 2\n', 'line 2: not valid YAML: found duplicate key'),
        (b'\xff\xfe\x00\x81', 'not readable YAML'),
        (b'', 'expected a mapping of settings, got none'),
        (b'- a\n- b\n', 'expected a mapping of settings, got none'),
        (b'hello', 'expected a mapping of settings, got none'),
        (b'seed: ${nothing}\n', "Interpolation key 'nothing' not found"),
        (b'seed: ???\n', 'Missing mandatory value'),
        (b'model: ' + b'[' * 400 + b']' * 400, 'expected at most 50 levels of nesting'),
        (b'model: ' + b'{a: ' * 60 + b'1' + b'}' * 60, 'expected at most 50 levels of nesting'),
        (b'a: &a [1, *a]\n', 'expected at most'),
        (
            b'a0: &a0 [1, 1]\n' + b''.join(b'a%d: &a%d [*a%d, *a%d]\n' % (i + 1, i + 1, i, i) for i in range(40)),
            'expected at most 100000 values',
        ),
    ],
)
def test_a_broken_recipe(tmp_path, content, expected):
    path = tmp_path / 'broken.yaml'
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert '\n' not in str(caught.value)


def test_recipes_are_listed_with_their_first_comment(tmp_path):
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'two.yaml').write_text('seed: 1\n')
    (tmp_path / 'one.yaml').write_text('# What it shows\nseed: 1\n')
    (tmp_path / 'notes.txt').write_text('# no recipe\n')
    assert list_recipes(tmp_path) == [(tmp_path / 'b' / 'two.yaml', ''), (tmp_path / 'one.yaml', 'What it shows')]


def test_a_folder_without_recipes(tmp_path):
    with pytest.raises(InputError, match='no recipe'):
        list_recipes(tmp_path)
    with pytest.raises(InputError, match='no such folder'):
        list_recipes(tmp_path / 'none')


def test_our_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {path.stem for path, description in list_recipes(recipe_folder()) if description}
    assert {'digits_baseline', 'digits_infobatch', 'digits_adabatch', 'digits_glister', 'digits_all', 'synthetic_smoke'} <= names


@pytest.mark.parametrize(
    ('scheduler', 'expected'),
    [
        ({'name': 'step', 'step_size': '0ep'}, 'scheduler.step_size: expected a time above 0'),
        ({'name': 'step', 'step_size': '1sec'}, 'scheduler.step_size: expected a time above 0'),
        ({'name': 'multi_step', 'milestones': ['1ep', '2sec']}, "scheduler.milestones: expected a time of at least 0 .*, got '2sec'"),
        ({'name': 'cosine_annealing_warm_restarts', 't_0': '0ba'}, 'scheduler.t_0: expected a time above 0'),
        ({'name': 'linear_with_warmup', 't_warmup': '-1ba'}, 'scheduler.t_warmup: expected a time of at least 0'),
    ],
)
def test_times_of_a_schedule(scheduler, expected):
    with pytest.raises(InputError, match=f'^recipe: {expected}'):
        parse_recipe(minimal(scheduler=scheduler))


@pytest.mark.parametrize('extra', [{'scheduler': {'name': 'linear_with_warmup', 't_warmup': '0ba'}}, {'eval_interval': 0}])
def test_zeros_that_mean_something(extra):
    parse_recipe(minimal(**extra))


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / 'fifo.yaml')
    for path in (tmp_path / 'fifo.yaml', Path('/dev/zero')):
        with pytest.raises(InputError, match='expected a file, got a device, FIFO or socket'):
            load_recipe(path)


@pytest.mark.parametrize('override', ['model=' + '[' * 900 + ']' * 900, '.'.join('a' * 900) + '=1', 'model={a: ' * 100 + '}' * 100])
def test_deep_overrides_are_one_line(recipe_file, override):
    with pytest.raises(InputError) as error:
        load_recipe(recipe_file, [override])
    assert '\n' not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize('run_name', ['x' * 201, 'é' * 101, 'a\nb', '\ud800', 'a\0'])
def test_a_run_name_is_a_folders(run_name):
    with pytest.raises(InputError, match='run_name: expected '):
        parse_recipe(minimal(run_name=run_name))


def growing(first: str, step: str, times: int = 40) -> str:
    """A setting a0, and settings a1, a2, ... made by ``step``, where OLD is the one before."""
    steps = [f'a{number}: {step.replace("OLD", f"a{number - 1}")}' for number in range(1, times)]
    return '\n'.join([f'a0: {first}', *steps])


@pytest.mark.parametrize(
    'settings',
    [
        growing('[1, 1]', '[' + ', '.join(10 * ["'${OLD}'"]) + ']', times=10),
        growing('x', "'" + 10 * '${OLD}' + "'", times=10),
        growing('{x: 1}', "[{b: '${OLD}', c: ['${OLD}']}]"),
        growing('1', "'${oc.create:[${OLD}, ${OLD}]}'"),
        growing('{x: 1}', "{x: '${oc.select:OLD}', y: '${oc.dict.values:OLD}'}"),
        growing('[1]', "['${..OLD}', '${OLD}']"),
        "a: ['${b}', '${b}']\nb: ['${a}', '${a}']",
        "a: {b: '${a}'}",
        "k: a\na: 1\nb: '${${k}}'",
    ],
)
def test_interpolation_makes_nothing_large(tmp_path, settings):
    path = tmp_path / 'large.yaml'
    path.write_text(settings + '\n')
    with limit(20), pytest.raises(InputError) as caught:
        read_settings(path)
    assert re.match(
        rf'{path}: [\w.]+: expected (at most 100000 values|no interpolation that contains|interpolations such)', str(caught.value)
    )


TEXTS = ['x', '${a}', '${b}', 'x ${a.b} ${c}', '${.a}', '${..b}', '${b[0]}', '${a.1}', '${c.-1}', '${oc.select:a}']


@given(
    st.recursive(
        st.sampled_from([1, None, *TEXTS]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(['a', 'b', 1]), inner, max_size=3),
        max_leaves=12,
    ),
    st.recursive(st.sampled_from(['y', '${a}', '${c}', 2.5]), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
)
def test_the_size_of_what_interpolation_makes_is_no_underestimate(left, right):
    """Against what OmegaConf makes, where it makes something."""
    raw = {'a': left, 'b': right, 'c': ['${b}', left]}
    try:
        made = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    except (OmegaConfBaseException, RecursionError):
        assume(False)
    with contextlib.suppress(InputError):  # a reference through another one may look as if it contained itself
        assert _Interpolated('recipe', raw).size(()) >= values(made)


def values(tree: object) -> int:
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return 1 + sum(map(values, inner))


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        ('!!bool foo', "line 3: expected text that fits its tag, got !!bool 'foo'"),
        ('!!int ""', "got !!int ''"),
        ('!!float ""', "got !!float ''"),
        ('!!float x', "got !!float 'x'"),
        ('!!timestamp foo', "got !!timestamp 'foo'"),
        ('!!binary aGVsbG8=', "expected an integer, got b'hello' (bytes)"),
        ('!!python/object:os.system x', 'could not determine a constructor for the tag'),
        ('"\\UFFFFFFFF"', 'not readable YAML'),
        ('0x' + 'f' * 20_000, 'expected at most 4000 characters in a value, got 20002'),
        ('0x' + 'f' * 3900, 'seed: expected a finite number that fits into 32 bits, got a number of more than 4300 digits'),
    ],
)
def test_odd_yaml(recipe_file, value, expected):
    with pytest.raises(InputError) as in_override:
        load_recipe(recipe_file, [f'seed={value}'])
    recipe_file.write_text(CIFAR.replace('seed: 17', f'seed: {value}'))
    with pytest.raises(InputError) as in_file:
        load_recipe(recipe_file)
    assert str(in_file.value).startswith(str(recipe_file))
    for line in (str(in_override.value).replace('line 1', 'line 3'), str(in_file.value)):
        assert expected in line
        assert '\n' not in line


def test_merge_keys_and_dates_are_read(tmp_path):
    path = tmp_path / 'merged.yaml'
    path.write_text('a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: 2020-13-45\n')
    assert read_settings(path) == {'a': {'x': 1}, 'b': {'x': 1, 'y': 2}, 'c': '2020-13-45'}


def test_a_loop_of_symlinks(tmp_path):
    (tmp_path / 'loop.yaml').symlink_to('loop.yaml')
    with pytest.raises(InputError, match=r'loop.yaml: expected a file, got none \(too many levels of symbolic links\)'):
        load_recipe(tmp_path / 'loop.yaml')
