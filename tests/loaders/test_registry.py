import json

import pytest
import torch

from composer_effalgos import InputError
from composer_effalgos.loaders import DeviceDataLoader
from composer_effalgos.plan import EpochPlanner
from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.schema import load_recipe, parse_recipe
from composer_effalgos.train import main

DIGITS = {
    'max_duration': '2ep',
    'progress_bar': False,
    'dataset': {'name': 'digits', 'batch_size': 64, 'limit': 200},
    'model': {'name': 'resnet20_cifar'},
    'optimizer': {'name': 'sgd', 'lr': 0.05, 'momentum': 0.9},
}


def recipe(tmp_path, **settings):
    return parse_recipe({**DIGITS, 'save_folder': str(tmp_path), **settings})


@pytest.mark.parametrize('loader', [None, 'workers', {'name': 'workers'}])
def test_worker_processes_are_the_default(tmp_path, loader):
    assert recipe(tmp_path, loader=loader).loader is None


@pytest.mark.parametrize(
    ('loader', 'message'),
    [
        ('devise', "loader.name: devise: unknown loader; did you mean 'device'"),
        ({'name': 'device', 'cach': 'x'}, "loader.cach: unknown argument; did you mean 'cache'"),
        ({'name': 'device', 'cache': 3}, 'loader.cache: expected a string or null, got 3'),
        ({'name': 'device', 'seed': 3}, 'loader.seed: unknown argument'),
        ({'name': 'device', 'device': 'cpu'}, 'loader.device: unknown argument'),
        ({'name': 'workers', 'cache': 'x'}, 'loader.cache: unknown argument'),
        ({'cache': 'x'}, 'loader.name: missing'),
        (['device'], 'loader: expected a mapping'),
    ],
)
def test_what_a_recipe_may_say(tmp_path, loader, message):
    with pytest.raises(InputError, match=message):
        recipe(tmp_path, loader=loader)


def test_a_recipe_trains_on_the_device_path(tmp_path):
    trainer = build_trainer(recipe(tmp_path, loader={'name': 'device', 'cache': str(tmp_path / 'cache')}))
    assert isinstance(trainer.state.train_dataloader, DeviceDataLoader)
    assert isinstance(trainer.state.evaluators[0].dataloader.dataloader, DeviceDataLoader)
    assert len(list((tmp_path / 'cache').iterdir())) == 2
    trainer.fit()
    assert any(isinstance(callback, EpochPlanner) for callback in trainer.state.callbacks)
    assert int(trainer.state.timestamp.sample) == 400


def test_the_paths_evaluate_the_same_weights_alike(tmp_path):
    """Trained on workers, evaluated on both paths: the same accuracy, and the same images to the last bit."""
    trainer = build_trainer(recipe(tmp_path))
    trainer.fit()
    weights = trainer.state.model.state_dict()
    accuracies, images = [], []
    for loader in ('workers', 'device'):
        other = build_trainer(recipe(tmp_path, loader=loader))
        other.state.model.load_state_dict(weights)
        other.eval()
        accuracies.append(other.state.eval_metrics['eval']['MulticlassAccuracy'].compute().item())
        images.append(torch.cat([batch[0] for batch in other.state.evaluators[0].dataloader.dataloader]))
    assert accuracies[0] == accuracies[1]
    assert torch.equal(*images)


def test_what_the_path_cannot_take_is_one_line(tmp_path, capfd):
    path = tmp_path / 'recipe.yaml'
    path.write_text(
        json.dumps({**DIGITS, 'save_folder': str(tmp_path), 'dataset': {'name': 'synthetic', 'batch_size': 8}, 'loader': 'device'})
    )
    load_recipe(path)
    assert main([str(path)]) == 2
    error = capfd.readouterr().err
    assert error.startswith('error: ')
    assert 'loader: DeviceDataLoader: expected a dataset whose attribute `transform`' in error
    assert error.count('\n') == 1
