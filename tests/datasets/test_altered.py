from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.altered import long_tail, noisy_labels
from composer_effalgos.utils.errors import InputError

CIFAR = torch.arange(50_000) % 10


def test_the_sizes_are_those_of_cifar_10_lt() -> None:
    kept = long_tail(CIFAR, 10, 100, seed=0)
    sizes = torch.bincount(CIFAR[kept], minlength=10).tolist()
    assert sizes == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]  # as in the public code of Cui et al.
    assert torch.equal(kept, kept.unique())
    assert set(long_tail(CIFAR, 10, 200, seed=0).tolist()) < set(kept.tolist())
    assert not torch.equal(kept, long_tail(CIFAR, 10, 100, seed=1))
    assert torch.equal(long_tail(CIFAR, 10, 1, seed=0), torch.arange(50_000))


def test_wrong_labels_are_as_many_as_asked_for_and_uniform_over_the_other_classes() -> None:
    noisy = noisy_labels(CIFAR, 10, 0.4, seed=0)
    wrong = noisy != CIFAR
    assert wrong.sum() == 20_000
    # each of the 90 pairs expects 222.2; their chi-squared statistic has about 89 - 9 degrees of freedom
    pairs = torch.bincount(10 * CIFAR[wrong] + noisy[wrong], minlength=100).reshape(10, 10).double()
    assert pairs.diagonal().sum() == 0
    expected = pairs.sum(dim=1, keepdim=True) / 9
    off = ~torch.eye(10, dtype=torch.bool)
    assert 45 < (((pairs - expected) ** 2 / expected)[off]).sum() < 130
    assert torch.equal(noisy, noisy_labels(CIFAR, 10, 0.4, seed=0))
    assert (noisy != noisy_labels(CIFAR, 10, 0.4, seed=1)).sum() > 10_000


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 7), st.integers(0, 60), st.floats(0, 1), st.floats(1, 50), st.integers(0, 5))
def test_counts_hold_for_any_labels(classes: int, count: int, share: float, imbalance: float, seed: int) -> None:
    targets = torch.from_numpy(np.random.default_rng(seed).integers(0, classes, count))
    noisy = noisy_labels(targets, classes, share, seed)
    assert (noisy != targets).sum() == round(share * count)
    assert ((noisy >= 0) & (noisy < classes)).all()
    sizes = torch.bincount(targets[long_tail(targets, classes, imbalance, seed)], minlength=classes)
    assert (sizes <= torch.bincount(targets, minlength=classes)).all()
    assert (sizes <= count / classes * imbalance ** (-torch.arange(classes) / (classes - 1)) + 1e-5).all()


@pytest.fixture
def folder(tmp_path: Path, pixels: Callable, write_parquet: Callable) -> Path:
    write_parquet(tmp_path / 'train.parquet', pixels(40), np.arange(40) % 10)
    write_parquet(tmp_path / 'test.parquet', pixels(10, seed=1), np.arange(10))
    return tmp_path


def test_the_training_split_alone_is_altered(folder: Path) -> None:
    plain, altered = (
        {split: build_dataset('cifar10', split, path=str(folder), **options) for split in ('train', 'eval')}
        for options in ({}, {'label_noise': 0.4, 'imbalance': 4.0, 'label_seed': 3})
    )
    assert altered['eval'].targets.tolist() == plain['eval'].targets.tolist() == list(range(10))
    rows = long_tail(plain['train'].targets, 10, 4.0, 3)
    assert len(altered['train']) == len(rows) < 40
    assert np.array_equal(altered['train'].images, plain['train'].images[rows.numpy()])
    clean = plain['train'].targets[rows]
    assert torch.equal(altered['train'].targets, noisy_labels(clean, 10, 0.4, 3))
    assert (altered['train'].targets != clean).sum() == round(0.4 * len(rows))
    assert altered['train'][0][1] == int(altered['train'].targets[0])


@pytest.mark.parametrize(
    ('options', 'key'), [({'label_noise': 1.5}, 'label_noise'), ({'imbalance': 0.5}, 'imbalance'), ({'label_seed': -1}, 'label_seed')]
)
def test_options_out_of_range_are_named(folder: Path, options: dict, key: str) -> None:
    with pytest.raises(InputError, match=rf'dataset\.{key}'):
        build_dataset('cifar10', 'train', path=str(folder), **options)
