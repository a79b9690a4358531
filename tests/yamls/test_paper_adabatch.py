"""The recipes of AdaBatch's published results."""

from pathlib import Path

import pytest

from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.schema import load_recipe
from composer_effalgos.recipes.settings import list_recipes
from composer_effalgos.report.sweep import load_sweep

FOLDER = Path(__file__).parents[2] / 'yamls'
# first batch of AdaBatch, fixed small batch
PUBLISHED = {
    ('cifar10', 'resnet20'): (64, 128),
    ('cifar10', 'vgg19_bn'): (64, 128),
    ('cifar10', 'alexnet'): (128, 256),
    ('cifar100', 'resnet20'): (64, 128),
    ('cifar100', 'vgg19_bn'): (64, 128),
    ('cifar100', 'alexnet'): (64, 512),
}
DECAYS = {'name': 'multi_step', 'milestones': ['20ep', '40ep', '60ep', '80ep'], 'gamma': 0.375}


@pytest.mark.parametrize('key', PUBLISHED, ids='-'.join)
@pytest.mark.parametrize('method', ['adabatch', 'fixed'])
def test_a_row_of_the_published_table(key, method):
    data, model = key
    settings = load_recipe(FOLDER / data / f'{data}_{model}_paper_{method}.yaml').settings
    assert settings['optimizer'] == {'name': 'sgd', 'lr': 0.01, 'momentum': 0.9, 'weight_decay': 5e-4}
    assert settings['model'] == {'name': f'{model}_cifar', 'num_classes': 100 if data == 'cifar100' else 10}
    assert (settings['dataset']['name'], settings['max_duration'], settings['precision']) == (data, '100ep', 'fp32')
    assert settings['dataset']['batch_size'] == PUBLISHED[key][method == 'fixed']
    if method == 'adabatch':
        assert settings['scheduler'] == {'name': 'constant'}
        assert settings['algorithms'] == {'adabatch': {'growth_factor': 2.0, 'interval': '20ep', 'lr_factor': 0.75}}
    else:
        assert settings['scheduler'] == DECAYS
        assert 'algorithms' not in settings


def test_the_sweep_has_every_recipe_and_the_large_batches(tmp_path):
    jobs = load_sweep(FOLDER / 'sweeps' / 'adabatch_paper.yaml').jobs(tmp_path)
    first_batches = {}
    for job in jobs:
        first_batches.setdefault(job.method.rsplit('_adabatch')[0].rsplit('_fixed_')[0], []).append(job.recipe.dataset.batch_size)
    for (data, model), small in PUBLISHED.items():
        found = first_batches[f'{data}_{model}']
        assert set(small) < set(found)
        assert max(found) == (4096 if model == 'alexnet' else 2048)


def test_the_readme_names_every_recipe():
    text = (FOLDER / 'README.md').read_text(encoding='utf-8')
    for path, _ in list_recipes(FOLDER):
        if '_paper_' in path.stem:
            assert f'composer_effalgos.train yamls/{path.parent.name}/{path.name}\n' in text


@pytest.mark.parametrize(
    ('method', 'last_rate', 'last_batch'), [('adabatch', 0.0031640625, 128), ('fixed', 0.00019775390625, 8)], ids=['adabatch', 'fixed']
)
def test_ends_with_the_published_learning_rate(tmp_path, method, last_rate, last_batch):
    """The same schedule in a twentieth of the time; the rates are those in the published files."""
    times = {
        'adabatch': ['algorithms.adabatch.interval=1ep'],
        'fixed': ['scheduler.milestones=[1ep,2ep,3ep,4ep]'],
    }
    small = [
        'dataset.name=synthetic',
        'dataset.path=null',
        'dataset.num_workers=0',
        'dataset.num_samples=256',
        'dataset.num_classes=4',
        'dataset.image_size=8',
        'dataset.batch_size=8',
        'model.name=alexnet_cifar',
        'max_duration=5ep',
        f'save_folder={tmp_path}',
        'save_interval=5ep',
        'progress_bar=false',
        'loggers=null',
        'callbacks=null',
        *times[method],
    ]
    trainer = build_trainer(load_recipe(FOLDER / 'cifar10' / f'cifar10_resnet20_paper_{method}.yaml', small))
    rates = []
    trainer.state.callbacks[0].batch_start = lambda state, logger: rates.append(
        (state.optimizers[0].param_groups[0]['lr'], len(state.batch[1]))
    )
    trainer.fit()
    trainer.close()
    assert rates[0] == (0.01, 8)
    assert rates[-1] == (pytest.approx(last_rate), last_batch)
