from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms._presets import ImageClassification

from composer_effalgos.datasets import build_dataset
from composer_effalgos.utils.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, pixels: Callable, write_folder: Callable) -> Path:
    write_folder(tmp_path / 'train', {'ant': pixels(2, 40), 'bee': pixels(3, 40, 50), 'cow': pixels(1, 60, 40)})
    write_folder(tmp_path / 'val', {'bee': pixels(2, 40, seed=1), 'cow': pixels(1, 40, seed=2)})  # no ants to evaluate on
    return tmp_path


def test_labels_follow_the_training_folders_in_both_splits(folder: Path) -> None:
    train, evaluation = (build_dataset('image_folder', split, path=str(folder), image_size=32) for split in ('train', 'eval'))
    assert train.classes == evaluation.classes == ['ant', 'bee', 'cow']
    assert train.targets.tolist() == [0, 0, 1, 1, 1, 2]
    assert evaluation.targets.tolist() == [1, 1, 2]  # torchvision alone would say 0, 0, 1
    assert [label for _, label in evaluation] == [1, 1, 2]


def test_evaluation_images_are_torchvisions_preset(folder: Path) -> None:
    evaluation = build_dataset('image_folder', 'eval', path=str(folder), image_size=28)
    expected = ImageClassification(crop_size=28, resize_size=32)(Image.open(folder / 'val' / 'cow' / '000.png'))
    torch.testing.assert_close(evaluation[2][0], expected)


def test_padding_keeps_the_whole_image(folder: Path) -> None:
    options = {'path': str(folder), 'image_size': 24, 'padding': 3}
    plain, evaluation = (build_dataset('image_folder', 'train', augment=False, **options), build_dataset('image_folder', 'eval', **options))
    assert {image.shape for data in (plain, evaluation) for image, _ in data} == {(3, 24, 24)}
    image, _ = plain[5]
    seen = set()
    padded = torch.nn.functional.pad(image, (3, 3, 3, 3), mode='reflect')
    augmented = build_dataset('image_folder', 'train', **options)
    for _ in range(300):
        found, _ = augmented[5]
        for flip, whole in enumerate((padded, padded.flip(-1))):
            seen |= {(y, x, flip) for y in range(7) for x in range(7) if torch.equal(found, whole[:, y : y + 24, x : x + 24])}
    assert len(seen) > 80  # of 98


def test_padding_out_of_range(folder: Path) -> None:
    with pytest.raises(InputError, match='padding: expected less than image_size 8'):
        build_dataset('image_folder', 'train', path=str(folder), image_size=8, padding=8)


def test_training_images_have_the_size_asked_for(folder: Path) -> None:
    train = build_dataset('image_folder', 'train', path=str(folder), image_size=24)
    assert {image.shape for image, _ in train} == {(3, 24, 24)}


def test_a_corrupt_image_is_named(folder: Path) -> None:
    broken = folder / 'train' / 'bee' / '001.png'
    broken.write_bytes(broken.read_bytes()[:300])
    dataset = build_dataset('image_folder', 'train', path=str(folder), image_size=16)
    with pytest.raises(InputError, match=r'bee/001\.png: corrupt image'):
        list(dataset)


def test_a_file_that_has_gone_is_named(folder: Path) -> None:
    dataset = build_dataset('image_folder', 'train', path=str(folder), image_size=16)
    (folder / 'train' / 'ant' / '000.png').unlink()
    with pytest.raises(InputError, match=r'ant/000\.png: cannot be read \(No such file'):
        dataset[0]


def test_class_folders_of_the_splits_must_agree(folder: Path) -> None:
    (folder / 'val' / 'cows').mkdir()
    with pytest.raises(InputError, match=r"val/cows: no such class.*did you mean 'cow'"):
        build_dataset('image_folder', 'eval', path=str(folder))


@pytest.mark.parametrize(
    ('split', 'prepare', 'message'),
    [
        ('train', lambda path: (path / 'val').mkdir(), r'train, which is not a folder'),
        ('eval', lambda path: (path / 'train' / 'ant').mkdir(parents=True), r'val, which is not a folder'),
        ('train', lambda path: (path / 'train').mkdir(), r'train, which is empty'),
        ('train', lambda path: (path / 'train' / 'ant').mkdir(parents=True), r'Found no valid file for the classes ant'),
        (
            'eval',
            lambda path: [(path / split / 'ant').mkdir(parents=True) for split in ('train', 'val')],
            r'val: no images in its class folders',
        ),
    ],
)
def test_incomplete_folders_are_refused(split: str, prepare: Callable, message: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        build_dataset('image_folder', split, path=str(tmp_path))
    assert '\n' not in str(caught.value)


def test_loose_files_instead_of_class_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / 'image.png').write_bytes(b'')
    with pytest.raises(InputError, match='one folder of images per class'):
        build_dataset('image_folder', 'train', path=str(tmp_path))
