"""What Composer's own loop costs a step, and what of it its options avoid.

The same network is trained by a plain PyTorch loop and by Composer with one option after the other, all in one process and in turns, batch
by batch, on batches that lie in memory on the device. What a step costs beyond the plain loop's is Composer's. A network of one linear
layer shows the cost by itself; a residual network shows what the number of its modules adds, and on a GPU the share of a real step.

A further run under ``cProfile`` says where the cost is. With ``--device gpu`` a turn ends with a synchronisation.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import os
import pstats
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from composer import Trainer
from composer.loggers import TensorboardLogger
from composer.models import ComposerClassifier
from infobatch_overhead import Relay, Runner, SameBatch, Turn, take_turns
from torchmetrics import MetricCollection

from composer_effalgos.models import build_model

CLASSES = 10
# What is added to Composer without train metrics and loggers: (name, settings of the Trainer, whether train metrics are measured)
VARIANTS: list[tuple[str, dict[str, Any], bool]] = [
    ('Composer, no train metrics, no logger', {}, False),
    ('with train metrics (the default)', {}, True),
    ('with microbatches of half the batch', {'device_train_microbatch_size': 0.5}, False),
    ('with TensorBoard', {'tensorboard': True}, False),
    ('with the progress bar (the default)', {'progress_bar': True}, False),
    ('with console logging of every batch', {'log_to_console': True, 'console_log_interval': '1ba'}, False),
]
# Where Composer's code spends a step: (what, end of the file, function)
PLACES = [
    ('events of algorithms and callbacks', 'composer/core/engine.py', 'run_event'),
    ('train metrics: update, with the model switched to evaluation and back', 'composer/trainer/trainer.py', '_eval_train_metrics'),
    ('train metrics: their value, every batch', 'composer/trainer/trainer.py', '_compute_and_log_metrics'),
    ('deep copy of each microbatch', 'copy.py', 'deepcopy'),
    ('splitting into microbatches', 'composer/core/data_spec.py', '_default_split_batch'),
    ('samples, tokens and seconds of all ranks', 'composer/trainer/trainer.py', '_accumulate_time_across_ranks'),
    ('the timestamp', 'composer/core/time.py', 'to_next_batch'),
    ('logging', 'composer/loggers/logger.py', 'log_metrics'),
    ('memory statistics of the GPU', 'torch/cuda/memory.py', 'memory_stats'),
]  # fmt: skip


def make_batches(args: argparse.Namespace) -> SameBatch:
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    batch = [torch.randn(shape, generator=generator), torch.randint(CLASSES, shape[:1], generator=generator)]
    return SameBatch(batch, args.steps, args.device)


def make_network(name: str, args: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(args.seed)
    if name == 'linear':
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * args.image_size**2, CLASSES))
    return build_model(name, CLASSES)


def make_trainer(name: str, settings: dict[str, Any], train_metrics: bool, args: argparse.Namespace, **more: Any) -> Trainer:
    model = ComposerClassifier(
        make_network(name, args), num_classes=CLASSES, **({} if train_metrics else {'train_metrics': MetricCollection([])})
    )
    settings = {'progress_bar': False, **settings}
    if settings.pop('tensorboard', False):
        settings['loggers'] = [TensorboardLogger(log_dir=tempfile.mkdtemp(prefix='composer_step_'))]
    if 'device_train_microbatch_size' in settings:
        settings['device_train_microbatch_size'] = round(settings['device_train_microbatch_size'] * args.batch_size)
    return Trainer(
        model=model,
        train_dataloader=make_batches(args),
        optimizers=torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        max_duration='1ep',
        device=args.device,
        precision=args.precision,
        console_stream=Path(os.devnull).open('w'),
        seed=args.seed,
        **settings,
        **more,
    )


def plain_loop(name: str, relay: Relay, args: argparse.Namespace) -> Callable[[], None]:
    """What one writes without Composer; the loss is read every step, as Composer does."""
    device = 'cuda' if args.device == 'gpu' else 'cpu'
    network = make_network(name, args).to(device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    on_gpu = args.precision != 'fp32'

    def run() -> None:
        network.train()
        for step, (images, labels) in enumerate(make_batches(args)):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast('cuda', torch.bfloat16) if on_gpu else contextlib.nullcontext():
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            loss.item()
            relay.batch_done(0, (step + 1) / args.steps, 0, step, len(labels))

    return run


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Trains one network in all ways, in turns; gives median microseconds a step of each way: of the CPU's time and of the clock's."""
    relay = Relay(1 + len(VARIANTS), torch.cuda.synchronize if args.device == 'gpu' else lambda: None)
    trainers = [
        make_trainer(name, settings, metrics, args, callbacks=[Runner(relay, who)])
        for who, (_, settings, metrics) in enumerate(VARIANTS, start=1)
    ]
    turns = take_turns(relay, [plain_loop(name, relay, args), *(trainer.fit for trainer in trainers)])
    for trainer in trainers:
        trainer.close()
    names = ['plain PyTorch loop', *(variant for variant, _, _ in VARIANTS)]
    return {
        'network': name,
        'modules': sum(1 for _ in make_network(name, args).modules()),
        'steps': args.steps,
        'ways': [{'way': way, **compare_turns(found, *turns[:2])} for way, found in zip(names, turns, strict=True)],
    }


def compare_turns(turns: Sequence[Turn], plain: Sequence[Turn], bare: Sequence[Turn]) -> dict[str, float]:
    """A step's time, and the differences step by step from the plain PyTorch loop and from Composer without metrics and loggers.

    Medians over the steps, the first tenth left out, in microseconds.
    """
    steps = list(zip(turns, plain, bare, strict=True))[len(turns) // 10 :]
    return {
        'microseconds': 1e6 * median(ours.seconds for ours, _, _ in steps),
        'over_plain': 1e6 * median(ours.seconds - other.seconds for ours, other, _ in steps),
        'over_bare': 1e6 * median(ours.seconds - other.seconds for ours, _, other in steps),
        'cpu_microseconds': 1e6 * median(ours.cpu_seconds for ours, _, _ in steps),
        'cpu_over_plain': 1e6 * median(ours.cpu_seconds - other.cpu_seconds for ours, other, _ in steps),
        'cpu_over_bare': 1e6 * median(ours.cpu_seconds - other.cpu_seconds for ours, _, other in steps),
    }


def profile_loop(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Composer's defaults under ``cProfile``: microseconds a step in each of :data:`PLACES`, what they call included."""
    trainer = make_trainer(name, {}, True, args)
    profiler = cProfile.Profile(time.perf_counter if args.device == 'gpu' else time.process_time)
    profiler.enable()
    trainer.fit()
    profiler.disable()
    trainer.close()
    found = []
    stats: dict[tuple[str, int, str], tuple[int, int, float, float, Any]] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    for what, file, function in PLACES:
        for (path, _, called), (primitive, _, _, cumulated, _) in stats.items():
            if path.endswith(file) and called == function:
                found.append({'what': what, 'calls_a_step': primitive / args.steps, 'microseconds': 1e6 * cumulated / args.steps})
    return found


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    text = (
        f'Batches of {results["batch_size"]}, images of {results["image_size"]}x{results["image_size"]} pixels, {results["precision"]}; '
        'medians over the steps and over differences step by step. '
        + (
            'Times are the clock’s.\n'
            if results['precision'] != 'fp32'
            else 'Times are the process’s (CPU time), which other work on the machine does not lengthen.\n'
        )
    )
    for network in results['networks']:
        clock = 'microseconds' if results['precision'] != 'fp32' else 'cpu_microseconds'
        prefix = clock.removesuffix('microseconds')
        text += f'\n## {network["network"]} ({network["modules"]} modules), {network["steps"]} steps\n\n'
        rows = [
            [
                way['way'],
                f'{way[clock]:.0f}',
                f'{way[f"{prefix}over_plain"]:+.0f}' if number > 0 else '',
                f'{way[f"{prefix}over_bare"]:+.0f}' if number > 1 else '',
            ]
            for number, way in enumerate(network['ways'])
        ]
        text += record.table(['', 'µs a step', 'more than the plain loop', 'more than Composer without it'], rows)
        text += '\nComposer’s defaults under cProfile, which makes every call dearer; what a place calls is in it:\n\n'
        header = ['where', 'calls a step', 'µs a step']
        text += record.table(header, [[p['what'], f'{p["calls_a_step"]:.1f}', f'{p["microseconds"]:.0f}'] for p in network['profile']])
    return text


def main(argv: Sequence[str] | None = None) -> Path:
    """Measures what the command line says and writes ``composer_step_<device>.{json,md}``."""
    parser = argparse.ArgumentParser(description='The cost of Composer in a training step.')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder for the results')
    parser.add_argument('--device', choices=('cpu', 'gpu'), default='gpu' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--networks', nargs='+', help='linear and names that recipes know')
    parser.add_argument('--image-size', type=int, help='32 on a GPU, 8 on the CPU when not given')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--seed', type=int, default=17)
    args = parser.parse_args(argv)
    on_gpu = args.device == 'gpu'
    args.networks = args.networks or ['linear', 'resnet18_cifar' if on_gpu else 'resnet20_cifar']
    args.image_size = args.image_size or (32 if on_gpu else 8)
    args.precision = 'amp_bf16' if on_gpu else 'fp32'
    results: dict[str, Any] = {key: getattr(args, key) for key in ('batch_size', 'image_size', 'precision', 'seed')}
    results['networks'] = [compare(name, args) | {'profile': profile_loop(name, args)} for name in args.networks]
    title = 'Composer’s own cost in a step'
    return record.write(args.out, f'composer_step_{args.device}', results, markdown(results), title=title)


if __name__ == '__main__':
    record.steady()
    main()
