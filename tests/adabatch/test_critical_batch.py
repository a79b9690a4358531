import datetime
import json

import pytest
import torch

from composer_effalgos import InputError
from composer_effalgos.adabatch import critical_batch
from composer_effalgos.adabatch.critical_batch import Branch, critical_size, measure
from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.schema import load_recipe


@pytest.fixture
def recipe(tmp_path):
    """Trains a tiny network on noise in batches of 16; a checkpoint after its first epoch."""
    path = tmp_path / 'small.yaml'
    path.write_text(
        'max_duration: 4ep\n'
        'dataset: {name: synthetic, batch_size: 16, num_samples: 192, num_classes: 3, image_size: 8}\n'
        'model: {name: resnet20_cifar}\n'
        'optimizer: {name: adamw, lr: 0.01}\n'
        'scheduler: {name: cosine_annealing}\n'
        'progress_bar: false\n'
        f'save_folder: {tmp_path / "runs"}\n'
    )
    return load_recipe(path, [])


def branch(size, loss):
    return Branch(size, loss, 1, 1.0)


@pytest.mark.parametrize(
    ('losses', 'expected'),
    [
        ([1.0, 1.0, 1.0], 40),
        ([1.0, 1.02, 1.0], 10),  # not within the tolerance: that of a larger one is chance
        ([1.0, 1.01, 1.3], 20),
        ([1.0, 0.5, float('nan')], 20),
        ([1.0, float('inf'), 1.0], 10),
    ],
)
def test_the_last_size_that_costs_nothing(losses, expected):
    assert critical_size([branch(10 * 2**k, loss) for k, loss in enumerate(losses)], 0.0101) == expected


class Losses(critical_batch.Callback):
    def __init__(self):
        self.seen = []

    def batch_end(self, state, logger):
        self.seen.append((len(state.batch[1]), float(state.total_loss_dict['loss/train/total'])))


def test_branches_train_what_a_run_of_that_size_trains(recipe, tmp_path, monkeypatch):
    """Each loss is the mean over the second half of the window's samples; a second call trains nothing."""
    watches = []

    def watched(given):
        trainer = build_trainer(given)
        watches.append(Losses())
        trainer.state.callbacks.append(watches[-1])
        return trainer

    monkeypatch.setattr(critical_batch, 'build_trainer', watched)
    said = []
    out = tmp_path / 'out'
    found = measure(recipe, out, window='1ep', sizes=[32, 16, 96], tolerance=0.0, progress=said.append)
    numbers = json.loads((out / 'critical_batch.json').read_text())
    assert [one['size'] for one in numbers['branches']] == [16, 32, 96]
    assert [one['steps'] for one in numbers['branches']] == [12, 6, 2]
    for one, watch in zip(numbers['branches'], watches, strict=True):
        assert [size for size, _ in watch.seen] == [one['size']] * one['steps']
        half = [loss for _, loss in watch.seen[len(watch.seen) // 2 :]]
        assert one['loss'] == pytest.approx(sum(half) / len(half))
    assert found == numbers['critical_batch_size']
    assert len(said) == 3
    assert (out / 'critical_batch.svg').read_text().startswith('<?xml')
    assert '| 12 |' in (out / 'critical_batch.md').read_text()

    monkeypatch.setattr(critical_batch, 'build_trainer', lambda given: pytest.fail('trained again'))
    assert measure(recipe, out, window='1ep', sizes=[16, 32, 96], tolerance=100.0, progress=said.append) == 96
    with pytest.raises(InputError, match=r'holds branches of another recipe, checkpoint, window or lr'):
        measure(recipe, out, window='2ep', sizes=[16, 32])
    (out / 'size32' / 'branch.json').write_text('{')
    with pytest.raises(InputError, match=r'branch.json: expected a finished branch'):
        measure(recipe, out, window='1ep', sizes=[16, 32])


def test_branches_off_a_checkpoint(recipe, tmp_path):
    """From the end of the second epoch on, under the schedule of the whole run, with the square root for AdamW."""
    recipe.trainer['save_interval'] = '1ep'
    recipe.trainer['save_filename'] = 'ep{epoch}.pt'
    trainer = build_trainer(recipe)
    trainer.fit()
    trainer.close()
    checkpoint = recipe.run_folder / 'checkpoints' / 'ep2.pt'
    saved = torch.load(checkpoint, weights_only=False)
    saved['state']['timestamp']['Timestamp']['total_wct'] = datetime.timedelta(hours=1)
    torch.save(saved, checkpoint)
    rates = []
    watch = critical_batch.Window.batch_end

    def noting(self, state, logger):
        rates.append((int(state.timestamp.epoch), len(state.batch[1]), state.optimizers[0].param_groups[0]['lr']))
        watch(self, state, logger)

    critical_batch.Window.batch_end = noting
    try:
        measure(recipe, tmp_path / 'out', checkpoint=checkpoint, window='96sp', sizes=[16, 64], progress=lambda line: None)
    finally:
        critical_batch.Window.batch_end = watch
    assert [(epoch, size) for epoch, size, _ in rates] == [(2, 16)] * 6 + [(2, 64)] * 2
    branches = json.loads((tmp_path / 'out' / 'critical_batch.json').read_text())['branches']
    assert all(0 < one['seconds'] < 3600 for one in branches)  # without the run before
    assert 0.004 < rates[0][2] < 0.0055  # half way down the cosine
    assert rates[6][2] == pytest.approx(2 * rates[0][2], rel=0.1)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'window': '10ba'}, r'^--window: expected a positive time in one of the units'),
        ({'sizes': [16]}, r'^--size: expected at least two batch sizes'),
        ({'sizes': [0, 16]}, r'^--size: expected at least two batch sizes'),
        ({'tolerance': -1}, r'^--tolerance: '),
        ({'lr': 'cubic', 'sizes': [16, 32]}, r"--size: lr: expected one of 'none'"),
        ({'sizes': [16, 193]}, r'schedule: size 1: expected at most 192'),
        ({'window': '5ep', 'sizes': [16, 32]}, r'^--window: expected one that fits into the rest of the run, got 5ep'),
    ],
)
def test_refuses(recipe, tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        measure(recipe, tmp_path / 'out', progress=lambda line: None, **arguments)


def test_refuses_a_checkpoint_that_is_not_there(recipe, tmp_path):
    with pytest.raises(InputError, match=r'^--checkpoint: .*none.pt: expected a checkpoint, got none'):
        measure(recipe, tmp_path / 'out', checkpoint=tmp_path / 'none.pt')
