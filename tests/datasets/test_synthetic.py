from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from composer_effalgos.datasets import build_dataset


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**40), index=st.integers(0, 999), size=st.integers(1, 20), split=st.sampled_from(['train', 'eval']))
def test_a_sample_is_a_pure_function_of_seed_split_and_index(seed: int, index: int, size: int, split: str) -> None:
    options = {'seed': seed, 'image_size': size}
    state = torch.get_rng_state()
    short, long = (build_dataset('synthetic', split, num_samples=count, eval_samples=count, **options) for count in (1000, 10**8))
    short[0]  # an access before must not matter
    (image, label), (other, other_label) = short[index], long[index]
    assert torch.equal(image, other)
    assert image.shape == (3, size, size)
    assert label == other_label == index % 10
    assert torch.equal(state, torch.get_rng_state())


def test_seeds_splits_and_indices_give_different_noise() -> None:
    images = [
        build_dataset('synthetic', split, seed=seed, num_classes=1)[index][0]
        for split in ('train', 'eval')
        for seed in (0, 1)
        for index in (0, 1)
    ]
    assert all(not torch.allclose(first, second) for i, first in enumerate(images) for second in images[:i])


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    small, large = (len(pickle.dumps(build_dataset('synthetic', 'train', num_samples=count))) for count in (10, 10**8))
    assert large - small < 16


def test_without_noise_a_class_is_one_pattern_in_both_splits() -> None:
    train, evaluation = (build_dataset('synthetic', split, noise=0.0, num_classes=3) for split in ('train', 'eval'))
    assert torch.equal(train[1][0], train[4][0])
    assert torch.equal(train[1][0], evaluation[1][0])
    assert not torch.allclose(train[1][0], train[2][0])


def test_noise_has_the_strength_asked_for() -> None:
    clean, noisy = (build_dataset('synthetic', 'train', noise=noise, num_classes=4) for noise in (0.0, 3.0))
    residual = torch.stack([noisy[index][0] * 10**0.5 - clean[index][0] for index in range(200)])  # sqrt(1 + 3^2)
    assert residual.mean().item() == pytest.approx(0, abs=0.02)
    assert residual.std().item() == pytest.approx(3, rel=0.01)


def test_classes_can_be_learned_and_are_not_trivial() -> None:
    train, evaluation = (
        build_dataset('synthetic', split, num_samples=500, eval_samples=500, noise=8.0, seed=5) for split in ('train', 'eval')
    )
    images, labels = next(iter(DataLoader(train, batch_size=500)))
    means = torch.stack([images[labels == label].mean(0).flatten() for label in range(10)])
    images, labels = next(iter(DataLoader(evaluation, batch_size=500)))
    accuracy = (torch.cdist(images.flatten(1), means).argmin(1) == labels).float().mean()
    assert 0.5 < accuracy < 1


def test_iteration_ends() -> None:
    assert [label for _, label in build_dataset('synthetic', 'train', num_samples=4, num_classes=3)] == [0, 1, 2, 0]
