"""The recipes and sweeps of the large-batch study."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision

from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.schema import load_recipe
from composer_effalgos.report import load_sweep

FOLDER = Path(__file__).parents[2] / 'yamls'


def test_the_rate_is_scaled_with_the_batch(tmp_path: Path) -> None:
    jobs = load_sweep(FOLDER / 'sweeps' / 'large_batch.yaml').jobs(tmp_path)
    assert [job.recipe.dataset.batch_size for job in jobs] == [32, 64, 128, 256, 512, 1024]
    for job in jobs:
        batch = job.recipe.dataset.batch_size
        optimizer = job.recipe.settings['optimizer']
        assert optimizer.pop('lr') == pytest.approx(3e-4 * batch / 32)
        assert optimizer == {'name': 'sgd', 'momentum': 0.9, 'weight_decay': 1e-4}
        assert job.recipe.settings['scheduler'] == {'name': 'cosine_annealing'}
        assert job.recipe.max_duration == '200ep'
        assert job.recipe.model.name == 'mobilenet_v2_cifar'
        assert job.method.endswith(f'_{batch}')


def test_small_and_large_batch_differ_in_the_batch_alone(tmp_path: Path) -> None:
    jobs = load_sweep(FOLDER / 'sweeps' / 'sharp_minima.yaml').jobs(tmp_path)
    assert [job.method for job in jobs] == [f'{network}_{batch}' for network in ('c1', 'c2', 'vgg11_bn') for batch in (256, 5000)]
    for small, large in zip(jobs[::2], jobs[1::2], strict=True):
        first, second = ({key: value for key, value in job.recipe.settings.items() if key != 'run_name'} for job in (small, large))
        assert first['dataset'].pop('batch_size') == 256
        assert second['dataset'].pop('batch_size') == 5000  # a tenth of the training images, as in the paper
        assert first == second
        assert first['optimizer'] == {'name': 'adam', 'lr': 1e-3}
        assert first['dataset']['augment'] is False


def test_fine_tuning_starts_from_a_local_file_and_follows_a_cosine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = torchvision.models.mobilenet_v2().state_dict()
    torch.save(published, tmp_path / 'imagenet.pth')
    recipe = load_recipe(
        FOLDER / 'cifar10' / 'cifar10_mobilenet_v2_large_batch.yaml',
        [
            f'model.pretrained={tmp_path / "imagenet.pth"}',
            'dataset.name=synthetic',
            'dataset.num_samples=16',
            'dataset.eval_samples=8',
            'dataset.image_size=8',
            'dataset.batch_size=8',
            'dataset.num_workers=0',
            'max_duration=2ep',
            f'save_folder={tmp_path}',
            'autoresume=false',
            'progress_bar=false',
            'device=cpu',
        ],
    )
    trainer = build_trainer(recipe)
    assert torch.equal(trainer.state.model.module.features[1].conv[0][0].weight, published['features.1.conv.0.0.weight'])
    rates = []
    trainer.state.callbacks[0].batch_start = lambda state, logger: rates.append(state.optimizers[0].param_groups[0]['lr'])
    trainer.fit()
    trainer.close()
    # A quarter of the cosine a batch; Composer sets the rate before it counts the batch, so it comes one batch late
    assert rates == pytest.approx([3e-4, 3e-4, 3e-4 * (1 + 0.5**0.5) / 2, 1.5e-4])
