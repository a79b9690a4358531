"""An index that names files elsewhere, or columns that run code, is refused before anything is read or written by it."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.convert import convert
from composer_effalgos.datasets.mds_index import check_index
from composer_effalgos.utils.errors import InputError

streaming = pytest.importorskip('streaming', reason='needs mosaicml-streaming; make setup installs it')
from streaming.base.format import reader_from_json  # noqa: E402


@pytest.fixture(scope='module')
def written(tmp_path_factory) -> Path:
    """Compressed shards, whose raw form is written when they are read."""
    out = tmp_path_factory.mktemp('written')
    convert('digits', ['limit=20'], 'mds', out)
    for split in ('train', 'eval'):
        samples = build_dataset('mds', split, path=str(out))
        with streaming.MDSWriter(
            out=str(out / f'{split}.zip'), columns={'image': 'bytes', 'label': 'int'}, compression='zstd:3', size_limit=1000
        ) as writer:
            for index in range(20):
                writer.write({'image': samples.stored(index), 'label': int(samples.targets[index])})
        shutil.rmtree(out / split)
        (out / f'{split}.zip').rename(out / split)
    (out / 'dataset.json').unlink()
    return out


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """``tmp_path/data``, beside a file that nothing may touch."""
    (tmp_path / 'victim').mkdir()
    (tmp_path / 'victim' / 'keys').write_text('mine')
    return Path(shutil.copytree(written, tmp_path / 'data'))


def edit(folder: Path, change) -> None:
    """Changes the entry of the first training shard."""
    file = folder / 'train' / 'index.json'
    index = json.loads(file.read_text())
    change(index['shards'][0])
    file.write_text(json.dumps(index))


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


NAMES = [
    '../../victim/keys',
    '/etc/hostname',
    '',
    '.',
    '..',
    'a/../../../victim/keys',
    './shard.00000.mds',
    'a//b',
    'a\\b',
    'a\0b',
    'a\nb',
    'C:b',
    '\udc00',
    '.fetching/a',
    'index.json',
    'x' * 300,
    None,
    7,
    ['a'],
]


@pytest.mark.parametrize('remote', [False, True])
@pytest.mark.parametrize('kind', ['raw_data', 'zip_data'])
def test_names_that_lead_elsewhere_are_refused(folder, tmp_path, kind, remote):
    before = everything(tmp_path / 'victim')
    for name in NAMES:
        edit(folder, lambda shard, name=name: shard[kind].update(basename=name))
        target = tmp_path / 'here' if remote else folder
        with pytest.raises(InputError, match=rf'index\.json: shards\[0\]\.{kind}\.basename: expected .*, got .*; ') as caught:
            list(build_dataset('mds', 'train', path=str(target), **({'remote': str(folder)} if remote else {})))
        assert str(caught.value).isprintable()
        shutil.rmtree(tmp_path / 'here', ignore_errors=True)
    assert everything(tmp_path / 'victim') == before
    assert {path.name for path in tmp_path.iterdir()} == {'victim', 'data'}


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    train, victim = folder / 'train', tmp_path / 'victim' / 'keys'
    for link, to in [
        ('shard.00000.mds', victim),
        ('shard.00000.mds.tmp', victim),  # streaming decompresses to this name
        ('shard.00000.mds.zstd', victim),
        ('.fetching', victim.parent),
    ]:
        kept = train / 'kept'
        if (train / link).exists():
            (train / link).rename(kept)
        (train / link).symlink_to(to)
        if link == '.fetching':
            edit(folder, lambda shard: shard['raw_data'].update(basename='keys'))
        with pytest.raises(InputError, match='symbolic link'):
            build_dataset('mds', 'train', path=str(folder))
        (train / link).unlink()
        if kept.exists():
            kept.rename(train / link)
    assert everything(victim.parent) == {str(victim): b'mine'}


def test_a_link_to_the_folder_and_shards_in_folders_are_read(folder, tmp_path):
    train = folder / 'train'
    (train / 'part').mkdir()
    entry = json.loads((train / 'index.json').read_text())['shards'][0]
    for kind in ('raw_data', 'zip_data'):
        if (train / entry[kind]['basename']).exists():
            (train / entry[kind]['basename']).rename(train / 'part' / entry[kind]['basename'])
        edit(folder, lambda shard, kind=kind: shard[kind].update(basename=f'part/{shard[kind]["basename"]}'))
    (tmp_path / 'link').symlink_to(folder)
    labels = [label for _, label in build_dataset('mds', 'train', path=str(tmp_path / 'link'), image_size=8)]
    here = build_dataset('mds', 'train', path=str(tmp_path / 'here'), remote=str(folder), image_size=8)
    assert [label for _, label in here] == labels
    assert len(labels) == 20
    assert (tmp_path / 'here' / 'train' / 'part' / 'shard.00000.mds').is_file()


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize('encoding', ['pkl', 'pkl:x'])
def test_pickled_columns_are_refused_before_they_are_read(tmp_path, encoding):
    for split in ('train', 'eval'):
        with streaming.MDSWriter(out=str(tmp_path / split), columns={'image': 'bytes', 'label': 'int', 'extra': 'pkl'}) as writer:
            writer.write({'image': b'x', 'label': 0, 'extra': pickle.dumps(Bomb(tmp_path / 'ran'))})
    (entry,) = json.loads((tmp_path / 'train' / 'index.json').read_text())['shards']
    assert entry['column_encodings'] == ['pkl', 'bytes', 'int']
    reader_from_json(str(tmp_path / 'train'), '', entry).get_item(0)
    (tmp_path / 'ran').rmdir()  # the file does what is said of it
    edit(tmp_path, lambda shard: shard.update(column_encodings=[encoding, 'bytes', 'int']))
    with pytest.raises(InputError, match=rf"column_encodings: expected types that run no code when read, got '{encoding}'"):
        build_dataset('mds', 'train', path=str(tmp_path))[0]
    assert not (tmp_path / 'ran').exists()


def test_the_check_fits_what_streaming_writes(folder, tmp_path):
    assert len(check_index(folder / 'train')) > 1
    for writer, columns, sample in [
        (streaming.JSONWriter, {'a': 'str'}, {'a': 'x'}),
        (streaming.CSVWriter, {'a': 'str', 'b': 'int'}, {'a': 'x', 'b': 1}),
        (streaming.MDSWriter, {'a': 'ndarray:uint8:2,2', 'b': 'list[jpeg]'}, {'a': np.ones((2, 2), np.uint8), 'b': []}),
    ]:
        out = tmp_path / writer.__name__
        with writer(out=str(out), columns=columns, compression='br:3') as opened:
            opened.write(sample)
        (entry,) = check_index(out)
        assert entry['samples'] == 1
        file = out / 'index.json'
        written = file.read_text()
        for kind in ('raw_meta', 'zip_meta'):
            index = json.loads(written)
            if index['shards'][0].get(kind):
                index['shards'][0][kind]['basename'] = '../keys'
                file.write_text(json.dumps(index))
                with pytest.raises(InputError, match=rf'{kind}\.basename'):
                    check_index(out)
