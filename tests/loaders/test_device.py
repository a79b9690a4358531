import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from composer import Trainer
from composer.algorithms import RandAugment
from composer.models import ComposerClassifier
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import transforms
from torchvision.transforms import v2

from composer_effalgos import AdaBatch, InfoBatch, InputError
from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.images import ImageArray, small_image_transform
from composer_effalgos.loaders import DeviceDataLoader, cache
from composer_effalgos.loaders.device import _together
from composer_effalgos.plan import PlannedDataLoader, plan_epoch, resume_epoch


def small_images(count: int = 61, seed: int = 0, augment: bool = True, cutout: int = 0, size: int = 8) -> ImageArray:
    generator = np.random.default_rng(seed)
    transform = small_image_transform(
        size=size,
        image_size=size,
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
        padding=2 * augment,
        padding_mode='reflect',
        flip=augment,
        cutout=cutout,
    )
    images = generator.integers(0, 256, (count, size, size, 3), np.uint8)
    return ImageArray(images, torch.from_numpy(generator.integers(0, 3, count)), ['a', 'b', 'c'], transform)


@pytest.fixture
def folder(tmp_path):
    """An image folder of 12 images, 10x10 pixels."""
    for index in range(12):
        path = tmp_path / 'images' / 'train' / f'class{index % 2}' / f'{index}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (10, 10, 3), np.uint8)).save(path)
    return tmp_path / 'images'


def whole(loader) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images.clone(), labels.clone()) for images, labels in loader]


def equal(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_without_augmentation_batches_are_those_of_a_data_loader():
    dataset = small_images(augment=False)
    by_device = whole(DeviceDataLoader(dataset, batch_size=16))
    assert equal(by_device, whole(DataLoader(dataset, batch_size=16)))
    assert by_device[0][0].is_contiguous(memory_format=torch.channels_last)


def test_batches_made_together_are_the_same_and_own_their_memory(monkeypatch):
    loader = DeviceDataLoader(small_images(cutout=3), batch_size=4, shuffle=True)
    apart = whole(loader)
    monkeypatch.setattr('composer_effalgos.loaders.device._together', lambda offsets, samples: _together(offsets, 10))
    together = list(loader)
    assert equal(apart, together)
    assert all(column.untyped_storage().nbytes() == column.nbytes for batch in together for column in batch)


@given(sizes=st.lists(st.integers(1, 9), max_size=20), samples=st.integers(0, 30))
def test_ranges_of_batches(sizes, samples):
    offsets = np.cumsum([0, *sizes]).tolist()
    ranges = list(_together(offsets, samples))
    assert [batch for first, last in ranges for batch in range(first, last)] == list(range(len(sizes)))
    for first, last in ranges:
        assert last == first + 1 or offsets[last] - offsets[first] <= samples
        assert last == len(sizes) or offsets[last + 1] - offsets[first] > samples


def test_evaluation_transform_with_resize_and_crop_is_done_once(folder):
    dataset = torchvision.datasets.ImageFolder(
        folder / 'train', v2.Compose([v2.Resize(9), v2.CenterCrop(8), transforms.ToTensor(), v2.Normalize((0.5,) * 3, (0.2,) * 3)])
    )
    loader = DeviceDataLoader(dataset, batch_size=5)
    assert equal(whole(loader), whole(DataLoader(dataset, batch_size=5)))
    for path, _ in dataset.samples:
        Path(path).unlink()
    assert len(whole(loader)) == 3
    assert isinstance(dataset.transform, v2.Compose)


@pytest.mark.parametrize('world_size', [1, 2])
def test_a_plan_gives_the_samples_of_the_worker_path(world_size):
    dataset = small_images(augment=False)
    plan = resume_epoch(
        plan_epoch(torch.arange(5, 61), None, 8, seed=1, epoch=2, world_size=world_size), batches=1, batch_size=8, world_size=world_size
    )
    for rank in range(world_size):
        epochs = []
        for path in (DeviceDataLoader(dataset, batch_size=8, shuffle=True), DataLoader(dataset, batch_size=8, shuffle=True)):
            loader = PlannedDataLoader(path, seed=1, rank=rank, world_size=world_size)
            loader.set_plan(plan, 2)
            batches = list(loader)
            assert batches[0] is None
            epochs.append(batches[1:])
        assert equal(*epochs)


def test_augmentation_is_the_same_at_any_rank_count_batch_size_and_after_a_resume():
    dataset = small_images(cutout=3)

    def images_by_sample(world_size, batch_size, batches_done=0, epoch=2):
        plan = plan_epoch(torch.arange(61), None, batch_size, seed=1, epoch=epoch, world_size=world_size)
        plan = resume_epoch(plan, batches=batches_done, batch_size=batch_size, world_size=world_size)
        found = {}
        for rank in range(world_size):
            loader = PlannedDataLoader(DeviceDataLoader(dataset, batch_size=batch_size), seed=1, rank=rank, world_size=world_size)
            loader.set_plan(plan, epoch)
            images = torch.cat([batch[0] for batch in loader if batch is not None])
            found |= dict(zip(loader.rank_order.tolist(), images, strict=True))
        return found

    alone = images_by_sample(1, 16)
    assert sorted(alone) == list(range(61))
    for other in (images_by_sample(2, 8), images_by_sample(3, 5), images_by_sample(1, 7), images_by_sample(1, 16, batches_done=2)):
        assert all(torch.equal(alone[sample], image) for sample, image in other.items())
    next_epoch = images_by_sample(1, 16, epoch=3)
    assert sum(torch.equal(alone[sample], next_epoch[sample]) for sample in alone) < 10


@pytest.mark.parametrize('num_workers', [0, 1])
def test_training_generators_are_untouched(num_workers):
    loader = DeviceDataLoader(small_images(cutout=2), batch_size=8, shuffle=True, num_workers=num_workers)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    loader.load()
    list(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


def test_the_selection_pass_reads_on_the_device():
    loader = PlannedDataLoader(DeviceDataLoader(small_images(augment=False), batch_size=8), seed=1)
    images, labels = (torch.cat(column) for column in zip(*loader.read(range(3, 40, 2), 7), strict=True))
    dataset = small_images(augment=False)
    assert torch.equal(images, torch.stack([dataset[index][0] for index in range(3, 40, 2)]))
    assert labels.tolist() == [dataset[index][1] for index in range(3, 40, 2)]


def network() -> ComposerClassifier:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    return ComposerClassifier(module, num_classes=3)


def train(loader, algorithms=(), *, eval_loader=None, **settings) -> Trainer:
    model = network()
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        eval_dataloader=eval_loader,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=list(algorithms),
        device='cpu',
        progress_bar=False,
        seed=1,
        **{'max_duration': '4ep', **settings},
    )
    trainer.fit()
    return trainer


def losses(trainer: Trainer) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in trainer.state.model.state_dict().values()])


def test_training_and_evaluation_give_what_the_worker_path_gives():
    dataset, held_out = small_images(augment=False), small_images(40, seed=1, augment=False)
    runs = [
        train(
            kind(dataset, batch_size=8, shuffle=True),
            [InfoBatch(), AdaBatch(interval='2ep', max_batch_size=32)],
            eval_loader=kind(held_out, batch_size=16),
        )
        for kind in (DeviceDataLoader, DataLoader)
    ]
    # the memory format decides which convolution runs, so the last bits may differ
    torch.testing.assert_close(*(losses(run) for run in runs), rtol=1e-5, atol=1e-6)
    accuracies = [run.state.eval_metrics['eval']['MulticlassAccuracy'].compute().item() for run in runs]
    assert accuracies[0] == accuracies[1]
    assert 0 < accuracies[0] < 1
    assert [run.state.timestamp.sample for run in runs] == [runs[0].state.timestamp.sample] * 2


def test_a_run_resumed_in_mid_epoch_is_the_run_that_was_not_stopped(tmp_path):
    def loader():
        return DeviceDataLoader(small_images(cutout=2), batch_size=8, shuffle=True)

    straight = train(loader(), [InfoBatch()])
    train(loader(), [InfoBatch()], save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt')
    resumed = train(loader(), [InfoBatch()], load_path=str(tmp_path / 'ba11.pt'))
    assert torch.equal(losses(straight), losses(resumed))


def test_refuses_a_transform_that_an_algorithm_changed():
    loader = DeviceDataLoader(small_images(), batch_size=8)
    with pytest.raises(InputError, match='transform of ImageArray was changed'):
        train(loader, [RandAugment(), InfoBatch()])


@pytest.mark.parametrize(
    ('dataset', 'message'),
    [
        (TensorDataset(torch.zeros(4, 3)), 'got TensorDataset without one'),
        (build_dataset('synthetic', 'train', num_samples=4), 'got Synthetic without one'),
        (Subset(TensorDataset(torch.zeros(4, 3)), [1, 2]), 'got TensorDataset without one'),
    ],
)
def test_refuses_data_without_a_transform(dataset, message):
    with pytest.raises(InputError, match=message):
        DeviceDataLoader(dataset, batch_size=2)


def test_refuses_images_of_several_sizes(folder):
    Image.new('RGB', (10, 11)).save(folder / 'train' / 'class1' / 'z.png')
    dataset = torchvision.datasets.ImageFolder(folder / 'train', transforms.ToTensor())
    with pytest.raises(InputError, match='expected images of one size, 10x10, got 10x11 for sample 12'):
        DeviceDataLoader(dataset, batch_size=2).load()


def test_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr('psutil.virtual_memory', lambda: type('', (), {'available': 1000})())
    with pytest.raises(InputError, match=r'take 0\.0 GB.*free'):
        DeviceDataLoader(small_images(), batch_size=2).load()


def test_subsets_and_torchvision_data_sets():
    dataset = small_images(augment=False)
    subset = Subset(dataset, [3, 60, 7])
    assert equal(whole(DeviceDataLoader(subset, batch_size=2)), whole(DataLoader(subset, batch_size=2)))
    fake = torchvision.datasets.FakeData(9, (3, 6, 6), 2, transform=transforms.ToTensor())
    assert equal(whole(DeviceDataLoader(fake, batch_size=4, num_workers=1)), whole(DataLoader(fake, batch_size=4)))


# ------------------------------------------------------------------ cache


class Counting(ImageArray):
    reads = 0

    def __getitem__(self, index):
        Counting.reads += 1
        return super().__getitem__(index)


@pytest.fixture
def counting():
    Counting.reads = 0
    plain = small_images(augment=False)
    return Counting(plain.images, plain.targets, plain.classes, plain.transform)


def test_cached_images_are_decoded_once(counting, tmp_path):
    first = whole(DeviceDataLoader(counting, batch_size=8, cache=tmp_path / 'new' / 'folder'))
    assert Counting.reads == 61
    assert equal(first, whole(DeviceDataLoader(counting, batch_size=8, cache=tmp_path / 'new' / 'folder')))
    assert Counting.reads == 61
    assert [path.suffix for path in (tmp_path / 'new' / 'folder').iterdir()] == ['.npz']


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == 'cut off':
        del data[len(data) // 2 :]
    elif how == 'empty':
        data.clear()
    elif how == 'a bit':
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize('how', ['cut off', 'empty', 'a bit'])
def test_a_damaged_cache_is_decoded_again(counting, tmp_path, how):
    first = whole(DeviceDataLoader(counting, batch_size=8, cache=tmp_path))
    (file,) = tmp_path.iterdir()
    intact = file.read_bytes()
    damage(file, how)
    with pytest.warns(UserWarning, match=f'{file.name}: not used'):
        second = whole(DeviceDataLoader(counting, batch_size=8, cache=tmp_path))
    assert equal(first, second)
    assert Counting.reads == 122
    assert len(file.read_bytes()) == len(intact)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert equal(first, whole(DeviceDataLoader(counting, batch_size=8, cache=tmp_path)))


def test_a_cache_of_another_data_set_is_not_used(tmp_path):
    one, other = small_images(seed=1), small_images(seed=2)
    DeviceDataLoader(one, batch_size=8, cache=tmp_path).load()
    (file,) = tmp_path.iterdir()
    wanted = cache.identity_of(other)
    file.rename(tmp_path / f'{wanted[:32]}.npz')  # by mistake, or by a collision of names
    with pytest.warns(UserWarning, match="another dataset's images"):
        assert cache.load(tmp_path, wanted) is None


@pytest.mark.parametrize('full_after', [0, 1000])
def test_a_full_disk_leaves_nothing_behind_and_the_run_goes_on(counting, tmp_path, monkeypatch, full_after):
    def savez(file, **arrays):
        file.write(b'x' * full_after)
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(np, 'savez', savez)
    with pytest.warns(UserWarning, match='not written .No space left on device.'):
        batches = whole(DeviceDataLoader(counting, batch_size=8, cache=tmp_path))
    assert equal(batches, whole(DataLoader(small_images(augment=False), batch_size=8)))
    assert list(tmp_path.iterdir()) == []


def test_identity_changes_with_what_is_decoded(folder):
    def identity(**changes):
        dataset = torchvision.datasets.ImageFolder(folder / 'train', transforms.ToTensor())
        return cache.identity_of(Subset(dataset, changes['subset']) if 'subset' in changes else dataset, *changes.get('how', ()))

    first = identity()
    assert identity() == first
    others = [identity(subset=[0, 1]), identity(subset=[1, 0]), identity(how=('Resize(8)',)), identity(how=('Resize', '(8)'))]
    path = folder / 'train' / 'class0' / '0.png'
    Image.new('RGB', (10, 10)).save(path)
    others.append(identity())
    os.utime(path, ns=(0, 0))
    others.append(identity())
    assert len({first, *others}) == 7
    assert cache.identity_of(small_images(seed=0)) != cache.identity_of(small_images(seed=1))


def test_identity_of_a_data_set_of_another_kind():
    class Own(TensorDataset):
        pass

    with pytest.raises(InputError, match=r'Own.*fingerprint'):
        cache.identity_of(Own(torch.zeros(3)))
    Own.fingerprint = lambda self: 'version 1'
    assert len(cache.identity_of(Own(torch.zeros(3)))) == 64


def test_parquet_images_are_told_apart(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / 'train.parquet'
    image = tmp_path / 'image.png'
    Image.new('RGB', (4, 4)).save(image)
    images = [image.read_bytes()] * 6
    pq.write_table(pa.table({'image': images, 'label': [0, 1] * 3, 'image2': images, 'label2': [1, 0] * 3}), path)

    def identity(**options):
        return cache.identity_of(build_dataset('image_parquet', 'train', path=str(tmp_path), **options))

    assert identity() == identity()
    others = [identity(limit=3), identity(label_column='label2'), identity(image_column='image2')]
    assert len({identity(), *others}) == 4


def test_a_cache_is_refused_beside_a_transform_of_the_labels(tmp_path):
    transform = torchvision.transforms.ToTensor()
    data = torchvision.datasets.FakeData(4, (3, 8, 8), transform=transform, target_transform=lambda label: 0 * label)
    with pytest.raises(InputError, match=r'^cache: the labels of FakeData cannot be identified, because it has a target_transform'):
        DeviceDataLoader(data, batch_size=2, cache=tmp_path).load()
    DeviceDataLoader(data, batch_size=2).load()
