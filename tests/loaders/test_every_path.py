"""The same plan gives the same samples on every path, and the same evaluation."""

import importlib.util
from pathlib import Path

import pytest
import torch
from composer import Trainer
from composer.models import ComposerClassifier
from torch.utils.data import DataLoader

from composer_effalgos import InfoBatch
from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.convert import convert
from composer_effalgos.loaders import DeviceDataLoader, FfcvDataLoader
from composer_effalgos.plan import BatchReader, PlannedDataLoader, plan_epoch, resume_epoch

LIMIT = 90
NEEDS = {'mds': 'streaming', 'beton': 'ffcv', 'ffcv': 'ffcv', 'device': None}


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('converted')
    for kind, package in {'mds': 'streaming', 'ffcv': 'ffcv'}.items():
        if importlib.util.find_spec(package):
            convert('digits', [f'limit={LIMIT}'], kind, out, shard_bytes=5000)
    return out


@pytest.fixture(scope='module')
def made() -> dict:
    """Loaders made so far: ffcv compiles for each one anew."""
    return {}


@pytest.fixture(params=NEEDS)
def make_path(request, folder, made):
    """Makes the loader of a split on one path."""
    name = request.param
    if NEEDS[name] is not None:
        pytest.importorskip(NEEDS[name], reason=f'needs {NEEDS[name]}; see the Makefile')

    def make(split: str, batch_size: int) -> DataLoader:
        train = split == 'train'
        if name == 'device':
            return DeviceDataLoader(plain(split, batch_size).dataset, batch_size=batch_size, shuffle=train)
        dataset = build_dataset('beton' if name == 'ffcv' else name, split, path=str(folder))
        if name == 'ffcv':
            return FfcvDataLoader(dataset, batch_size=batch_size, shuffle=train, num_workers=2)
        return DataLoader(dataset, batch_size=batch_size, shuffle=train, num_workers=1)

    def get(split: str, batch_size: int = 6) -> DataLoader:
        key = name, split, batch_size
        if key not in made:
            made[key] = make(split, batch_size)
        return made[key]

    return get


def plain(split: str, batch_size: int = 6) -> DataLoader:
    dataset = build_dataset('digits', split, **({'limit': LIMIT} if split == 'train' else {}))
    return DataLoader(dataset, batch_size=batch_size, shuffle=split == 'train')


@pytest.mark.parametrize('world_size', [1, 2])
def test_the_same_samples_at_any_rank_and_after_a_resume(make_path, world_size):
    plan = plan_epoch(torch.arange(7, LIMIT), None, 6, seed=3, epoch=2, world_size=world_size)
    rest = resume_epoch(plan, batches=2, batch_size=6, world_size=world_size)
    path = make_path('train')

    def read(loader, rank, plan):
        planned = PlannedDataLoader(loader, seed=3, rank=rank, world_size=world_size)
        planned.set_plan(plan, 2)
        return list(planned)

    for rank in range(world_size):
        batches, expected = read(path, rank, plan), read(plain('train'), rank, plan)
        assert [labels.tolist() for _, labels in batches] == [labels.tolist() for _, labels in expected]
        if not isinstance(path, BatchReader):  # by worker processes: augmented alike, whatever the samples are stored in
            assert all(torch.equal(images, others) for (images, _), (others, _) in zip(batches, expected, strict=True))
        resumed = read(path, rank, rest)
        assert resumed[:2] == [None, None]
        for batch, again in zip(batches[2:], resumed[2:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))  # augmentation too


def test_the_same_images_to_evaluate(make_path):
    images, labels = (torch.cat(part) for part in zip(*make_path('eval', 90), strict=True))
    expected, classes = (torch.cat(part) for part in zip(*plain('eval', 90), strict=True))
    assert torch.equal(labels, classes)
    assert torch.equal(images, expected)


def run(make_path, folder: Path, name: str, **arguments) -> Trainer:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    trainer = Trainer(
        model=ComposerClassifier(network, num_classes=10),
        train_dataloader=make_path('train'),
        eval_dataloader=make_path('eval', 90),
        optimizers=torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9),
        max_duration='3ep',
        algorithms=[InfoBatch(0.5, 1.0)],
        device='cpu',
        seed=4,
        progress_bar=False,
        run_name=name,
        save_folder=str(folder / name),
        save_filename='ba{batch}.pt',
        save_interval='7ba',
        save_num_checkpoints_to_keep=-1,
        **arguments,
    )
    trainer.fit()
    return trainer


def test_a_training_resumed_within_an_epoch_ends_as_if_it_had_not_stopped(make_path, tmp_path):
    whole = run(make_path, tmp_path, 'whole')
    saved = sorted(int(file.stem[2:]) for file in (tmp_path / 'whole').glob('ba*.pt'))
    within = next(batch for batch in saved if batch > 15)  # an epoch of all samples has 15 batches
    resumed = run(make_path, tmp_path, 'resumed', load_path=str(tmp_path / 'whole' / f'ba{within}.pt'))
    assert int(resumed.state.timestamp.batch) == int(whole.state.timestamp.batch)
    assert int(resumed.state.timestamp.sample) == int(whole.state.timestamp.sample) < 3 * LIMIT
    for name, value in whole.state.model.state_dict().items():
        assert torch.equal(value, resumed.state.model.state_dict()[name])
    accuracies = [trainer.state.eval_metrics['eval']['MulticlassAccuracy'].compute() for trainer in (whole, resumed)]
    assert accuracies[0] == accuracies[1]
