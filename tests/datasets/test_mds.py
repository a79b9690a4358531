import io
import json
import multiprocessing
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.models import ComposerClassifier
from PIL import Image
from torch.utils.data import DataLoader

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.convert import convert
from composer_effalgos.datasets.images import decode_image
from composer_effalgos.plan import EpochPlanner, PlannedDataLoader, plan_epoch, resume_epoch
from composer_effalgos.utils.errors import InputError

streaming = pytest.importorskip('streaming', reason='needs mosaicml-streaming; make setup installs it')
LIMIT = 200


@pytest.fixture(scope='module')
def digits_mds(tmp_path_factory) -> Path:
    """200 training digits in shards of some 40 samples, and all evaluation digits."""
    out = tmp_path_factory.mktemp('mds')
    convert('digits', [f'limit={LIMIT}'], 'mds', out, shard_bytes=10_000)
    return out


@pytest.fixture
def copy(digits_mds, tmp_path) -> Path:
    return Path(shutil.copytree(digits_mds, tmp_path / 'copy'))


@pytest.mark.parametrize('split', ['train', 'eval'])
def test_the_same_samples_as_what_was_converted(digits_mds, split):
    original = build_dataset('digits', split, limit=LIMIT)
    shards = build_dataset('mds', split, path=str(digits_mds))
    assert len(shards) == len(original)
    assert shards.classes == original.classes
    assert shards.num_classes == 10
    assert torch.equal(shards.targets, original.targets)
    for index in (0, 41, len(original) - 1):
        torch.manual_seed(index)
        image, label = original[index]
        torch.manual_seed(index)  # the same augmentation
        from_shard, label_too = shards[index]
        assert torch.equal(from_shard, image)
        assert label_too == label
    assert build_dataset('mds', split, path=str(digits_mds), image_size=16)[0][0].shape == (3, 16, 16)


def test_shards_of_another_tool(tmp_path, pixels):
    """As streaming's own scripts write them: columns of other names, images of MDS's types, zstd, no description."""
    images, labels = pixels(30, 20), np.arange(30) % 4
    for name in ('train', 'val'):
        with streaming.MDSWriter(
            out=str(tmp_path / name), columns={'x': 'png', 'y': 'int'}, compression='zstd:3', size_limit=9000
        ) as writer:
            for image, label in zip(images, labels, strict=True):
                encoded = io.BytesIO()
                Image.fromarray(image).save(encoded, 'PNG')
                writer.write({'x': Image.open(encoded), 'y': int(label)})
    options = {'path': str(tmp_path), 'eval_folder': 'val', 'image_column': 'x', 'label_column': 'y', 'image_size': 20}
    data = build_dataset('mds', 'eval', **options)
    assert data.targets.tolist() == labels.tolist()
    assert data.num_classes == 4
    assert len(data.shards.starts) > 1
    assert all(np.array_equal(np.asarray(decode_image(data.stored(index), 'here')), images[index]) for index in range(30))
    assert data[3][0].shape == (3, 20, 20)
    with pytest.raises(InputError, match=r"dataset.label_column: expected a column of .*, got 'label'; it has x, y"):
        build_dataset('mds', 'eval', **{**options, 'label_column': 'label'})


def test_some_samples_of_some_shards(digits_mds):
    whole = build_dataset('mds', 'train', path=str(digits_mds), augment=False, shuffle='shards')
    some = build_dataset('mds', 'train', path=str(digits_mds), augment=False, shuffle='shards', limit=50)
    assert len(some) == 50
    for index in range(50):
        row = int(some.rows[index])
        assert torch.equal(some[index][0], whole[row][0])
        in_shard = int(torch.bucketize(index, some.shard_starts, right=True)) - 1
        assert in_shard == int(torch.bucketize(row, whole.shard_starts, right=True)) - 1


def test_a_pass_by_shard_reads_each_shard_once(digits_mds, make_trainer, monkeypatch):
    data = build_dataset('mds', 'train', path=str(digits_mds), shuffle='shards')
    assert build_dataset('mds', 'train', path=str(digits_mds)).shard_starts is None
    read: list[int] = []
    monkeypatch.setattr(type(data.shards), '__getitem__', _noting(type(data.shards).__getitem__, read))
    model = ComposerClassifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)), num_classes=10)
    trainer = make_trainer(dataset=data, model=model, callbacks=[EpochPlanner()], max_duration='2ep')
    trainer.fit()
    for epoch in (read[:LIMIT], read[LIMIT:]):
        assert sorted(epoch) == list(range(LIMIT))
        shards = (torch.bucketize(torch.tensor(epoch), data.shards.starts, right=True) - 1).tolist()
        assert len(data.shards.starts) >= 4
        assert 1 + sum(a != b for a, b in pairwise(shards)) == len(data.shards.starts)
    assert read[:LIMIT] != read[LIMIT:]


def _noting(function, seen):
    def noting(self, row):
        seen.append(row)
        return function(self, row)

    return noting


def test_after_a_resume_only_the_rest_is_read(digits_mds):
    data = build_dataset('mds', 'train', path=str(digits_mds), shuffle='shards')
    loader = PlannedDataLoader(DataLoader(data, batch_size=10, shuffle=True), seed=1)
    plan = plan_epoch(torch.arange(LIMIT), None, 10, seed=1, epoch=0, shard_starts=loader.shard_starts)
    loader.set_plan(plan, 0)
    whole = [labels.tolist() for _, labels in loader]
    last_shards = data.shards
    data.shards = build_dataset('mds', 'train', path=str(digits_mds)).shards
    loader.set_plan(resume_epoch(plan, batches=15, batch_size=10, world_size=1), 0)
    assert [batch if batch is None else batch[1].tolist() for batch in loader] == [None] * 15 + whole[15:]
    assert sum(data.shards._here) < sum(last_shards._here) == len(data.shards.starts)


# ------------------------------------------------------------------ remote folders


def test_shards_are_fetched_when_they_are_read(digits_mds, tmp_path):
    here = tmp_path / 'cache'
    data = build_dataset('mds', 'train', path=str(here), remote=str(digits_mds))
    assert not list(here.glob('train/*.mds'))
    original = build_dataset('mds', 'train', path=str(digits_mds))
    assert np.array_equal(data.stored(45), original.stored(45))
    assert len(list(here.glob('train/*.mds'))) == 1
    again = build_dataset('mds', 'train', path=str(here), remote=str(digits_mds))  # finds what was fetched before
    batches = DataLoader(again, batch_size=20, num_workers=2)  # two processes want the same shards
    assert torch.equal(torch.cat([labels for _, labels in batches]), original.targets)
    assert {file.name for file in here.glob('train/*.mds')} == {file.name for file in digits_mds.glob('train/*.mds')}
    alone = build_dataset('mds', 'train', path=str(here))
    assert np.array_equal(alone.stored(199), original.stored(199))


def test_the_folder_of_another_data_set_is_refused(digits_mds, copy, tmp_path):
    other = tmp_path / 'other'
    convert('digits', ['limit=90'], 'mds', other)
    with pytest.raises(InputError, match=r'dataset\.json: differs from .*other/dataset\.json: the folder holds other data'):
        build_dataset('mds', 'train', path=str(copy), remote=str(other))
    shutil.copytree(other / 'train', copy / 'train', dirs_exist_ok=True)
    with pytest.raises(InputError, match=r'labels\.npy: its labels do not match dataset\.json'):
        build_dataset('mds', 'train', path=str(copy))


def test_what_was_fetched_in_part_is_fetched_again(copy, digits_mds):
    file = copy / 'train' / 'shard.00000.mds'
    file.write_bytes(file.read_bytes()[:100])
    data = build_dataset('mds', 'train', path=str(copy), remote=str(digits_mds))
    assert len(data.stored(0)) > 0
    assert file.stat().st_size == (digits_mds / 'train' / file.name).stat().st_size


def test_a_full_disk_leaves_no_half_of_a_shard(digits_mds, tmp_path, monkeypatch):
    here = tmp_path / 'cache'
    data = build_dataset('mds', 'train', path=str(here), remote=str(digits_mds))

    def full(source, target):
        Path(target).write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(shutil, 'copy', full)
    with pytest.raises(InputError, match=r'cannot be fetched .*No space left on device'):
        data[0]
    assert not list(here.glob('train/*.mds'))
    monkeypatch.undo()
    assert data[0][1] == int(data.targets[0])


def _killed(here: str, remote: str, started) -> None:
    def slowly(source, target):
        Path(target).write_bytes(b'half')
        started.set()
        multiprocessing.Event().wait()

    shutil.copy = slowly
    build_dataset('mds', 'train', path=here)
    data = build_dataset('mds', 'train', path=here)
    data.shards.remote = f'{remote}/train'
    data[0]


def test_a_process_killed_while_it_fetches_is_in_nobodys_way(digits_mds, copy):
    (copy / 'train' / 'shard.00000.mds').unlink()
    context = multiprocessing.get_context('fork')
    started = context.Event()
    process = context.Process(target=_killed, args=(str(copy), str(digits_mds), started))
    process.start()
    assert started.wait(60)
    process.kill()
    process.join()
    assert list((copy / 'train' / '.fetching').glob('*.mds*'))
    data = build_dataset('mds', 'train', path=str(copy), remote=str(digits_mds))
    assert data[0][1] == int(data.targets[0])


# ------------------------------------------------------------------ faults


def test_faults_name_the_file(copy):
    train = copy / 'train'

    def damage(name, content, message, split='train', index=0):
        before = (train / name).read_bytes()
        (train / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            build_dataset('mds', split, path=str(copy))[index]
        (train / name).write_bytes(before)

    shard = (train / 'shard.00000.mds').read_bytes()
    damage('shard.00000.mds', shard[:-1], r'shard\.00000\.mds: \d+ bytes, its index says \d+: cut off')
    damage('shard.00000.mds', b'\xff' * len(shard), r'shard\.00000\.mds: sample 0 cannot be read')
    damage('index.json', b'{"version": 2', r'index\.json: not an index of MDS shards')
    damage('index.json', json.dumps({'version': 2, 'shards': []}).encode(), r'index\.json: has no samples')
    damage('labels.npy', b'\x93NUMPY', r'labels\.npy: cannot be read')
    (train / 'shard.00000.mds').unlink()
    with pytest.raises(InputError, match=r'shard\.00000\.mds: no such shard, and no dataset\.remote'):
        build_dataset('mds', 'train', path=str(copy))[0]
    (copy / 'dataset.json').write_text('{"like": "digits"}')
    with pytest.raises(InputError, match=r'dataset\.json: not a description that effalgos convert wrote'):
        build_dataset('mds', 'train', path=str(copy))
    with pytest.raises(InputError, match=r'dataset\.path: expected a folder with MDS shards in train/ and eval/ for mds, got none'):
        build_dataset('mds', 'train')
    with pytest.raises(InputError, match=r'dataset\.remote: .*nowhere/train/index\.json cannot be fetched'):
        build_dataset('mds', 'train', path=str(copy / 'empty'), remote=str(copy / 'nowhere'))
