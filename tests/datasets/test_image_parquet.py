from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms._presets import ImageClassification

from composer_effalgos.datasets import build_dataset
from composer_effalgos.utils.errors import InputError

HUGGING_FACE = {'huggingface': json.dumps({'info': {'features': {'label': {'names': ['ant', 'bee', 'cow'], '_type': 'ClassLabel'}}}})}


@pytest.mark.parametrize('eval_file', ['test.parquet', 'val.parquet'])
@pytest.mark.parametrize('struct', [False, True])
def test_rows_are_decoded_as_torchvision_does(
    struct: bool, eval_file: str, tmp_path: Path, pixels: Callable, write_parquet: Callable
) -> None:
    train, test = [*pixels(9, 40), *pixels(1, 50, 60)], pixels(3, 45, 50, seed=1)
    write_parquet(tmp_path / 'train.parquet', train, np.arange(10) % 3, struct=struct)
    write_parquet(tmp_path / eval_file, test, [0, 0, 1], struct=struct)
    preset = ImageClassification(crop_size=28, resize_size=32)
    for split, options, images, labels in [('train', {'augment': False}, train, [0, 1, 2] * 3 + [0]), ('eval', {}, test, [0, 0, 1])]:
        dataset = build_dataset('image_parquet', split, path=str(tmp_path), image_size=28, **options)
        assert dataset.num_classes == 3
        assert dataset.targets.tolist() == labels
        for (image, label), expected, target in zip(dataset, images, labels, strict=True):
            assert label == target
            torch.testing.assert_close(image, preset(Image.fromarray(expected)))


@pytest.mark.parametrize(
    ('metadata', 'classes'),
    [
        (None, ['0', '1']),
        ({'classes': 'ant,bee,cow'}, ['ant', 'bee', 'cow']),
        (HUGGING_FACE, ['ant', 'bee', 'cow']),
        ({'huggingface': '{"info": {"features": {"label": {"_type": "Value"}}}}'}, ['0', '1']),
        ({'huggingface': '{"info": null}'}, ['0', '1']),
        ({'pandas': '{}'}, ['0', '1']),
    ],
)
def test_classes_come_from_the_training_file(
    metadata: dict | None, classes: list, tmp_path: Path, pixels: Callable, write_parquet: Callable
) -> None:
    write_parquet(tmp_path / 'train.parquet', pixels(2), [1, 0], metadata=metadata)
    write_parquet(tmp_path / 'test.parquet', pixels(1), [0])
    for split in ('train', 'eval'):
        assert build_dataset('image_parquet', split, path=str(tmp_path)).classes == classes


def test_columns_can_have_other_names(tmp_path: Path, pixels: Callable, encode: Callable) -> None:
    table = pa.table({'img': [encode(image) for image in pixels(2)], 'fine_label': pa.array([3, 1], pa.uint8()), 'label': ['x', 'y']})
    for name in ('train', 'test'):
        pq.write_table(table, tmp_path / f'{name}.parquet')
    dataset = build_dataset('image_parquet', 'train', path=str(tmp_path), image_column='img', label_column='fine_label')
    assert dataset.targets.tolist() == [3, 1]
    assert dataset[0][0].shape == (3, 224, 224)
    with pytest.raises(InputError, match=r"train\.parquet: column 'label' has type string; expected integer class indices"):
        build_dataset('image_parquet', 'train', path=str(tmp_path), image_column='img')
    with pytest.raises(InputError, match=r"train\.parquet: no column 'images'; did you mean 'img'"):
        build_dataset('image_parquet', 'train', path=str(tmp_path), image_column='images', label_column='fine_label')
    with pytest.raises(InputError, match=r"column 'label' has type string; expected encoded images"):
        build_dataset('image_parquet', 'train', path=str(tmp_path), image_column='label', label_column='fine_label')


@pytest.mark.parametrize(('row', 'workers'), [(0, 0), (5, 1)])
def test_a_corrupt_image_is_named_by_its_row_through_the_loader(
    row: int, workers: int, tmp_path: Path, pixels: Callable, encode: Callable, write_parquet: Callable
) -> None:
    images = [encode(image) for image in pixels(6)]
    images[row] = images[row][:-200]
    write_parquet(tmp_path / 'train.parquet', images, [0] * 6)
    dataset = build_dataset('image_parquet', 'train', path=str(tmp_path), image_size=16)
    with pytest.raises(InputError, match=rf'train\.parquet: row {row}: corrupt image'):
        list(DataLoader(dataset, batch_size=6, num_workers=workers))


def test_rows_are_the_files_where_a_limit_leaves_some_out(tmp_path: Path, pixels: Callable, write_parquet: Callable) -> None:
    write_parquet(tmp_path / 'train.parquet', [b'broken'] * 10, np.arange(10))
    dataset = build_dataset('image_parquet', 'train', path=str(tmp_path), limit=4)
    for index, label in enumerate(dataset.targets.tolist()):  # here the label is the row
        with pytest.raises(InputError, match=f'row {label}: corrupt'):
            dataset[index]


def test_it_can_be_pickled_for_spawned_workers(tmp_path: Path, pixels: Callable, write_parquet: Callable) -> None:
    write_parquet(tmp_path / 'train.parquet', pixels(3), [0, 1, 2])
    dataset = build_dataset('image_parquet', 'train', path=str(tmp_path), augment=False, image_size=16)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2][0], dataset[2][0])


@pytest.mark.parametrize(
    ('labels', 'eval_labels', 'message'),
    [
        ([0, -1, 2], [0], r'train\.parquet: row 1: label -1'),
        ([0, 1, 1], [0, 1, 2], r'test\.parquet: row 2: label 2; expected a class index from 0 to 1'),
        ([0, None, 1], [0], r"train\.parquet: row 1: 'label' is missing"),
        ([0, 1, 2], [], r'test\.parquet: has no rows'),
    ],
)
def test_bad_labels_are_named(
    labels: list, eval_labels: list, message: str, tmp_path: Path, pixels: Callable, write_parquet: Callable
) -> None:
    write_parquet(tmp_path / 'train.parquet', pixels(3), labels)
    write_parquet(tmp_path / 'test.parquet', pixels(3)[: len(eval_labels)], pa.array(eval_labels, pa.int64()))
    with pytest.raises(InputError, match=message):
        build_dataset('image_parquet', 'eval', path=str(tmp_path))


def test_missing_and_broken_files_are_named(tmp_path: Path, pixels: Callable, write_parquet: Callable) -> None:
    (tmp_path / 'readme').write_text('x')
    with pytest.raises(InputError, match=r'train\.parquet: no such file'):
        build_dataset('image_parquet', 'train', path=str(tmp_path))
    file = write_parquet(tmp_path / 'train.parquet', pixels(9), [0] * 9)
    with pytest.raises(InputError, match=r'expected test\.parquet or val\.parquet'):
        build_dataset('image_parquet', 'eval', path=str(tmp_path))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r'train\.parquet: not a readable Parquet file') as caught:
        build_dataset('image_parquet', 'train', path=str(tmp_path))
    assert '\n' not in str(caught.value)
    file.write_bytes(b'PAR1' + b'\0' * 2000 + whole[2004:])  # the footer is whole, the pages are not
    with pytest.raises(InputError, match=r'train\.parquet: '):
        build_dataset('image_parquet', 'train', path=str(tmp_path))
