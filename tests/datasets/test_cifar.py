from __future__ import annotations

import pickle
import urllib.error
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.cifar import _CIFAR10, _CIFAR100
from composer_effalgos.utils.errors import InputError


def _pixels(image: torch.Tensor, kind: object = _CIFAR10) -> np.ndarray:
    """Back to uint8 [H, W, 3]."""
    return np.rint((image.permute(1, 2, 0).numpy() * kind.std + kind.mean) * 255).astype(np.uint8)


@pytest.fixture
def parquet_folder(tmp_path: Path, pixels: Callable, write_parquet: Callable) -> tuple[Path, np.ndarray, np.ndarray]:
    train, test = pixels(11), pixels(5, seed=1)
    write_parquet(tmp_path / 'train.parquet', train, np.arange(11) % 10, metadata={'classes': ','.join('abcdefghij')})
    write_parquet(tmp_path / 'test.parquet', test, [9, 8, 7, 6, 5])
    return tmp_path, train, test


@pytest.fixture
def torchvision_folder(tmp_path: Path, pixels: Callable, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 and CIFAR-100 as torchvision stores them, with 2 images a batch file and without its check of the real files' hashes."""
    monkeypatch.setattr(torchvision.datasets.cifar, 'check_integrity', lambda *_: True)
    for kind in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
        folder = tmp_path / kind.base_folder
        folder.mkdir()
        names = [name for name, _ in kind.train_list + kind.test_list]
        for index, name in enumerate(names):
            rows = pixels(2, seed=index).transpose(0, 3, 1, 2).reshape(2, -1)
            label_key = 'fine_labels' if kind is torchvision.datasets.CIFAR100 else 'labels'
            (folder / name).write_bytes(pickle.dumps({'data': rows, label_key: [index, index + 1]}))
        key = kind.meta['key']
        (folder / kind.meta['filename']).write_bytes(pickle.dumps({key: [f'{key}_{index}' for index in range(_classes(kind))]}))
    return tmp_path


def _classes(kind: type) -> int:
    return 100 if kind is torchvision.datasets.CIFAR100 else 10


def test_parquet_is_read_pixel_for_pixel(parquet_folder: tuple) -> None:
    folder, train, test = parquet_folder
    for split, options, images, labels in [
        ('train', {'augment': False}, train, [*range(10), 0]),
        ('eval', {}, test, [9, 8, 7, 6, 5]),
    ]:
        dataset = build_dataset('cifar10', split, path=str(folder), **options)
        assert dataset.targets.tolist() == labels
        assert dataset.classes == list('abcdefghij')
        assert np.array_equal([_pixels(image) for image, _ in dataset], images)


def test_cifar100_has_100_classes_whatever_the_labels(parquet_folder: tuple, write_parquet: Callable) -> None:
    with pytest.raises(InputError, match=r'train\.parquet: its schema names 10 classes; expected 100 for cifar100'):
        build_dataset('cifar100', 'train', path=str(parquet_folder[0]))
    write_parquet(parquet_folder[0] / 'train.parquet', parquet_folder[1], range(11))
    dataset = build_dataset('cifar100', 'train', path=str(parquet_folder[0]), augment=False)
    assert dataset.num_classes == len(set(dataset.classes)) == 100
    assert np.array_equal(_pixels(dataset[0][0], _CIFAR100), parquet_folder[1][0])


@pytest.mark.parametrize(('name', 'kind'), [('cifar10', torchvision.datasets.CIFAR10), ('cifar100', torchvision.datasets.CIFAR100)])
def test_torchvisions_files_are_read_as_torchvision_does(name: str, kind: type, torchvision_folder: Path) -> None:
    for split in ('train', 'eval'):
        dataset = build_dataset(name, split, path=str(torchvision_folder), **({'augment': False} if split == 'train' else {}))
        expected = kind(torchvision_folder, train=split == 'train')
        assert np.array_equal(dataset.images, expected.data)
        assert dataset.targets.tolist() == expected.targets
        assert dataset.classes == expected.classes
        mean, std = (
            np.array(value) for value in ((_CIFAR10, _CIFAR100)[name == 'cifar100'].mean, (_CIFAR10, _CIFAR100)[name == 'cifar100'].std)
        )
        torch.testing.assert_close(dataset[1][0], torch.tensor((expected.data[1] / 255 - mean) / std).permute(2, 0, 1).float())


def test_other_image_sizes_resize(parquet_folder: tuple) -> None:
    for size in (16, 48):
        dataset = build_dataset('cifar10', 'train', path=str(parquet_folder[0]), image_size=size)
        assert dataset[0][0].shape == (3, size, size)


def test_rows_beyond_the_limit_are_not_decoded(parquet_folder: tuple, write_parquet: Callable) -> None:
    folder, train, _ = parquet_folder
    good = build_dataset('cifar10', 'train', path=str(folder), augment=False, limit=4)
    kept = {image.tobytes() for image in good.images}
    write_parquet(folder / 'train.parquet', [image if image.tobytes() in kept else b'broken' for image in train], np.arange(11) % 10)
    again = build_dataset('cifar10', 'train', path=str(folder), augment=False, limit=4)
    assert np.array_equal(good.images, again.images)
    with pytest.raises(InputError, match=r'train\.parquet: row \d+: corrupt image'):
        build_dataset('cifar10', 'train', path=str(folder))


def test_a_folder_without_cifar_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / 'other').mkdir()
    with pytest.raises(InputError, match=r'train\.parquet and test\.parquet.*cifar-10-batches-py.*download: true.* for cifar10, got'):
        build_dataset('cifar10', 'train', path=str(tmp_path))


def test_a_download_that_fails_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError('no network')

    monkeypatch.setattr(torchvision.datasets.cifar, 'download_and_extract_archive', refuse)
    with pytest.raises(InputError, match=r'expected a folder .* for cifar10, got .*no network'):
        build_dataset('cifar10', 'train', path=str(tmp_path / 'new'), download=True)
    with pytest.raises(InputError, match=r'expected a folder .* for cifar10, got none'):
        build_dataset('cifar10', 'train', download=True)


@pytest.mark.parametrize(
    ('images', 'labels', 'metadata', 'message'),
    [
        ([b'nonsense'], [0], None, r'train\.parquet: row 0: corrupt image'),
        ([None], [0], None, r'train\.parquet: row 0: no image bytes'),
        (None, [10], None, r'train\.parquet: row 0: label 10; expected a class index from 0 to 9'),
        (None, [-1], None, r'train\.parquet: row 0: label -1'),
        (None, [0], {'classes': ','.join(map(str, range(11)))}, r'train\.parquet: its schema names 11 classes; expected 10'),
    ],
)
def test_bad_rows_are_named(
    images: list | None, labels: list, metadata: dict | None, message: str, tmp_path: Path, pixels: Callable, write_parquet: Callable
) -> None:
    write_parquet(tmp_path / 'train.parquet', pixels(1) if images is None else images, labels, metadata=metadata)
    write_parquet(tmp_path / 'test.parquet', pixels(1), [0])
    with pytest.raises(InputError, match=message):
        build_dataset('cifar10', 'train', path=str(tmp_path))


def test_images_of_another_size_are_named(tmp_path: Path, pixels: Callable, write_parquet: Callable) -> None:
    write_parquet(tmp_path / 'train.parquet', [*pixels(2), *pixels(1, 30, 28)], [0, 1, 2])
    write_parquet(tmp_path / 'test.parquet', pixels(1), [0])
    with pytest.raises(InputError, match=r'row 2: image of 28x30 pixels; expected 32x32'):
        build_dataset('cifar10', 'train', path=str(tmp_path))
