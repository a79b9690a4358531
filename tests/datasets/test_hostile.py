"""Data made to do harm: programs that are started, memory that is filled, reads that never end."""

import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.convert import convert
from composer_effalgos.datasets.images import FORMATS, MOST_PIXELS, decode_image
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_bytes, whole_file
from tests.fuzz.mutate import limit

streaming = pytest.importorskip('streaming', reason='needs mosaicml-streaming; make setup installs it')

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
showpage
%%EOF
"""


def png(width: int, height: int) -> bytes:
    """A black PNG file of any size, small as it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    rows = zlib.compressobj(9)
    pixels = b''.join([*(rows.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)), rows.flush()])
    header = struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')


@pytest.fixture
def no_program(monkeypatch) -> list:
    """What Pillow would have started Ghostscript for."""
    started: list = []
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *arguments, **_: started.append(arguments) or Image.new('RGB', (8, 8)).im)
    return started


def test_no_image_starts_a_program(tmp_path, no_program):
    with Image.open(io.BytesIO(EPS)) as image:
        image.convert('RGB')
    assert len(no_program) == 1  # Pillow by itself
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    (tmp_path / 'train' / 'a' / 'x.png').write_bytes(EPS)
    with pytest.raises(InputError, match=r'x\.png: corrupt image .*; expected one of JPEG, PNG'):
        build_dataset('image_folder', 'train', path=str(tmp_path))[0]
    for kind in ('jpeg', 'png', 'bytes'):  # mosaicml-streaming opens the first two itself
        out = tmp_path / kind
        with streaming.MDSWriter(out=str(out / 'train'), columns={'image': kind, 'label': 'int'}) as writer:
            writer.write({'image': EPS, 'label': 0})
        with pytest.raises(InputError, match=r'train: sample 0: corrupt image'):
            build_dataset('mds', 'train', path=str(out))[0]
    assert len(no_program) == 1


@pytest.mark.parametrize('kind', FORMATS)
def test_every_format_named_is_read(kind):
    file = io.BytesIO()
    Image.new('RGB', (5, 4), (255, 0, 0)).save(file, kind)
    assert decode_image(file.getvalue(), 'here').size == (5, 4)


def test_a_small_file_of_a_large_image_is_refused(monkeypatch):
    data = png(12_000, 12_000)
    assert len(data) < 50_000
    message = rf'^here: expected an image of at most {MOST_PIXELS} pixels, got 12000x12000; scale it down first'
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(InputError, match=message):
        decode_image(data, 'here')
    monkeypatch.setattr('composer_effalgos.datasets.images.MOST_PIXELS', 100)
    assert decode_image(png(10, 10), 'here').size == (10, 10)
    with pytest.raises(InputError, match='at most 100 pixels, got 10x11'):
        decode_image(png(10, 11), 'here')


def test_pixels_in_mds_are_counted_before_room_is_made(tmp_path):
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    for name, head in (('good', None), ('bad', np.array([60_000, 60_000, 3], np.uint32).tobytes())):
        data = streaming.base.format.mds.encodings.PIL().encode(image)
        with streaming.MDSWriter(out=str(tmp_path / name / 'train'), columns={'image': 'pil', 'label': 'uint8'}) as writer:
            writer.write({'image': data if head is None else head + data[12:], 'label': np.uint8(3)})
    assert np.array_equal(build_dataset('mds', 'train', path=str(tmp_path / 'good')).stored(0), np.asarray(image))
    with pytest.raises(InputError, match=r'sample 0 cannot be read .*at most 89478485 pixels, got 60000x60000'):
        build_dataset('mds', 'train', path=str(tmp_path / 'bad'))[0]
    with streaming.MDSWriter(out=str(tmp_path / 'deep' / 'train'), columns={'image': 'pil', 'label': 'uint8'}) as writer:
        writer.write({'image': Image.fromarray(np.arange(20, dtype=np.uint16).reshape(4, 5)), 'label': np.uint8(3)})
    with pytest.raises(InputError, match=r'sample 0.*expected 8 bits per channel, got an image of mode I;16'):
        build_dataset('mds', 'train', path=str(tmp_path / 'deep'))[0]


@pytest.mark.parametrize(('kind', 'message'), [('json', r'type bytes, .*, got .image. of type .json'), ('list[jpeg]', r'of type .list')])
def test_columns_of_other_types_are_refused(tmp_path, kind, message):
    with streaming.MDSWriter(out=str(tmp_path / 'train'), columns={'image': kind, 'label': 'int'}) as writer:
        writer.write({'image': b'{}', 'label': 0})
    with pytest.raises(InputError, match=message):
        build_dataset('mds', 'train', path=str(tmp_path))


@pytest.mark.parametrize('compression', ['br:5', 'bz2:3', 'gz:3', 'snappy', 'zstd:3'])
def test_compressed_shards_hold_what_their_index_says(tmp_path, compression):
    with streaming.MDSWriter(out=str(tmp_path / 'train'), columns={'image': 'png', 'label': 'int'}, compression=compression) as writer:
        for label in range(3):
            writer.write({'image': Image.new('RGB', (8, 8), (label, 0, 0)), 'label': label})
    if not list((tmp_path / 'train').glob('*.mds')):
        (file,) = (tmp_path / 'train').glob('*.mds.*')
        bomb = tmp_path / 'bomb'
        shutil.copytree(tmp_path, bomb, ignore=shutil.ignore_patterns('bomb'))
        assert build_dataset('mds', 'train', path=str(tmp_path)).targets.tolist() == [0, 1, 2]
        (bomb / 'train' / file.name).write_bytes(streaming.base.compression.compress(compression, bytes(50_000_000)))
        with pytest.raises(InputError, match='cannot be decompressed'):
            build_dataset('mds', 'train', path=str(bomb))
        assert sum(path.stat().st_size for path in (bomb / 'train').rglob('*')) < 10_000_000
        assert not list((bomb / 'train').glob('*.mds'))


@pytest.fixture
def digits(tmp_path) -> Path:
    convert('digits', ['limit=12'], 'mds', tmp_path / 'digits')
    return tmp_path / 'digits'


def test_labels_of_another_shape_or_type(digits):
    file = digits / 'train' / 'labels.npy'
    labels = np.load(file)
    for wrong in (labels[:, None], labels.astype(np.int32), labels.astype(object), labels.astype(float), labels[:0], labels[0]):
        np.save(file, wrong)
        with pytest.raises(InputError, match=r'labels\.npy: '):
            build_dataset('mds', 'train', path=str(digits))
    header = repr({'descr': '<i8', 'fortran_order': False, 'shape': (10**13,)}).ljust(117).encode() + b'\n'
    file.write_bytes(b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header + labels.tobytes())
    with pytest.raises(InputError, match=r'labels\.npy: cannot be read .*mmap length is greater than file size'):
        build_dataset('mds', 'train', path=str(digits))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('null', 'not a description'),
        ('[' * 100_000, 'not a description'),
        ('{"like": "digits", "classes": "0123456789", "labels": {}}', 'classes: expected'),
        (
            '{"like": "digit", "classes": [], "labels": {}}',
            "like: expected .*, got 'digit'; did you mean 'digits'",
        ),
        (
            '{"like": "digits", "classes": [], "labels": {}, "options": {"crop": 1}}',
            'options: .crop.: expected image_size, padding, cutout',
        ),
        ('{"like": "digits", "classes": [], "labels": {}, "options": {"image_size": 0}}', 'image_size: expected a number at least 1'),
        ('{"like": "digits", "classes": [], "labels": {}, "options": {"image_size": "8"}}', 'options.image_size: expected'),
        (None, r'dataset\.json: missing, although .*labels\.npy exists'),
    ],
)
def test_descriptions(digits, text, message):
    file = digits / 'dataset.json'
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(InputError, match=message):
        build_dataset('mds', 'train', path=str(digits))


@pytest.mark.parametrize('name', ['dataset.json', 'train/index.json', 'train/labels.npy', 'train/shard.00000.mds'])
@pytest.mark.parametrize('kind', ['fifo', 'device'])
def test_nothing_waits_for_what_is_no_file(digits, name, kind):
    (digits / name).unlink()
    os.mkfifo(digits / name) if kind == 'fifo' else (digits / name).symlink_to('/dev/zero')
    with limit(20), pytest.raises(InputError, match=Path(name).name):
        build_dataset('mds', 'train', path=str(digits))[0]


def test_files_are_regular_and_not_too_large(tmp_path):
    (tmp_path / 'a').write_bytes(b'1234')
    assert read_bytes(tmp_path / 'a', 4) == b'1234'
    with pytest.raises(ValueError, match='at most 3 bytes'):
        read_bytes(tmp_path / 'a', 3)
    os.mkfifo(tmp_path / 'train.parquet')
    for name in ('image_parquet', 'cifar10'):
        with limit(20), pytest.raises(InputError):
            build_dataset(name, 'train', path=str(tmp_path))
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    os.mkfifo(tmp_path / 'train' / 'a' / 'x.png')
    with limit(20), pytest.raises(InputError, match=r'x\.png: cannot be read \(expected a file, got a device, FIFO or socket\)'):
        build_dataset('image_folder', 'train', path=str(tmp_path))[0]


def test_sizes_that_are_not_those_of_the_pixels(tmp_path):
    """ffcv would copy the stored bytes into room for height x width x 3."""
    pytest.importorskip('ffcv', reason='needs ffcv; make setup-ffcv builds it')
    from ffcv.reader import Reader
    from ffcv.types import FieldDescType, HeaderType

    convert('digits', ['limit=12'], 'ffcv', tmp_path)
    file = tmp_path / 'train.beton'
    whole, reader = file.read_bytes(), Reader(str(file))
    start, table = HeaderType.itemsize + 2 * FieldDescType.itemsize, int(reader.header['alloc_table_ptr'])

    def written(metadata: np.ndarray, allocated: np.ndarray, head: bytes = whole[:start]) -> None:
        file.write_bytes(head + metadata.tobytes() + whole[start + metadata.nbytes : table] + allocated.tobytes())

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            build_dataset('beton', 'train', path=str(tmp_path))

    metadata, allocated = reader.metadata.copy(), reader.alloc_table.copy()
    written(metadata, allocated)
    assert len(build_dataset('beton', 'train', path=str(tmp_path))) == 12
    for key, value in {'width': 7, 'height': 65535, 'mode': 2, 'data_ptr': int(metadata['f0']['data_ptr'][3]) + 1}.items():
        changed = metadata.copy()
        changed['f0'][key][3] = value
        written(changed, allocated)
        refused('sample 3: its data does not match its height and width')
    changed = allocated.copy()
    changed['ptr'][0], changed['size'][0] = 2**64 - 1, 2  # their sum is 1
    written(metadata, changed)
    refused('cut off or damaged')
    kind = HeaderType.itemsize + FieldDescType.itemsize
    written(metadata, allocated, whole[:kind] + b'\0' + whole[kind + 1 : start])  # float labels, of as many bytes
    refused("field 'label': expected an IntField, got FloatField")


def test_folders_that_lead_into_themselves(tmp_path):
    """Two such links in a folder are 2^40 paths to torchvision."""
    place = tmp_path / 'train' / 'a'
    place.mkdir(parents=True)
    (place / 'x.png').write_bytes(png(4, 4))
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'y.png').write_bytes(png(4, 4))
    (place / 'link').symlink_to(tmp_path / 'elsewhere')
    with limit(20):
        assert len(build_dataset('image_folder', 'train', path=str(tmp_path))) == 2
    for name in ('one', 'two'):
        (place / name).symlink_to(place)
    with limit(20), pytest.raises(InputError, match='expected no symbolic link to a parent folder'):
        build_dataset('image_folder', 'train', path=str(tmp_path))


@pytest.mark.parametrize('mark', [None, 'unfinished'])
def test_what_is_written_appears_whole_or_not_at_all(tmp_path, mark):
    target = tmp_path / 'target'
    with whole_file(target, mark) as place:
        place.mkdir()
        (place / 'part').write_text('x')
    assert [path.name for path in tmp_path.iterdir()] == ['target']
    shutil.rmtree(target)
    with pytest.raises(FileNotFoundError), whole_file(target, mark) as again:
        (again / 'half').write_text('x')
    assert not list(tmp_path.iterdir())
    victim = tmp_path / 'victim'
    victim.write_text('mine')
    place.symlink_to(victim)  # a link with that name is not written through
    with whole_file(target, mark) as again:
        assert again == place
        again.write_text('whole')
    assert (target.read_text(), victim.read_text()) == ('whole', 'mine')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['target', 'victim']


def test_a_device_or_fifo_is_not_replaced_by_a_file(tmp_path):
    target = tmp_path / 'fifo'
    os.mkfifo(target)
    with pytest.raises(InputError, match='expected a regular file or a new name'), whole_file(target):
        pass
    assert target.is_fifo()
