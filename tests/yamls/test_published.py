"""The recipes of the published results, and the commands that their README gives."""

import shlex
from pathlib import Path

import pytest

from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.schema import Recipe, load_recipe
from composer_effalgos.recipes.settings import list_recipes

FOLDER = Path(__file__).parents[2] / 'yamls'
# data, model, InfoBatch or not: optimizer, peak learning rate, batch; as the reproduction's commands have them
PUBLISHED = {
    ('cifar100', 'resnet50', 'baseline'): ('lars', 5.2, 256),
    ('cifar100', 'resnet50', 'infobatch'): ('lars', 5.2, 256),
    ('cifar100', 'resnet18', 'baseline'): ('lars', 5.2, 128),
    ('cifar100', 'resnet18', 'infobatch'): ('sgd', 0.03, 128),
    ('cifar10', 'resnet18', 'baseline'): ('lars', 5.2, 128),
    ('cifar10', 'resnet18', 'infobatch'): ('lars', 2.3, 128),
}


def published(*key: str) -> Recipe:
    data, model, method = key
    return load_recipe(FOLDER / data / f'{data}_{model}_published_{method}.yaml')


def commands() -> list[tuple[int, Path, list[str]]]:
    """Ranks, recipe and overrides of every command in the README."""
    found = []
    for line in (FOLDER / 'README.md').read_text(encoding='utf-8').splitlines():
        if line.startswith('composer '):
            launcher, n, ranks, m, module, recipe, *overrides = shlex.split(line)
            assert (launcher, n, m, module) == ('composer', '-n', '-m', 'composer_effalgos.train')
            found.append((int(ranks), FOLDER.parent / recipe, overrides))
    return found


@pytest.mark.parametrize('key', PUBLISHED, ids='-'.join)
def test_a_row_of_the_published_table(key):
    name, peak, batch = PUBLISHED[key]
    settings = published(*key).settings
    optimizer = settings['optimizer']
    assert (optimizer['name'], optimizer['momentum'], optimizer['weight_decay']) == (name, 0.9, 5e-4)
    assert settings['scheduler'] == {'name': 'one_cycle', 'max_lr': peak}
    assert (settings['dataset']['name'], settings['dataset']['batch_size']) == (key[0], batch)
    assert settings['model'] == {'name': f'{key[1]}_cifar', 'num_classes': 100 if key[0] == 'cifar100' else 10}
    assert (settings['max_duration'], settings['precision']) == ('200ep', 'fp32')
    infobatch = {'infobatch': {'prune_ratio': 0.5, 'delta': 0.875}} if key[2] == 'infobatch' else {}
    assert settings['algorithms'] == {'label_smoothing': {'smoothing': 0.1}} | infobatch


def test_every_published_recipe_has_a_command_for_each_variant():
    given = [(path.stem, ranks, load_recipe(path, overrides)) for ranks, path, overrides in commands() if '_published_' in path.stem]
    for data, model, method in PUBLISHED:
        stem = f'{data}_{model}_published_{method}'
        mine = [(ranks, recipe.precision) for name, ranks, recipe in given if name == stem]
        assert mine == [(1, 'fp32'), (1, 'amp_fp16'), (2, 'fp32'), (2, 'amp_fp16')]
    run_names = [recipe.run_name for *_, recipe in given]
    assert len(set(run_names)) == len(run_names)  # none resumes another
    # and no recipe is left out of the README
    assert {name for name, *_ in given} == {path.stem for path, _ in list_recipes(FOLDER) if '_published_' in path.stem}


def test_batches_divide_over_the_ranks_of_every_command():
    for ranks, path, overrides in commands():
        assert load_recipe(path, overrides).dataset.batch_size % ranks == 0


def test_what_a_recipe_costs_is_on_its_first_line():
    for path, description in list_recipes(FOLDER):
        assert 'epochs' in description, path


@pytest.mark.parametrize('method', ['baseline', 'infobatch'])
def test_lars_under_one_cycle_learns(tmp_path, method):
    """The published optimizer, schedule and algorithms on a small problem: its rate peaks and ends where OneCycleLR's does."""
    settings = published('cifar10', 'resnet18', method).settings
    small = [
        'dataset.name=synthetic',
        'dataset.path=null',
        'dataset.num_workers=0',
        'dataset.num_samples=256',
        'dataset.num_classes=4',
        'dataset.image_size=8',
        'dataset.noise=0.3',
        'dataset.batch_size=32',
        'model.name=resnet20_cifar',
        'max_duration=8ep',
        f'save_folder={tmp_path}',
        'progress_bar=false',
        'loggers=null',
    ]
    recipe = load_recipe(FOLDER / 'cifar10' / f'cifar10_resnet18_published_{method}.yaml', small)
    trainer = build_trainer(recipe)
    rates = []
    trainer.state.callbacks[0].batch_start = lambda state, logger: rates.append(state.optimizers[0].param_groups[0]['lr'])
    trainer.fit()
    trainer.close()
    peak = settings['scheduler']['max_lr']
    assert rates[0] == pytest.approx(peak / 25)
    assert 0.95 * peak < max(rates) <= peak
    assert trainer.state.optimizers[0].param_groups[0]['lr'] < 1e-3 * peak
    assert float(trainer.state.eval_metric_values['MulticlassAccuracy']) > 0.8
