import errno
import io
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from composer_effalgos.cli import main
from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.convert import convert
from composer_effalgos.datasets.images import ImageArray
from composer_effalgos.utils.errors import InputError


@pytest.fixture(params=['ffcv', 'mds'])
def kind(request) -> str:
    if request.param == 'ffcv':
        pytest.importorskip('ffcv', reason='needs ffcv; make setup-ffcv builds it')
    else:
        pytest.importorskip('streaming', reason='needs mosaicml-streaming; make setup installs it')
    return request.param


def read(kind: str, split: str, folder: Path, **options):
    return build_dataset('beton' if kind == 'ffcv' else 'mds', split, path=str(folder), **options)


def jpeg(image: np.ndarray, mode: str = 'RGB') -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(image).convert(mode).save(encoded, 'JPEG')
    return encoded.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of photographs of several sizes and kinds; 7 to train, 2 to evaluate."""
    draw = np.random.default_rng(0)
    for number in range(9):
        place = tmp_path / 'photos' / ('val' if number > 6 else 'train') / ('cat', 'dog')[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = draw.integers(0, 256, (20 + number, 30 - number, 3), dtype=np.uint8)
        if number % 3 == 2:
            Image.fromarray(image).save(place / f'{number}.png')
        else:
            (place / f'{number}.jpg').write_bytes(jpeg(image, 'L' if number == 3 else 'RGB'))
    return tmp_path / 'photos'


@pytest.mark.parametrize(
    ('converted_with', 'read_with'),
    [({}, {'image_size': 8}), ({'image_size': 8}, {}), ({'image_size': 8, 'padding': 2}, {})],
    ids=['size given', 'size kept', 'padding kept'],
)
def test_images_of_any_kind_come_back_as_they_were(kind, folder, tmp_path, converted_with, read_with):
    overrides = [f'path={folder}', *(f'{key}={value}' for key, value in converted_with.items())]
    assert 'as ' + kind in convert('image_folder', overrides, kind, tmp_path / 'out')
    for split, count in (('train', 7), ('eval', 2)):
        original = build_dataset('image_folder', split, path=str(folder), **converted_with, **read_with)
        converted = read(kind, split, tmp_path / 'out', **read_with)
        assert len(converted) == count
        assert converted.targets.tolist() == original.targets.tolist()
        assert converted.classes == ['cat', 'dog']
        for index in range(count):
            torch.manual_seed(index)
            image, _ = original[index]
            torch.manual_seed(index)
            assert torch.equal(converted[index][0], image)


def test_converted_data_can_be_converted(kind, tmp_path):
    convert('digits', ['limit=20'], kind, tmp_path / 'one')
    other = 'mds' if kind == 'ffcv' else 'ffcv'
    if other == 'ffcv':
        pytest.importorskip('ffcv', reason='needs ffcv; make setup-ffcv builds it')
    convert('beton' if kind == 'ffcv' else 'mds', [f'path={tmp_path / "one"}'], other, tmp_path / 'two')
    first, second = read(kind, 'train', tmp_path / 'one', augment=False), read(other, 'train', tmp_path / 'two', augment=False)
    assert all(torch.equal(first[index][0], second[index][0]) for index in range(20))
    assert (tmp_path / 'one' / 'dataset.json').read_text() == (tmp_path / 'two' / 'dataset.json').read_text()


def test_shuffled_and_from_a_recipe(kind, tmp_path, capsys, monkeypatch):
    arguments = ['yamls/digits/digits_baseline.yaml', 'dataset.limit=50', '--to', kind, '--out', str(tmp_path), '--shuffle', '3']
    monkeypatch.setattr(sys, 'argv', ['effalgos', 'convert', *arguments])
    with pytest.raises(SystemExit, match='0'):
        main()
    assert '50 training and 360 evaluation samples' in capsys.readouterr().out
    original = build_dataset('digits', 'train', limit=50, augment=False)
    shuffled = read(kind, 'train', tmp_path, augment=False)
    order = np.random.default_rng(3).permutation(50)
    assert shuffled.targets.tolist() == original.targets[order].tolist() != original.targets.tolist()
    assert torch.equal(shuffled[7][0], original[int(order[7])][0])
    assert read(kind, 'eval', tmp_path).targets.tolist() == build_dataset('digits', 'eval').targets.tolist()


def test_what_it_refuses(kind, tmp_path, folder):
    out = tmp_path / 'out'
    with pytest.raises(InputError, match=r'--to: expected a format, got .tfrecord.; known: ffcv, mds'):
        convert('digits', [], 'tfrecord', out)
    with pytest.raises(InputError, match=r"SOURCE: expected a recipe .*, got .digit.; did you mean 'digits'"):
        convert('digit', [], kind, out)
    with pytest.raises(InputError, match="override 'limit': expected key=value"):
        convert('digits', ['limit'], kind, out)
    with pytest.raises(InputError, match='synthetic holds no images'):
        convert('synthetic', [], kind, out)
    assert not out.exists()
    convert('digits', ['limit=10'], kind, out)
    with pytest.raises(InputError, match=r'expected none of its files to exist, got .*; remove it or give another --out'):
        convert('digits', ['limit=10'], kind, out)
    other = 'ffcv' if kind == 'mds' else 'mds'
    with pytest.raises(InputError, match=r'dataset\.json describes other data, or another order'):
        convert('digits', ['limit=10'], other, out, shuffle=1)
    (folder / 'train' / 'cat' / '0.jpg').write_bytes(b'no image')
    if kind == 'ffcv':
        with pytest.raises(InputError, match=r'train: sample 0: .*corrupt image'):
            convert('image_folder', [f'path={folder}'], kind, tmp_path / 'broken')
        assert not list((tmp_path / 'broken').iterdir())


def test_a_full_disk_leaves_nothing_behind(kind, tmp_path, monkeypatch):
    """The disk fills up while the second split is written."""
    out = tmp_path / 'out'
    stored, count = type(build_dataset('digits', 'train')).stored, 0

    def full(self, index):
        nonlocal count
        count += 1
        if count > 15:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return stored(self, index)

    monkeypatch.setattr('composer_effalgos.datasets.images.ImageArray.stored', full)
    with pytest.raises(InputError, match='No space left on device; nothing unfinished was kept'):
        convert('digits', ['limit=10'], kind, out)
    assert {path.name.split('.')[0] for path in out.iterdir()} == {'train'}  # whole; the other split is not there
    monkeypatch.undo()
    with pytest.raises(InputError, match='expected none of its files to exist'):
        convert('digits', ['limit=10'], kind, out)


def _write_slowly(kind: str, out: Path, started) -> None:
    stored = ImageArray.stored

    def slow(self, index):
        if index == 8:
            started.set()
            time.sleep(600)
        return stored(self, index)

    ImageArray.stored = slow
    convert('digits', ['limit=10'], kind, out, shard_bytes=1000)


def test_killed_while_it_writes(kind, tmp_path):
    out = tmp_path / 'out'
    context = multiprocessing.get_context('fork')
    started = context.Event()
    process = context.Process(target=_write_slowly, args=(kind, out, started))
    process.start()
    assert started.wait(100)
    process.kill()
    process.join()
    assert list(out.iterdir())
    assert all(path.name.startswith('.') for path in out.iterdir())  # nothing that could be taken for whole
    convert('digits', ['limit=10'], kind, out)
    assert not [path for path in out.iterdir() if path.name.startswith('.')]
    assert len(read(kind, 'train', out)) == 10


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['limit=['], "override 'limit=[': "),
        (['split=1'], "override 'split': both splits of digits are converted; expected an option of digits"),
        (['name=1'], "override 'name': "),
        (['--shard-mb', '1e12'], '--shard-mb: expected a number in [0.001, 4096), got 1000000000000.0'),
        (['--shard-mb', 'nan'], '--shard-mb: expected a number in [0.001, 4096), got nan'),
    ],
)
def test_a_wrong_argument_is_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    out = tmp_path / 'out'
    monkeypatch.setattr(sys, 'argv', ['effalgos', 'convert', 'digits', *arguments, '--to', 'mds', '--out', str(out)])
    assert main() == 2
    line = capsys.readouterr().err
    assert line.startswith(f'error: {message}')
    assert line.count('\n') == 1
    assert not out.exists()
