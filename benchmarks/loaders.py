"""Images per second of each data path, alone and under training, beside plain Composer with a ``DataLoader``, in one run.

Two loads: small images (32x32 pixels, decoded in memory, ResNet-18) and large ones (JPEG files, random resized crop to 224x224 pixels,
ResNet-50), both generated, or a folder of CIFAR-10 with ``--cifar``. Paths take turns epoch by epoch, in an order that is turned round each
time. ``no loading`` is the same batch again and again, the most that training can do.

While a path trains, the time that the main process spends in the loader is noted; on a GPU an epoch is profiled as well, and what counts
is how long the GPU had nothing to do meanwhile. At the end, on the device path, InfoBatch's share of saved time over its share of
saved samples, batch by batch in turns as in ``infobatch_overhead.py``.

GPU::

    python benchmarks/loaders.py --device gpu --workers 8

CPU, small enough for two cores::

    python benchmarks/loaders.py --device cpu
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import infobatch_overhead
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import record
import torch
from composer import Callback, Logger, State, Trainer
from composer.algorithms import ChannelsLast
from composer.models import ComposerClassifier
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.convert import convert
from composer_effalgos.datasets.images import ImageArray, small_image_transform
from composer_effalgos.loaders import LOADERS, DeviceDataLoader
from composer_effalgos.models import build_model
from composer_effalgos.plan import EpochPlanner

CLASSES = 10
WAITING = 'waiting for data'
Interval = tuple[float, float]


@dataclass(frozen=True)
class Load:
    """What is read and trained.

    Attributes:
        name: Title of its section.
        model: What is trained.
        source: Name of the data set.
        folder: Where it lies.
        converted: Folder for other formats of it.
        batch_size: Samples in a batch.
        limit: Training samples.
    """

    name: str
    model: str
    source: str
    folder: Path
    converted: Path
    batch_size: int
    limit: int

    def dataset(self, kind: str | None = None) -> Any:
        """The training set, as it is or as ``mds`` or ``beton``."""
        if kind is None:
            return build_dataset(self.source, 'train', path=str(self.folder), limit=self.limit)
        return build_dataset(kind, 'train', path=str(self.converted / kind))


def small_images(count: int, seed: int) -> ImageArray:
    """Decoded images with CIFAR-10's augmentation: a pattern a class, and noise, so that they can be learnt."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count)
    patterns = generator.integers(64, 192, (CLASSES, 32, 32, 3))
    images = np.clip(patterns[labels] + generator.normal(0, 48, (count, 32, 32, 3)), 0, 255).astype(np.uint8)
    transform = small_image_transform(
        size=32, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, padding=4, padding_mode='reflect', flip=True
    )
    return ImageArray(images, torch.from_numpy(labels), [str(name) for name in range(CLASSES)], transform)


def write_small_images(folder: Path, count: int, seed: int) -> None:
    """:func:`small_images` as CIFAR-10's Parquet files."""
    folder.mkdir(parents=True)
    for name, number in (('train', count), ('test', CLASSES)):
        made = small_images(number, seed)
        encoded = []
        for image in made.images:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, 'PNG')
            encoded.append(buffer.getvalue())
        pq.write_table(pa.table({'image': encoded, 'label': made.targets.numpy()}), folder / f'{name}.parquet')


def write_large_images(folder: Path, count: int, seed: int) -> None:
    """JPEG files of 500x375 pixels, as large as ImageNet's are on average, smooth with some noise."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(coarse) + generator.normal(0, 6, (375, 500, 3)), 0, 255).astype(np.uint8)
        for split in ('train', 'val') if number < CLASSES else ('train',):
            path = folder / split / f'{number % CLASSES}' / f'{number}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=90)


def make_loader(load: Load, path: str, args: argparse.Namespace) -> Any:
    """The loader of one path; ``workers`` and ``DataLoader`` differ in the plan, which training adds."""
    dataset = load.dataset({'mds': 'mds', 'ffcv': 'beton'}.get(path))
    if path in LOADERS:
        loader = LOADERS[path](
            dataset, shuffle=True, batch_size=load.batch_size, drop_last=True, seed=args.seed, num_workers=max(1, args.workers)
        )
        if isinstance(loader, DeviceDataLoader):
            loader.load()
        return loader
    loader = DataLoader(
        dataset,
        batch_size=load.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=args.device == 'gpu',
    )
    return infobatch_overhead.SameBatch(next(iter(loader)), len(loader), args.device) if path == 'no loading' else loader


def paths_of(load: Load) -> list[str]:
    """The paths that can carry a load and whose packages are installed: a random resized crop is none of the device path's steps."""
    paths = ['DataLoader', 'workers']
    paths += ['mds'] if importlib.util.find_spec('streaming') else []
    paths += ['ffcv'] if 'ffcv' in LOADERS and importlib.util.find_spec('ffcv') else []
    return [*paths, *(['device'] if load.source != 'image_folder' else [])]


def read_alone(load: Load, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Reads whole epochs, the paths in turns; the first is not counted.

    Returns:
        Images per second of each path, by the clock and, without worker processes, by the process's own time.
    """
    loaders = {path: make_loader(load, path, args) for path in paths_of(load) if path != 'workers'}
    seconds: dict[str, list[float]] = {path: [] for path in loaders}
    cpu_seconds: dict[str, list[float]] = {path: [] for path in loaders}
    samples = load.batch_size * (load.limit // load.batch_size)
    for turn in range(args.repeats + 1):
        for path in list(loaders)[:: 1 if turn % 2 == 0 else -1]:
            started, cpu_started = time.perf_counter(), time.process_time()
            for images, _ in loaders[path]:
                if args.device == 'gpu':
                    images.to('cuda', non_blocking=True)
            _synchronise(args)
            if turn > 0:
                seconds[path].append(time.perf_counter() - started)
                cpu_seconds[path].append(time.process_time() - cpu_started)
    alone = args.workers == 0
    return [
        {
            'path': path,
            'images_per_second': samples / median(seconds[path]),
            'images_per_cpu_second': samples / median(cpu_seconds[path]) if (alone and path != 'ffcv') or path == 'device' else None,
        }
        for path in loaders
    ]


@dataclass(eq=False)
class Watch(Callback):
    """Notes how long an epoch takes, and how much of it the main process spends in the loader."""

    epochs: list[dict[str, float]] = field(default_factory=list)

    def epoch_start(self, state: State, logger: Logger) -> None:
        self.started, self.waited = time.perf_counter(), 0.0
        self.before = int(state.timestamp.sample)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self.asked = time.perf_counter()
        self.range = record_function(WAITING)
        self.range.__enter__()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self.range.__exit__(None, None, None)
        self.waited += time.perf_counter() - self.asked

    def epoch_end(self, state: State, logger: Logger) -> None:
        if state.device.name == 'gpu':
            torch.cuda.synchronize()
        samples = int(state.timestamp.sample) - self.before
        self.epochs.append({'seconds': time.perf_counter() - self.started, 'waited': self.waited, 'samples': samples})


def make_trainer(load: Load, path: str, args: argparse.Namespace) -> tuple[Trainer, Watch]:
    """A trainer that reads on one path."""
    torch.manual_seed(args.seed)
    model = ComposerClassifier(build_model(load.model, CLASSES), num_classes=CLASSES, train_metrics=MetricCollection([]))
    watch = Watch()
    on_gpu = args.device == 'gpu'
    trainer = Trainer(
        model=model,
        train_dataloader=make_loader(load, path, args),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        max_duration='0ep',
        train_subset_num_batches=args.steps or -1,
        algorithms=[ChannelsLast()],
        callbacks=[watch, *([EpochPlanner()] if path not in ('DataLoader', 'no loading') else [])],
        device=args.device,
        precision='amp_bf16' if on_gpu else 'fp32',
        progress_bar=False,
        seed=args.seed,
    )
    return trainer, watch


def train(load: Load, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains epoch by epoch, the paths in turns; the first epoch of each is not counted.

    Returns:
        Of each path: images per second, the share of the time that the main process spent in the loader, and on a GPU the share that the
        GPU spent with nothing to do meanwhile.
    """
    trainers = {path: make_trainer(load, path, args) for path in [*paths_of(load), 'no loading']}
    for turn in range(args.repeats + 1):
        for path in list(trainers)[:: 1 if turn % 2 == 0 else -1]:
            trainers[path][0].fit(duration='1ep')
    results = []
    for path, (trainer, watch) in trainers.items():
        counted = watch.epochs[1:]
        found: dict[str, Any] = {
            'path': path,
            'images_per_second': median(epoch['samples'] / epoch['seconds'] for epoch in counted),
            'in_loader': median(epoch['waited'] / epoch['seconds'] for epoch in counted),
            'gpu_waits': profile_waiting(trainer) if args.device == 'gpu' else None,
        }
        trainer.close()
        results.append(found)
    return results


def profile_waiting(trainer: Trainer) -> float:
    """Share of an epoch's batches that the GPU had nothing to do while the main process was in the loader, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        trainer.fit(duration='50ba')
    events = list(profiler.events())
    busy = [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name != WAITING
    ]
    waiting = [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.name == WAITING and event.device_type == torch.autograd.DeviceType.CPU
    ]
    whole = max(end for _, end in waiting) - min(start for start, _ in waiting)
    return idle_within(waiting[1:], busy) / whole  # before the first batch there is nothing to overlap with


def idle_within(windows: Iterable[Interval], busy: Iterable[Interval]) -> float:
    """How much of the windows, which do not overlap, no busy interval covers; those are in any order and may overlap."""
    joined: list[list[float]] = []
    for start, end in sorted(busy):
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    starts, ends = (np.array([interval[side] for interval in joined]) for side in (0, 1))
    idle = 0.0
    for start, end in windows:
        covered = np.minimum(ends, end) - np.maximum(starts, start) if joined else np.zeros(1)
        idle += end - start - float(np.maximum(covered, 0).sum())
    return idle


def measure_saving(dataset: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    """What InfoBatch saves on the device path."""
    on_gpu = args.device == 'gpu'
    settings = infobatch_overhead.Settings(
        device=args.device,
        model='resnet18_cifar' if on_gpu else 'resnet20_cifar',
        samples=len(dataset),  # type: ignore[arg-type]
        batch_size=128 if on_gpu else 32,
        epochs=args.saving_epochs,
        repeats=args.saving_repeats,
        precision='amp_bf16' if on_gpu else 'fp32',
        seed=args.seed,
    )
    saving = infobatch_overhead.measure_saving(
        settings, lambda settings: DeviceDataLoader(dataset, batch_size=settings.batch_size, shuffle=True)
    )
    return {'model': settings.model, 'images': settings.samples, 'batch_size': settings.batch_size, 'epochs': settings.epochs, **saving}


def _synchronise(args: argparse.Namespace) -> None:
    if args.device == 'gpu':
        torch.cuda.synchronize()


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    text = f'{results["workers"]} worker processes; medians of {results["repeats"]} epochs, paths in turns.\n'
    for load in results['loads']:
        text += f'\n## {load["name"]}\n\n{load["samples"]:,} images, batches of {load["batch_size"]}. Reading alone:\n\n'
        header = ['path', 'images/s', 'images/s of CPU time']
        text += record.table(
            header,
            [[row['path'], f'{row["images_per_second"]:,.0f}', _number(row['images_per_cpu_second'], ',.0f')] for row in load['alone']],
        )
        steps = 'all batches' if not results['steps'] else f'{results["steps"]} batches'
        text += f'\nTraining {load["model"]} with Composer, {steps} an epoch; “DataLoader” is without our plan, “workers” with it:\n\n'
        header = ['path', 'images/s', 'of “no loading”', 'time in the loader', 'GPU waits for data']
        most = load['training'][-1]['images_per_second']
        rows = [
            [
                row['path'],
                f'{row["images_per_second"]:,.1f}',
                f'{row["images_per_second"] / most:.1%}',
                f'{row["in_loader"]:.2%}',
                _number(row['gpu_waits'], '.2%'),
            ]
            for row in load['training']
        ]
        text += record.table(header, rows)
    saving = results['saving']
    if saving is not None:
        text += (
            f'\n## InfoBatch on the device path\n\n{saving["model"]}, {saving["images"]:,} images, batches of {saving["batch_size"]}, '
            f'{saving["epochs"]} epochs of which the first is left out, {len(saving["runs"])} pairs of trainings in turns: saved samples '
            f'{saving["saved_samples"]:.2%}, saved time {saving["saved_time"]:.2%}, saved CPU time {saving["saved_cpu_time"]:.2%}; '
            f'time over samples **{saving["efficiency"]:.3f}**, CPU time over samples **{saving["cpu_efficiency"]:.3f}**.\n'
        )
    return text


def _number(value: float | None, form: str) -> str:
    return '' if value is None else format(value, form)


def main(argv: Sequence[str] | None = None) -> Path:
    """Measures what the command line says and writes ``loaders_<device>.{json,md}``."""
    parser = argparse.ArgumentParser(description='Images per second of each data path, alone and under training.')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder for the results')
    parser.add_argument('--device', choices=('cpu', 'gpu'), default='gpu' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--cifar', type=Path, help='folder of CIFAR-10, in the place of generated small images')
    parser.add_argument('--workers', type=int, help='worker processes; 8 on a GPU, 0 on the CPU when not given')
    parser.add_argument('--samples', type=int, help='small images; 50,000 on a GPU, 2,048 on the CPU when not given')
    parser.add_argument('--large-samples', type=int, help='large images; 5,120 on a GPU, 64 on the CPU when not given; 0 for none')
    parser.add_argument('--batch-size', type=int, help='of the small images; 128 on a GPU, 32 on the CPU when not given')
    parser.add_argument('--large-batch-size', type=int, help='of the large images; 256 on a GPU, 8 on the CPU when not given')
    parser.add_argument('--models', nargs=2, default=['resnet18_cifar', 'torchvision/resnet50'], help='of the small and the large images')
    parser.add_argument('--steps', type=int, help='batches of an epoch of training; all on a GPU, 4 on the CPU when not given')
    parser.add_argument('--repeats', type=int, help='epochs that count; 3 on a GPU, 2 on the CPU when not given')
    parser.add_argument(
        '--saving-samples', type=int, help='images for InfoBatch; 50,000 on a GPU, 4,096 on the CPU when not given; 0 for none'
    )
    parser.add_argument('--saving-epochs', type=int, help='8 on a GPU, 4 on the CPU when not given')
    parser.add_argument('--saving-repeats', type=int, default=2, help='pairs of trainings')
    parser.add_argument('--seed', type=int, default=17)
    args = parser.parse_args(argv)
    on_gpu = args.device == 'gpu'
    defaults = {
        'workers': (8, 0),
        'samples': (50_000, 2_048),
        'large_samples': (5_120, 64),
        'steps': (0, 4),
        'repeats': (3, 2),
        'batch_size': (128, 32),
        'large_batch_size': (256, 8),
        'saving_samples': (50_000, 4_096),
        'saving_epochs': (8, 4),
    }
    for name, (gpu, cpu) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, gpu if on_gpu else cpu)
    with tempfile.TemporaryDirectory(prefix='loaders_') as name:
        folder = Path(name)
        if args.cifar is None:
            write_small_images(folder / 'small', args.samples, args.seed)
        source = args.cifar or folder / 'small'
        loads = [Load('Small images (32x32)', args.models[0], 'cifar10', source, folder / 'small_as', args.batch_size, args.samples)]
        if args.large_samples:
            source = folder / 'large'
            write_large_images(source, args.large_samples, args.seed)
            about = ('Large images (JPEG, random resized crop to 224x224)', args.models[1], 'image_folder', source)
            loads.append(Load(*about, folder / 'large_as', args.large_batch_size, args.large_samples))
        for load in loads:
            for path, kind, to in (('mds', 'mds', 'mds'), ('ffcv', 'beton', 'ffcv')):
                if path in paths_of(load):
                    convert(load.source, [f'path={load.folder}', f'limit={load.limit}'], to, load.converted / kind)
        results: dict[str, Any] = {key: value for key, value in vars(args).items() if key not in ('out', 'cifar')}
        results['loads'] = [
            {
                'name': load.name,
                'model': load.model,
                'samples': load.limit,
                'batch_size': load.batch_size,
                'alone': read_alone(load, args),
                'training': train(load, args),
            }
            for load in loads
        ]
        saving_set = small_images(args.saving_samples, args.seed) if args.saving_samples else None
        results['saving'] = None if saving_set is None else measure_saving(saving_set, args)
    return record.write(args.out, f'loaders_{args.device}', results, markdown(results), title='Data paths')


if __name__ == '__main__':
    record.steady()
    main()
