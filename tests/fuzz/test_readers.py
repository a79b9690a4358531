"""Damaged files of every kind: they are read, or refused in one line. Nothing hangs, and nothing is written beside the data."""

import importlib.util
import io
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.convert import convert
from composer_effalgos.datasets.images import FORMATS, decode_image
from composer_effalgos.loaders import cache
from composer_effalgos.models.pretrained import read_checkpoint, read_weights
from composer_effalgos.subset_selection.subset_file import check_subset, read_subset, write_subset
from composer_effalgos.utils.errors import InputError
from tests.fuzz.mutate import damage_bytes, damage_tree, deep, limit, odd_value

SECONDS = 20  # far above what any case takes, on a busy machine too


def encoded(draw: random.Random, kind: str = 'PNG') -> bytes:
    file = io.BytesIO()
    Image.frombytes('RGB', (9, 7), draw.randbytes(189)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    """One folder of each kind of data, undamaged."""
    out, draw = tmp_path_factory.mktemp('whole'), random.Random(0)
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            (out / 'image_folder' / split / name).mkdir(parents=True)
            for number in range(2):
                (out / 'image_folder' / split / name / f'{number}.png').write_bytes(encoded(draw, ('PNG', 'JPEG')[number]))
    for kind, package in (('mds', 'streaming'), ('ffcv', 'ffcv')):
        if importlib.util.find_spec(package):
            convert('image_folder', [f'path={out / "image_folder"}'], kind, out / kind)
    (out / 'image_parquet').mkdir()
    table = pa.table({'image': [encoded(draw) for _ in range(4)], 'label': [0, 1, 0, 1]}).replace_schema_metadata({'classes': 'a,b'})
    for name in ('train', 'test'):
        pq.write_table(table, out / 'image_parquet' / f'{name}.parquet', row_group_size=2)
    weights = {'a.weight': torch.ones(3, 2), 'b': torch.arange(4)}
    (out / 'weights').mkdir()
    torch.save(weights, out / 'weights' / 'zip.pt')
    torch.save(weights, out / 'weights' / 'old.pt', _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(weights, out / 'weights' / 'a.safetensors')
    (out / 'subset').mkdir()
    write_subset(out / 'subset' / 'a.parquet', torch.tensor([0, 2]), torch.ones(2), dataset=_labelled(), facts={})
    cache.save(out / 'cache', 'a' * 32, torch.zeros(2, 3, 3, 3, dtype=torch.uint8), torch.tensor([0, 1]))
    return out


def _labelled() -> TensorDataset:
    return TensorDataset(torch.zeros(4, 1), torch.tensor([0, 1, 0, 1]))


def damage_file(draw: random.Random, file: Path, secret: Path) -> None:
    """Damages a file's content, or puts something else in its place."""
    if draw.random() < 0.15:
        file.unlink()
        kind = draw.randrange(5)
        if kind == 0:
            os.mkfifo(file)
        elif kind == 1:
            file.mkdir()
        elif kind == 2:
            file.symlink_to('/dev/zero')
        elif kind == 3:
            file.symlink_to(secret)
    elif file.suffix == '.json' and draw.random() < 0.8:
        tree = json.loads(file.read_text())
        changed = draw.choice([deep(), None]) if draw.random() < 0.05 else damage_tree(draw, tree)
        try:
            file.write_text(json.dumps(changed))
        except RecursionError:
            file.write_text('[' * 100_000)
    elif file.suffix == '.npy' and draw.random() < 0.7:
        dtype, shape = draw.choice(['<i8', '<i4', '<f8', '|O', '<U9', [('a', '<i8')]]), draw.choice([(4,), (2, 2), (), (10**13,), (-4,)])
        header = repr({'descr': dtype, 'fortran_order': False, 'shape': shape}).encode().ljust(117) + b'\n'
        file.write_bytes(b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header + bytes(32))
    else:
        file.write_bytes(damage_bytes(draw, file.read_bytes()))


def beside(folder: Path) -> dict[str, Any]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob('*')}


def attempt(read: Callable[[], Any], seed: int) -> bool:
    """Whether a reader took the data; fails with the seed where it neither did nor said in one line why not."""
    message = None
    try:
        with limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            read()
    except InputError as error:
        message = str(error)
    except BaseException as error:
        error.add_note(f'seed {seed}')
        raise
    assert message is None or (len(message.splitlines()) == 1 and len(message) < 1000), (seed, message)
    return message is None


def read_images(name: str, split: str, path: Path, **options: Any) -> None:
    dataset = build_dataset(name, split, path=str(path), image_size=8, **options)
    assert 0 <= int(dataset.targets.min()) <= int(dataset.targets.max()) < dataset.num_classes
    for index in range(len(dataset)):
        image, _ = dataset[index]
        assert image.shape == (3, 8, 8)


def read_whole_subset(file: Path) -> None:
    check_subset(file, read_subset(file), _labelled())


def test_images() -> None:
    taken = 0
    for seed in range(140):
        draw = random.Random(seed)
        data = damage_bytes(draw, encoded(draw, draw.choice(FORMATS)))
        taken += attempt(partial(decode_image, data, 'here'), seed)
    assert 10 < taken < 130


@pytest.mark.parametrize(
    ('kind', 'name', 'cases'), [('image_folder',) * 2 + (30,), ('image_parquet',) * 2 + (70,), ('mds', 'mds', 130), ('ffcv', 'beton', 70)]
)
def test_datasets(whole, tmp_path, kind, name, cases) -> None:
    if not (whole / kind).exists():
        pytest.skip(f'needs the package of {kind}')
    (tmp_path / 'beside').mkdir()
    (tmp_path / 'beside' / 'secret').write_text('mine')
    before, taken = beside(tmp_path), 0
    for seed in range(cases):
        draw, folder = random.Random(seed), tmp_path / 'data'
        shutil.copytree(whole / kind, folder)
        for _ in range(draw.choice([1, 1, 2])):
            files = sorted(path for path in folder.rglob('*') if path.is_file() and not path.is_symlink())
            damage_file(draw, draw.choice(files), tmp_path / 'beside' / 'secret')
        options = {'remote': str(whole / kind)} if name == 'mds' and draw.random() < 0.3 else {}
        taken += attempt(partial(read_images, name, draw.choice(['train', 'eval']), folder, **options), seed)
        shutil.rmtree(folder)
        assert beside(tmp_path) == before, seed
    assert 0 < taken < cases


def test_parquet_of_other_columns(whole, tmp_path) -> None:
    """Whole files of other types, with rows that are missing and labels out of range."""
    for seed in range(40):
        draw = random.Random(seed)
        rows = draw.choice([0, 1, 4])
        images = draw.choice([[None], [b''], ['x'], [7], [{'bytes': b'x'}], [{'bytes': None}], [None, {'bytes': b'x'}], [[b'x']]])
        labels = draw.choice([[None], [-1], [5], [2**63], [2**62], [0.5], ['a'], [[0]], [True], [0, None]])
        kind = pa.uint64() if labels == [2**63] else None
        table = pa.table({'image': (images * 4)[:rows], 'label': pa.array((labels * 4)[:rows], kind)})
        metadata = draw.choice(
            [{}, {'classes': ''}, {b'classes': b'\xff'}, {'huggingface': '[' * 9999}, {'huggingface': '{"info": 1}'}, {'huggingface': '{'}]
        )
        for file in ('train', 'test'):
            pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f'{file}.parquet')
        for name in ('image_parquet', 'cifar10'):
            attempt(partial(read_images, name, draw.choice(['train', 'eval']), tmp_path), seed)


def test_weights(whole, tmp_path) -> None:
    taken = 0
    for seed in range(70):
        draw = random.Random(seed)
        source = draw.choice(sorted((whole / 'weights').iterdir()))
        file = tmp_path / draw.choice([source.name, 'weights.safetensors', 'weights.pt'])
        shutil.copy(source, file)
        damage_file(draw, file, source)
        read = draw.choice([read_weights, read_checkpoint])
        taken += attempt(partial(read, file, 'key'), seed)
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    assert taken > 0


def test_subsets(whole, tmp_path) -> None:
    taken = 0
    for seed in range(40):
        draw, file = random.Random(seed), tmp_path / 'a.parquet'
        shutil.copy(whole / 'subset' / file.name, file)
        damage_file(draw, file, whole / 'subset' / file.name)
        taken += attempt(partial(read_whole_subset, file), seed)
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    assert taken > 0


def test_caches(whole, tmp_path) -> None:
    """A cache that cannot be used is a warning."""
    for seed in range(30):
        draw, file = random.Random(seed), tmp_path / f'{"a" * 32}.npz'
        shutil.copy(whole / 'cache' / file.name, file)
        damage_file(draw, file, whole / 'cache' / file.name)
        assert attempt(partial(cache.load, tmp_path, 'a' * 32), seed)
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


def test_descriptions_of_odd_values(whole, tmp_path) -> None:
    """Each value of an index and a description replaced by each kind of odd one."""
    if not (whole / 'mds').exists():
        pytest.skip('needs mosaicml-streaming')
    folder = Path(shutil.copytree(whole / 'mds', tmp_path / 'data'))
    for seed in range(60):
        draw = random.Random(seed)
        file = draw.choice([folder / 'train' / 'index.json', folder / 'dataset.json'])
        text = file.read_text()
        tree = json.loads(text)
        entry = tree['shards'][0] if 'shards' in tree else tree
        if draw.random() < 0.4 and 'shards' in tree:
            entry = entry['raw_data']
        entry[draw.choice(sorted(entry))] = odd_value(draw)
        file.write_text(json.dumps(tree))
        attempt(partial(read_images, 'mds', 'train', folder), seed)
        file.write_text(text)
    assert np.load(folder / 'train' / 'labels.npy').tolist() == [0, 0, 1, 1]
