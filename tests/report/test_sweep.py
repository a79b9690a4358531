from pathlib import Path

import pytest

from composer_effalgos.recipes.settings import list_recipes
from composer_effalgos.report.sweep import combine, load_sweep
from composer_effalgos.utils.errors import InputError

YAMLS = Path(__file__).parents[2] / 'yamls'
RECIPE = """# A recipe
max_duration: 2ep
dataset: {name: digits, batch_size: 64}
model: {name: resnet20_cifar}
optimizer: {name: sgd, lr: 0.1}
algorithms: {blurpool: {}}
"""


@pytest.fixture
def write_sweep(tmp_path):
    (tmp_path / 'small.yaml').write_text(RECIPE)
    (tmp_path / 'other.yaml').write_text(RECIPE.replace('2ep', '3ba'))

    def write(text: str) -> Path:
        (tmp_path / 'sweep.yaml').write_text(text)
        return tmp_path / 'sweep.yaml'

    return write


def test_layers_lie_on_each_other_and_seeds_go_round(write_sweep, tmp_path):
    path = write_sweep("""
recipe: small.yaml
seeds: [1, 2]
settings: {optimizer: {lr: 0.2}, max_duration: 3ep}
methods:
  baseline: {}
  fast: {seeds: [5], optimizer: {lr: 0.4}, algorithms: {infobatch: {prune_ratio: 0.3}}}
  none: {algorithms: null, optimizer: {lr: 0.5}}
  other: {recipe: other.yaml, max_duration: 7ba}
""")
    jobs = load_sweep(path).jobs(tmp_path / 'out', ['dataset.batch_size=32', 'optimizer.lr=0.7'])
    assert [job.recipe.run_name for job in jobs] == [
        'baseline_seed1', 'fast_seed5', 'none_seed1', 'other_seed1', 'baseline_seed2', 'none_seed2', 'other_seed2'
    ]  # fmt: skip
    by_name = {job.recipe.run_name: job for job in jobs}
    settings = {name: job.recipe.settings for name, job in by_name.items()}
    assert {entry['optimizer']['lr'] for entry in settings.values()} == {0.7}, 'the command line has the last word'
    assert {entry['dataset']['batch_size'] for entry in settings.values()} == {32}
    assert settings['fast_seed5']['algorithms'] == {'blurpool': {}, 'infobatch': {'prune_ratio': 0.3}}
    assert settings['none_seed1']['algorithms'] is None
    assert (settings['fast_seed5']['seed'], settings['fast_seed5']['save_folder']) == (5, str(tmp_path / 'out'))
    assert (by_name['baseline_seed1'].epochs, by_name['other_seed1'].epochs) == (3, None)
    assert [job.recipe.settings['optimizer']['lr'] for job in load_sweep(path).jobs(tmp_path, only=['fast', 'none'])] == [0.4, 0.5, 0.5]
    assert [job.recipe.seed for job in load_sweep(path).jobs(tmp_path, seeds=[8, 9], only=['fast'])] == [8, 9]


def test_the_matrix_has_every_combination(write_sweep, tmp_path):
    path = write_sweep("""
recipe: small.yaml
methods: {other: {}}
matrix:
  rate: {slow: {optimizer: {lr: 0.01}}, usual: {}}
  with: {plain: null, squeeze_excite: {algorithms: {squeeze_excite: {}}}}
""")
    found = {job.method: job.recipe.settings for job in load_sweep(path).jobs(tmp_path)}
    assert list(found) == ['other', 'slow', 'slow+squeeze_excite', 'baseline', 'squeeze_excite']
    assert found['slow+squeeze_excite']['optimizer']['lr'] == 0.01
    assert found['slow+squeeze_excite']['algorithms'] == {'blurpool': {}, 'squeeze_excite': {}}
    assert found['baseline']['algorithms'] == {'blurpool': {}}


def test_a_run_that_saves_can_be_resumed(write_sweep, tmp_path):
    path = write_sweep('recipe: small.yaml\nmethods: {a: {save_interval: 1ep}, b: {}}')
    a, b = (job.recipe.trainer for job in load_sweep(path).jobs(tmp_path))
    assert (a['autoresume'], a['save_num_checkpoints_to_keep']) == (True, 1)
    assert 'autoresume' not in b


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('methodes: {a: {}}', "methodes: unknown key; did you mean 'methods'"),
        ('methods: [a]', 'methods: expected'),
        ('methods: {a: {}}', r'a: no recipe'),
        ('methods: {a: {recipe: nowhere.yaml}}', r'nowhere\.yaml: expected a file, got none'),
        ('recipe: small.yaml\nmethods: {a: {optimiser: {lr: 1}}}', "a: optimiser: unknown key; did you mean 'optimizer'"),
        ('recipe: small.yaml\nmethods: {a: 3}', 'a: expected'),
        ('recipe: small.yaml\nmethods: {a: {run_name: x}}', 'a: run_name: expected no such key in a sweep'),
        ('recipe: small.yaml\nsettings: {save_folder: x}\nmethods: {a: {}}', 'a: save_folder: .* --out'),
        ('recipe: small.yaml\nmethods: {a: {seed: 3}}', 'a: seed: .* --seed'),
        ('recipe: small.yaml\nmethods: {a: {seeds: 3}}', 'a: seeds: expected a list'),
        ('recipe: small.yaml\nmethods: {x: {}}\nmatrix: {axis: {x: {seed: 1}}}', 'x: two methods'),
        ('recipe: small.yaml\nmatrix: {axis: [x]}', r'matrix\.axis: expected a mapping'),
        ('recipe: small.yaml\nseeds: [one]', 'seeds: expected'),
        ('recipe: small.yaml\ntargets: [70]', 'targets: expected accuracies in'),
        ('recipe: small.yaml', 'no methods'),
        ('{', 'not valid YAML'),
    ],
)
def test_what_is_wrong_is_named(write_sweep, tmp_path, text, message):
    with pytest.raises(InputError, match=message) as error:
        load_sweep(write_sweep(text)).jobs(tmp_path)
    assert '\n' not in str(error.value)


def test_overrides_do_not_rename_runs(write_sweep, tmp_path):
    with pytest.raises(InputError, match='a: run_name: expected no such key in a sweep'):
        load_sweep(write_sweep('recipe: small.yaml\nmethods: {a: {}}')).jobs(tmp_path, ['run_name=x'])


def test_unknown_methods_and_files_are_named(write_sweep, tmp_path):
    with pytest.raises(InputError, match="no method 'b'; known: aaa"):
        load_sweep(write_sweep('recipe: small.yaml\nmethods: {aaa: {}}')).jobs(tmp_path, only=['b'])
    with pytest.raises(InputError, match='expected a file, got none'):
        load_sweep(tmp_path / 'nowhere.yaml')


@pytest.mark.parametrize('path', [path for path, _ in list_recipes(YAMLS / 'sweeps')], ids=lambda path: path.stem)
def test_the_projects_own_sweeps_are_valid(path, tmp_path):
    sweep = load_sweep(path)
    jobs = [] if sweep.search else sweep.jobs(tmp_path, seeds=[1])
    first = {axis: next(iter(choices)) for axis, choices in sweep.search.items()}
    for axis, choices in sweep.search.items():
        for choice in choices:
            name, layers = combine({taken: sweep.search[a][taken] for a, taken in (first | {axis: choice}).items()})
            jobs.append(sweep.job(name, sweep.method(name, layers), 1, tmp_path))
    assert jobs
    assert sweep.search or len({job.recipe.run_name for job in jobs}) == len(jobs)
    assert all(job.epochs for job in jobs)


def test_sweeps_are_no_recipes():
    assert not [path for path, _ in list_recipes(YAMLS) if 'sweeps' in path.parts]


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('methods: {1: {}}', r'methods: 1 is no name; put it in quotes'),
        ('matrix: {lr: {0.1: {optimizer: {lr: 0.1}}}}', r'matrix: 0\.1 is no name'),
        ('matrix: {blurpool: {on: {}}}', r'matrix: True is no name'),
        ('seeds: []\nmethods: {a: {}}', 'seeds: expected at least one'),
    ],
)
def test_names_are_text_and_there_is_a_seed(write_sweep, text, message):
    with pytest.raises(InputError, match=message):
        load_sweep(write_sweep(f'recipe: small.yaml\n{text}'))
