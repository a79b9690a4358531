from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from composer_effalgos.datasets import DATASETS, build_dataset
from composer_effalgos.datasets.convert import convert
from composer_effalgos.datasets.registry import LABELLED_TEXT, TEXT
from composer_effalgos.utils.errors import InputError

IMAGES = [name for name in DATASETS if name not in (*TEXT, *LABELLED_TEXT)]


@pytest.fixture
def every_dataset(
    request: pytest.FixtureRequest, tmp_path: Path, pixels: Callable, write_parquet: Callable, write_folder: Callable
) -> dict[str, dict[str, object]]:
    """Arguments with which each data set of images builds."""
    write_parquet(tmp_path / 'train.parquet', pixels(7), [0, 1, 2, 0, 1, 2, 0])
    write_parquet(tmp_path / 'test.parquet', pixels(3, seed=1), [2, 1, 0])
    write_folder(tmp_path / 'train', {'cat': pixels(3, 20), 'dog': pixels(4, 20, 30)})
    write_folder(tmp_path / 'val', {'cat': pixels(1, 20), 'dog': pixels(2, 20, 30)})
    path = str(tmp_path)
    for name, (kind, package) in {'beton': ('ffcv', 'ffcv'), 'mds': ('mds', 'streaming')}.items():
        if getattr(request.node, 'callspec', None) is not None and request.node.callspec.params.get('name') == name:
            pytest.importorskip(package, reason=f'needs {package}; see the Makefile')
            convert('image_folder', [f'path={path}'], kind, tmp_path / name)
    return {
        'beton': {'path': str(tmp_path / 'beton'), 'image_size': 16},
        'mds': {'path': str(tmp_path / 'mds'), 'image_size': 16},
        'digits': {},
        'cifar10': {'path': path},
        'cifar100': {'path': path},
        'image_folder': {'path': path, 'image_size': 16},
        'image_parquet': {'path': path, 'image_size': 16},
        'synthetic': {'num_samples': 7, 'eval_samples': 3},
    }


@pytest.mark.parametrize('split', ['train', 'eval'])
@pytest.mark.parametrize('name', IMAGES)
def test_every_dataset_keeps_the_contract(name: str, split: str, every_dataset: dict) -> None:
    dataset = build_dataset(name, split, **every_dataset[name])
    targets = torch.as_tensor(dataset.targets)
    assert targets.dtype == torch.int64
    assert targets.shape == (len(dataset),)
    assert len(dataset.classes) == dataset.num_classes > int(targets.max())
    for index in range(min(5, len(dataset))):
        image, label = dataset[index]
        assert image.dtype == torch.float32
        assert image.ndim == 3
        assert image.shape[0] == 3
        assert image.isfinite().all()
        assert type(label) is int
        assert label == targets[index]
    images, labels = next(iter(DataLoader(dataset, batch_size=3)))
    assert images.shape == (3, *dataset[0][0].shape)
    assert labels.tolist() == targets[:3].tolist()


@pytest.mark.parametrize('name', IMAGES)
def test_augmentation_draws_from_torchs_global_generator_alone(name: str, every_dataset: dict) -> None:
    dataset = build_dataset(name, 'train', **every_dataset[name])
    before = random.getstate(), np.random.get_state()[1].tolist()
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(torch.stack([dataset[index][0] for index in range(7)]))
    assert torch.equal(drawn[0], drawn[1])
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


@pytest.mark.parametrize('name', sorted(set(IMAGES) - {'synthetic'}))
def test_augment_false_and_eval_are_deterministic_and_augment_is_not(name: str, every_dataset: dict) -> None:
    plain = build_dataset(name, 'train', augment=False, **every_dataset[name])
    random_state = torch.get_rng_state()
    assert torch.equal(plain[1][0], plain[1][0])
    evaluated = build_dataset(name, 'eval', **every_dataset[name])
    assert torch.equal(evaluated[1][0], evaluated[1][0])
    assert torch.equal(random_state, torch.get_rng_state())
    augmented = build_dataset(name, 'train', **every_dataset[name])
    assert any(not torch.equal(augmented[1][0], plain[1][0]) for _ in range(20))


@pytest.mark.parametrize('name', sorted(set(IMAGES) - {'synthetic'}))
def test_limit_takes_nested_training_subsets(name: str, every_dataset: dict) -> None:
    full = build_dataset(name, 'train', augment=False, **every_dataset[name])
    everything = [full[index] for index in range(len(full))]

    def rows(limit: int) -> list[int]:
        part = build_dataset(name, 'train', augment=False, limit=limit, **every_dataset[name])
        assert len(part) == limit == len(part.targets)
        found = []
        for index in range(limit):
            image, label = part[index]
            assert label == part.targets[index]
            matching = [row for row, (other, target) in enumerate(everything) if target == label and torch.equal(other, image)]
            assert matching
            found.append(matching[0])
        return found

    small, large = rows(3), rows(5)
    assert small == sorted(small)
    assert len(set(large)) == 5
    assert set(small) < set(large)
    assert len(build_dataset(name, 'eval', limit=3, **every_dataset[name])) == len(build_dataset(name, 'eval', **every_dataset[name]))


@pytest.mark.parametrize('limit', [0, -1, 10**6])
@pytest.mark.parametrize('name', sorted(set(IMAGES) - {'synthetic'}))
def test_limit_out_of_range_is_refused(name: str, limit: int, every_dataset: dict) -> None:
    with pytest.raises(InputError, match=r'dataset\.limit'):
        build_dataset(name, 'train', limit=limit, **every_dataset[name])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'name': 'cifr10', 'split': 'train'}, r"dataset\.name: .*'cifr10'.*'cifar10'"),
        ({'name': 'nothing_like_it', 'split': 'train'}, 'known: .*synthetic'),
        ({'name': 'digits', 'split': 'test'}, "'eval', got 'test'"),
        ({'name': 'digits', 'split': 'train', 'agument': True}, r"dataset\.agument.*'augment'"),
        ({'name': 'digits', 'split': 'train', 'flip': True}, r'dataset\.flip: unknown'),
        ({'name': 'digits', 'split': 'train', 'augment': 'yes'}, r'dataset\.augment: expected true or false'),
        ({'name': 'digits', 'split': 'train', 'image_size': 0}, r'dataset\.image_size: expected a number in \[1, 8192\]'),
        ({'name': 'digits', 'split': 'train', 'image_size': 8.5}, r'dataset\.image_size: expected an integer'),
        ({'name': 'synthetic', 'split': 'train', 'num_samples': 0}, r'dataset\.num_samples: expected a number in \[1, 1e.08\]'),
        ({'name': 'synthetic', 'split': 'train', 'noise': -1.0}, r'dataset\.noise: expected a number in \[0, 1e.06\]'),
        ({'name': 'synthetic', 'split': 'train', 'seed': -1}, r'dataset\.seed: expected a number in \[0'),
        ({'name': 'synthetic', 'split': 'train', 'num_classes': 10**11}, r'num_classes: expected .* 1048576\], got 100000000000$'),
        ({'name': 'synthetic', 'split': 'train', 'num_samples': 10**14}, r'num_samples: expected .*, got 100000000000000$'),
        ({'name': 'synthetic', 'split': 'eval', 'eval_samples': 10**14}, r'eval_samples: expected .*, got 100000000000000$'),
        ({'name': 'synthetic', 'split': 'train', 'image_size': 10**6}, r'image_size: expected .*, got 1000000$'),
        ({'name': 'synthetic', 'split': 'train', 'noise': 1e38}, r'noise: expected .*, got 1e\+38$'),
        ({'name': 'synthetic', 'split': 'train', 'seed': 10**30}, r'seed: expected .*, got 10{30}$'),
        ({'name': 'cifar10', 'split': 'train'}, r'dataset\.path: expected a folder .* for cifar10, got none'),
        ({'name': 'image_folder', 'split': 'train'}, r'dataset\.path: expected a folder .* for image_folder, got none'),
        ({'name': 'image_parquet', 'split': 'train'}, r'dataset\.path: expected a folder .* for image_parquet, got none'),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_dataset(**arguments)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'image_folder', 'image_parquet'])
def test_missing_and_empty_folders_are_refused_by_path(name: str, tmp_path: Path) -> None:
    for path, message in [(tmp_path / 'nowhere', 'which is not a folder'), (tmp_path, 'which is empty')]:
        with pytest.raises(InputError, match=message) as caught:
            build_dataset(name, 'train', path=str(path))
        assert str(path) in str(caught.value)
        assert 'dataset.path: expected a folder' in str(caught.value)
