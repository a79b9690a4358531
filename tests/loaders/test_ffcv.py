"""ffcv's path, with the real library."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from composer.models import ComposerClassifier
from PIL import Image

from composer_effalgos import AdaBatch, InfoBatch
from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.convert import convert
from composer_effalgos.loaders import DeviceDataLoader, FfcvDataLoader
from composer_effalgos.plan import PlannedDataLoader, Reading, plan_epoch, resume_epoch
from composer_effalgos.utils.errors import InputError

pytest.importorskip('ffcv', reason='needs ffcv; make setup-ffcv builds it')
from composer_effalgos.loaders import ffcv as path_module
from composer_effalgos.loaders import ffcv_parts

LIMIT = 100


@pytest.fixture(scope='module')
def digits_beton(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('beton')
    convert('digits', [f'limit={LIMIT}'], 'ffcv', out)
    return out


@pytest.fixture(scope='module')
def digits(digits_beton) -> FfcvDataLoader:
    """Shared by the tests: it is compiled once."""
    return FfcvDataLoader(build_dataset('beton', 'train', path=str(digits_beton)), batch_size=8, shuffle=True)


def photo(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colours, as of a photograph: what a resize does to noise says nothing."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of JPEG and PNG files of several sizes, and its .beton files."""
    folder, out = tmp_path_factory.mktemp('photos'), tmp_path_factory.mktemp('photos_beton')
    for number in range(12):
        place = folder / ('val' if number > 7 else 'train') / ('cat', 'dog')[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(photo(70 + 7 * number, 150 - 8 * number, number))
        image.save(place / f'{number}.png') if number % 4 == 3 else image.save(place / f'{number}.jpg', quality=92)
    convert('image_folder', [f'path={folder}'], 'ffcv', out)
    return folder, out


@pytest.fixture(scope='module')
def photos_train(photos) -> FfcvDataLoader:
    return FfcvDataLoader(build_dataset('beton', 'train', path=str(photos[1]), image_size=32), batch_size=4, num_workers=2)


def planned(path, plan, *, seed=3, epoch=5, rank=0, world_size=1) -> list:
    loader = PlannedDataLoader(path, seed=seed, rank=rank, world_size=world_size)
    loader.set_plan(plan, epoch)
    return list(loader)


@pytest.mark.parametrize('world_size', [1, 2])
@pytest.mark.parametrize('done', [0, 3])
def test_the_plans_samples_augmented_as_on_the_device_path(digits, world_size, done, monkeypatch):
    """Bit by bit: both draw from the samples' own streams. Batches of several sizes go through what was compiled for one."""
    original = DeviceDataLoader(build_dataset('digits', 'train', limit=LIMIT), batch_size=8)
    plan = plan_epoch(torch.arange(4, LIMIT), None, lambda b, s: 4 + 3 * (b // 2), seed=3, epoch=5, world_size=world_size)
    assert len(set(plan.sizes)) > 3
    plan = resume_epoch(plan, batches=done, batch_size=8, world_size=world_size)
    decoded = []
    make = ffcv_parts.Epoch
    monkeypatch.setattr(ffcv_parts, 'Epoch', lambda *args: decoded.extend(args[2]) or make(*args))
    for rank in range(world_size):
        decoded.clear()
        ours = planned(digits, plan, rank=rank, world_size=world_size)
        reference = planned(original, plan, rank=rank, world_size=world_size)
        assert len(ours) == len(reference) == plan.num_batches
        assert ours[:done] == [None] * done
        assert np.concatenate(decoded).tolist() == plan.rank_order(rank, world_size).tolist()  # what was done is not decoded
        for batch, expected in zip(ours[done:], reference[done:], strict=True):
            assert torch.equal(batch[0], expected[0])
            assert torch.equal(batch[1], expected[1])


def test_a_batch_that_is_held_does_not_change(digits):
    """ffcv decodes into the same few buffers again and again."""
    batches = iter(digits)
    held = [next(batches) for _ in range(3)]
    copies = [[part.clone() for part in batch] for batch in held]
    rest = list(batches)
    assert len(rest) > digits._loader.batches_ahead + 2
    for batch, copy in zip(held, copies, strict=True):
        assert all(torch.equal(part, before) for part, before in zip(batch, copy, strict=True))
    pointers = {batch[0].untyped_storage().data_ptr() for batch in held}
    assert len(pointers) == 3


def test_an_iteration_may_be_given_up(digits):
    before = len([thread for thread in threading.enumerate() if type(thread).__name__ == 'Epoch'])
    for _ in range(3):
        batches = iter(digits)
        next(batches)
        batches.close()
    assert len([t for t in threading.enumerate() if type(t).__name__ == 'Epoch']) == before
    assert len(list(digits)) == 13


def test_a_thread_that_dies_is_an_error_and_not_a_wait(digits, monkeypatch):
    def broken(*args):
        raise MemoryError('no memory left')

    batches = iter(digits)
    next(batches)
    with monkeypatch.context() as patch:
        patch.setattr('ffcv.loader.epoch_iterator.EpochIterator.run_pipeline', broken)
        with pytest.raises(MemoryError, match='no memory left'):
            list(digits)
    batches.close()
    assert len(list(digits)) == 13


def test_torch_keeps_its_threads(digits_beton):
    torch.set_num_threads(2)
    try:
        list(FfcvDataLoader(build_dataset('beton', 'eval', path=str(digits_beton)), batch_size=100))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@pytest.mark.skipif(not hasattr(os, 'sched_setaffinity'), reason='the system cannot keep a process to one CPU')
def test_python_ends_on_a_single_cpu(digits_beton):
    """There numba's TBB, which ffcv starts in a thread, would be waited for when Python ends, for ever."""
    code = f"""
import os
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
import threading
from composer_effalgos.datasets import build_dataset
from composer_effalgos.loaders import FfcvDataLoader
def read():
    print(sum(len(labels) for _, labels in FfcvDataLoader(build_dataset('beton', 'train', path={str(digits_beton)!r}), batch_size=8)))
reader = threading.Thread(target=read)
reader.start()
reader.join()
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (0, f'{LIMIT}\n'), done.stderr


def test_trains_as_on_the_device_path(digits, make_trainer, weights_of):
    def train(path):
        torch.manual_seed(0)
        model = ComposerClassifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)), num_classes=10)
        algorithms = [InfoBatch(), AdaBatch(interval='2ep', max_batch_size=20)]
        trainer = make_trainer(algorithms, model=model, train_loader=path, max_duration='4ep')
        trainer.fit()
        return trainer.recorder.sizes, weights_of(trainer)

    device = DeviceDataLoader(build_dataset('digits', 'train', limit=LIMIT), batch_size=8, shuffle=True)
    (sizes, weights), (expected_sizes, expected) = train(digits), train(device)
    assert sizes == expected_sizes
    assert len({size for epoch in sizes for size in epoch}) > 2
    assert torch.equal(weights, expected)


# ------------------------------------------------------------------ photographs: decoded, cropped and resized by ffcv


def test_photographs_to_evaluate_look_as_torchvision_makes_them(photos):
    path = FfcvDataLoader(build_dataset('beton', 'eval', path=str(photos[1]), image_size=32), batch_size=4, num_workers=2)
    original = build_dataset('image_folder', 'eval', path=str(photos[0]), image_size=32)
    ((images, labels),) = list(path)
    assert labels.tolist() == original.targets.tolist()
    assert images.is_contiguous(memory_format=torch.channels_last)
    for image, index in zip(images, range(4), strict=True):
        difference = (image - original[index][0]).abs() * 0.225 * 255  # of 256 levels
        # other decoder (fast DCT), other resampling (area), boxes rounded to whole pixels
        assert difference.mean() < 2
        assert difference.max() < 16


def test_photographs_to_train(photos, photos_train):
    """Each output is the box, resized by cv2 as ffcv does it, flipped or not."""
    import cv2

    data = photos_train.dataset
    stored = [data.stored(index) for index in range(8)]
    originals = [np.asarray(Image.open(io.BytesIO(image))) if isinstance(image, bytes) else image for image in stored]
    indices = torch.tensor([5, 0, 3, 7, 2])
    assert len({type(stored[index]) for index in indices.tolist()}) == 2
    seed = 11
    ((images, labels),) = list(photos_train.read_batches(Reading(indices, [0, 5], seed, [0])))
    assert labels.tolist() == data.targets[indices].tolist()
    heights, widths = data.sizes[indices].T.numpy()
    boxes = photos_train._decoding.boxes(path_module.stream_seed(seed, 1), indices.numpy(), heights, widths)
    flips = photos_train._transform.draw(seed, indices, 32, 32)[2]
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for image, index, (top, left, tall, wide), flip in zip(images, indices.tolist(), boxes.tolist(), flips.tolist(), strict=True):
        expected = cv2.resize(originals[index][top : top + tall, left : left + wide], (32, 32), interpolation=cv2.INTER_AREA)
        expected = torch.from_numpy(expected[:, ::-1].copy() if flip else expected).permute(2, 0, 1)
        found = ((image * std + mean) * 255).round()
        exact = not isinstance(stored[index], bytes)  # stored as pixels; JPEG files go through another decoder than PIL's
        assert (found - expected).abs().max() <= (0 if exact else 12)
        assert (found - expected).abs().mean() < 1.5


def test_boxes_are_random_resized_crops():
    """The law of torchvision's get_params, over many draws."""
    samples = np.arange(4000)
    heights, widths = np.full(4000, 120), np.full(4000, 200)
    found = path_module.random_resized_boxes(3, samples, heights, widths, (0.08, 1.0), (3 / 4, 4 / 3))
    top, left, tall, wide = found.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert ((top + tall <= 120) & (left + wide <= 200)).all()
    image = torch.zeros(3, 120, 200)
    expected = np.array([torchvision.transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in samples])
    for column, other in zip(found.T, expected.T, strict=True):
        quantiles = [np.quantile(values, np.linspace(0.05, 0.95, 10)) for values in (column, other)]
        assert np.abs(quantiles[0] - quantiles[1]).max() <= 7
    again = path_module.random_resized_boxes(3, samples[::-1], heights, widths, (0.08, 1.0), (3 / 4, 4 / 3))
    assert np.array_equal(again[::-1], found)  # a sample's box is its own
    thin = path_module.random_resized_boxes(3, samples[:5], np.full(5, 10), np.full(5, 900), (1.0, 1.0), (3 / 4, 4 / 3))
    assert thin.tolist() == [[0, 443, 10, 13]] * 5  # none fits: torchvision's middle


def test_a_broken_jpeg_is_named(photos_train):
    data = photos_train.dataset
    place, length = int(data._places[0]), int(data._lengths[0])
    whole = data.file.read_bytes()
    reading = Reading(torch.tensor([0]), [0, 1], 1, [0])
    ((expected, _),) = list(photos_train.read_batches(reading))
    try:
        data.file.write_bytes(whole[:place] + bytes(length) + whole[place + length :])
        with pytest.raises(InputError, match=r'train\.beton: sample 0: corrupt image'):
            list(photos_train.read_batches(reading))
    finally:
        data.file.write_bytes(whole)
    ((again, _),) = list(photos_train.read_batches(reading))
    assert torch.equal(again, expected)


# ------------------------------------------------------------------ faults


def test_a_file_that_is_cut_off_or_something_else(digits_beton, tmp_path):
    whole = (digits_beton / 'train.beton').read_bytes()
    for name in ('dataset.json', 'eval.beton'):
        (tmp_path / name).write_bytes((digits_beton / name).read_bytes())
    file = tmp_path / 'train.beton'
    for length in (0, 10, 40, 1000, 3000, 5000, len(whole) // 2, len(whole) - 30, len(whole) - 24, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r'train\.beton: (not a \.beton file, or cut off|cut off or damaged)'):
            build_dataset('beton', 'train', path=str(tmp_path))
    file.write_bytes(whole[:16] + bytes(8) + whole[24:])  # a writer that was killed has written no place of the table
    with pytest.raises(InputError, match=r'train\.beton: (not a \.beton file, or cut off|cut off or damaged)'):
        build_dataset('beton', 'train', path=str(tmp_path))
    file.write_bytes((digits_beton / 'eval.beton').read_bytes())
    with pytest.raises(InputError, match=r'train\.beton: its labels do not match dataset\.json'):
        build_dataset('beton', 'train', path=str(tmp_path))
    file.unlink()
    with pytest.raises(InputError, match=r'train\.beton: no such file; effalgos convert --to ffcv writes it'):
        build_dataset('beton', 'train', path=str(tmp_path))


def test_what_it_refuses(digits, photos):
    with pytest.raises(InputError, match=r'expected a \.beton file .* got ImageArray'):
        FfcvDataLoader(build_dataset('digits', 'train'), batch_size=4)
    data = build_dataset('beton', 'train', path=str(photos[1]), image_size=32)
    data.transform = torchvision.transforms.Compose(data.transform.transforms[1:])
    with pytest.raises(InputError, match='expected a transform that begins with RandomResizedCrop'):
        FfcvDataLoader(data, batch_size=4)
    data.transform = torchvision.transforms.Compose([torchvision.transforms.CenterCrop(9), *data.transform.transforms])
    with pytest.raises(InputError, match=r'got Compose\(.*CenterCrop'):
        FfcvDataLoader(data, batch_size=4)
    steps = digits.dataset.transform.transforms
    steps.insert(0, torchvision.transforms.RandAugment())
    try:
        with pytest.raises(InputError, match='changed after it had been read, by an algorithm such as RandAugment'):
            next(iter(digits))
    finally:
        steps.pop(0)


def test_a_copy_on_a_full_disk_is_not_taken_for_whole(tmp_path, monkeypatch):
    """Unbuffered writes, as ffcv's, may be cut off without an error."""
    monkeypatch.setattr('ffcv.memory_allocator.MemoryAllocator.flush_page', lambda self: None)
    with pytest.raises(InputError, match='not written in full, the disk may be full; nothing unfinished was kept'):
        convert('digits', ['limit=10'], 'ffcv', tmp_path)
    assert not list(tmp_path.iterdir())


def test_resized_digits_look_as_torchvision_makes_them(digits_beton):
    path = FfcvDataLoader(build_dataset('beton', 'eval', path=str(digits_beton), image_size=16), batch_size=36)
    original = build_dataset('digits', 'eval', image_size=16)
    images = torch.cat([batch[0] for batch in path])
    assert images.shape == (360, 3, 16, 16)
    assert max((images[index] - original[index][0]).abs().max() for index in range(360)) * 0.376 * 255 <= 1.01  # one level of rounding
