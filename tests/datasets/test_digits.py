from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.digits import MEAN, STD


def _grey(image: torch.Tensor) -> np.ndarray:
    """Back to scikit-learn's 0..16."""
    return np.rint(((image * STD[0] + MEAN[0]) * 16).numpy()).astype(int)


def test_the_two_splits_are_scikit_learns_images_once_each() -> None:
    data = load_digits()
    found = []
    for split, count in [('train', 1437), ('eval', 360)]:
        dataset = build_dataset('digits', split, augment=False)
        assert len(dataset) == count
        for image, label in dataset:
            grey = _grey(image)
            assert (grey == grey[0]).all()  # three equal channels
            found.append((label, *grey[0].flatten()))
    assert sorted(found) == sorted((label, *image.astype(int).flatten()) for label, image in zip(data.target, data.images, strict=True))


def test_splits_are_stratified_and_fixed() -> None:
    share = np.bincount(load_digits().target) / 1797
    for split in ('train', 'eval'):
        dataset = build_dataset('digits', split)
        counts = np.bincount(dataset.targets.numpy())
        assert np.abs(counts - share * len(dataset)).max() <= 1
    # Another split would change published numbers
    assert build_dataset('digits', 'train').targets[:10].tolist() == [3, 9, 1, 3, 1, 9, 4, 4, 2, 8]


def test_augmented_digits_are_shifts_by_at_most_a_pixel() -> None:
    plain, shifted = (build_dataset('digits', 'train', augment=augment) for augment in (False, True))
    seen = set()
    torch.manual_seed(0)
    for index in range(60):
        padded = np.pad(_grey(plain[index][0])[0], 1)
        shifts = {(dy, dx): padded[dy : dy + 8, dx : dx + 8] for dy in range(3) for dx in range(3)}
        image = _grey(shifted[index][0])[0]
        matching = [shift for shift, expected in shifts.items() if np.array_equal(image, expected)]
        assert matching
        seen.add(matching[0])
    assert len(seen) == 9


def test_training_images_are_normalised() -> None:
    images = torch.stack([image for image, _ in build_dataset('digits', 'train', augment=False)])
    assert images.mean().item() == pytest.approx(0, abs=5e-3)
    assert images.std().item() == pytest.approx(1, abs=5e-3)


def test_other_sizes_keep_the_digits_readable() -> None:
    train, evaluation = (
        build_dataset('digits', split, image_size=16, **options) for split, options in [('train', {'augment': False}), ('eval', {})]
    )
    assert train[0][0].shape == (3, 16, 16)
    model = KNeighborsClassifier(1).fit([image[0].flatten().numpy() for image, _ in train], train.targets)
    assert model.score([image[0].flatten().numpy() for image, _ in evaluation], evaluation.targets) > 0.95
