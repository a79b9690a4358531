"""What InfoBatch costs in a training step, and how much of what it saves in samples it saves in time.

Two trainings run in one process and take turns batch by batch, so that whatever else the machine does hits both alike:

- ``control``: plain Composer against itself, which shows what the measurement can resolve;
- ``overhead``: plain Composer against Composer with ``InfoBatch(prune_ratio=0)``;
- ``saving``: plain Composer against Composer with ``InfoBatch(prune_ratio=0.5)``; the one that is behind in epochs goes next.

The data are tensors in memory that are read batch by batch, so loading is not the bottleneck. A turn is one batch, from the end of
the batch before to its own end, all of Composer's loop included; on a GPU it ends with a synchronisation. Epochs have some 256 batches or
more by default, as in earnest, because a pruned epoch ends in a batch of a new size, which on the CPU costs about 0.2 of a full batch more
than its share.

What each of our hooks takes is timed in a pruned epoch, another is profiled, and on a GPU the hooks run under torch's sync-debug mode,
which raises an error where one of them waits for the device.
"""

from __future__ import annotations

import argparse
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from composer import Callback, Logger, State, Trainer
from composer.algorithms import ChannelsLast
from composer.core import Algorithm
from composer.models import ComposerClassifier
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from composer_effalgos import InfoBatch
from composer_effalgos.models import build_model
from composer_effalgos.plan import EpochPlanner

CLASSES = 10


class SameBatch:
    """A loader of one batch again and again, on the device."""

    def __init__(self, batch: Sequence[Tensor], steps: int, device: str) -> None:
        self.batch = [column.to('cuda' if device == 'gpu' else 'cpu') for column in batch]
        self.batch_size, self.steps = len(batch[1]), steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Tensor]]:
        return itertools.repeat(self.batch, self.steps)


@dataclass(frozen=True)
class Settings:
    """What is trained, and for how long."""

    device: str
    model: str
    samples: int
    batch_size: int
    epochs: int
    repeats: int
    precision: str
    seed: int


@dataclass(frozen=True)
class Turn:
    """One batch: its place, its size and the time from the end of the batch before, of the same training, to its own end.

    ``seconds`` are the wall clock's, ``cpu_seconds`` the process's, which what else runs on the machine does not lengthen.
    """

    epoch: int
    batch: int
    samples: int
    seconds: float
    cpu_seconds: float


class Images(Dataset):
    """Noisy pictures of ten patterns in memory, a tenth of them with a wrong label, read a whole batch at a time.

    They are learnt, but for the wrong labels, so that most losses are below their mean, as in earnest: the more is pruned, the less the
    noise of the clock counts. ``collate_fn`` has nothing left to do.
    """

    def __init__(self, samples: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(CLASSES, (samples,), generator=generator)
        patterns = torch.randn(CLASSES, 3, 32, 32, generator=generator)
        self.images = patterns[self.targets] + torch.randn(samples, 3, 32, 32, generator=generator)
        wrong = torch.rand(samples, generator=generator) < 0.1
        self.targets[wrong] = torch.randint(CLASSES, (int(wrong.sum()),), generator=generator)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.targets[indices]


class Relay:
    """Lets one of several trainings run at a time: the one that has got least far goes next, after each batch."""

    def __init__(self, runners: int, synchronise: Callable[[], None]) -> None:
        self._changed = threading.Condition()
        self._progress = [0.0] * runners
        self._turn = 0
        self._synchronise = synchronise
        self._since = self._cpu_since = 0.0
        self.turns: list[list[Turn]] = [[] for _ in range(runners)]

    def enter(self, who: int) -> None:
        """Waits for the first turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn == who)
        self._since, self._cpu_since = time.perf_counter(), time.process_time()

    def batch_done(self, who: int, progress: float, epoch: int, batch: int, samples: int) -> None:
        """Notes the turn that ends here and waits for the next."""
        self._synchronise()
        seconds, cpu_seconds = time.perf_counter() - self._since, time.process_time() - self._cpu_since
        self.turns[who].append(Turn(epoch, batch, samples, seconds, cpu_seconds))
        self._pass_on(who, progress)
        self.enter(who)

    def leave(self, who: int) -> None:
        """Takes part no longer."""
        self._pass_on(who, math.inf)

    def _pass_on(self, who: int, progress: float) -> None:
        with self._changed:
            self._progress[who] = progress
            # Where all have got equally far, the same one goes on: A B, B A, A B, ..., so that none is always the second
            self._turn = min(range(len(self._progress)), key=lambda runner: (self._progress[runner], runner != who))
            self._changed.notify_all()


class Runner(Callback):
    """A training's part in the relay."""

    def __init__(self, relay: Relay, who: int) -> None:
        self.relay, self.who = relay, who

    def batch_end(self, state: State, logger: Logger) -> None:
        assert state.previous_timestamp is not None
        assert state.dataloader_len is not None
        epoch, batch = int(state.timestamp.epoch), int(state.timestamp.batch_in_epoch)
        samples = int(state.timestamp.sample - state.previous_timestamp.sample)
        self.relay.batch_done(self.who, epoch + batch / int(state.dataloader_len), epoch, batch - 1, samples)


def make_loader(settings: Settings) -> DataLoader:
    """The loader that a user would have."""
    return DataLoader(
        Images(settings.samples, settings.seed),
        batch_size=settings.batch_size,
        shuffle=True,
        collate_fn=lambda batch: batch,
        pin_memory=settings.device == 'gpu',
    )


def make_trainer(
    settings: Settings,
    algorithms: Sequence[Algorithm],
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
    loader_of: Callable[[Settings], DataLoader] = make_loader,
) -> Trainer:
    """A trainer of the benchmark's network on the benchmark's data."""
    torch.manual_seed(settings.seed + seed)
    model = ComposerClassifier(build_model(settings.model, CLASSES), num_classes=CLASSES)
    return Trainer(
        model=model,
        train_dataloader=loader_of(settings),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
        max_duration=f'{settings.epochs}ep',
        algorithms=[*([ChannelsLast()] if settings.device == 'gpu' else []), *algorithms],
        callbacks=list(callbacks),
        device=settings.device,
        precision=settings.precision,
        progress_bar=False,
        seed=settings.seed + seed,
    )


def take_turns(relay: Relay, runs: Sequence[Callable[[], None]]) -> list[list[Turn]]:
    """Runs functions in threads of their own, one at a time, batch by batch, and gives the turns of each.

    Each run tells ``relay``, under its number in ``runs``, of every batch that is done.
    """
    errors: list[BaseException] = []

    def work(who: int) -> None:
        try:
            relay.enter(who)
            runs[who]()
        except BaseException as error:  # raised again in the main thread
            errors.append(error)
        finally:
            relay.leave(who)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return relay.turns


def race(
    settings: Settings,
    methods: Sequence[Sequence[Algorithm]],
    seed: int = 0,
    loader_of: Callable[[Settings], DataLoader] = make_loader,
) -> list[list[Turn]]:
    """Trains with each set of algorithms, all in one process and in turns, and gives the turns of each.

    ``seed`` is added to the settings' seed; ``loader_of`` makes the loader of a training.
    """
    relay = Relay(len(methods), torch.cuda.synchronize if settings.device == 'gpu' else lambda: None)
    trainers = [make_trainer(settings, algorithms, [Runner(relay, who)], seed, loader_of) for who, algorithms in enumerate(methods)]
    turns = take_turns(relay, [trainer.fit for trainer in trainers])
    for trainer in trainers:
        trainer.close()
    return turns


def compare_steps(plain: Sequence[Turn], ours: Sequence[Turn]) -> dict[str, Any]:
    """Ratio of step times, batch by batch, after the first epoch.

    Args:
        plain: The turns of the reference.
        ours: The turns to set against it, as many.

    Returns:
        ``step_ratio``: median over all pairs of batches, those that open an epoch left out, with the 95 % interval of the median from
        order statistics (``step_ratio_low``, ``step_ratio_high``); ``epoch_ratios``: of the total time of each epoch, planning included;
        the median step times.
    """
    pairs = [(a, b) for a, b in zip(plain, ours, strict=True) if a.epoch > 0]
    ratios = sorted(b.seconds / a.seconds for a, b in pairs if a.batch > 0)
    half_width = 0.98 * math.sqrt(len(ratios))
    epochs = sorted({a.epoch for a, _ in pairs})
    by_epoch = [[(a.seconds, b.seconds) for a, b in pairs if a.epoch == epoch] for epoch in epochs]
    epoch_ratios = [sum(b for _, b in times) / sum(a for a, _ in times) for times in by_epoch]
    return {
        'pairs': len(ratios),
        'step_ratio': median(ratios),
        'step_ratio_low': ratios[max(0, math.floor(len(ratios) / 2 - half_width))],
        'step_ratio_high': ratios[min(len(ratios) - 1, math.ceil(len(ratios) / 2 + half_width))],
        'epoch_ratios': epoch_ratios,
        'epoch_ratio': median(epoch_ratios),
        'plain_step_seconds': median(a.seconds for a, _ in pairs if a.batch > 0),
        'our_step_seconds': median(b.seconds for a, b in pairs if a.batch > 0),
    }


def compare_savings(plain: Sequence[Turn], ours: Sequence[Turn]) -> dict[str, Any]:
    """Shares of samples and of time saved, after the first epoch, which is never pruned.

    Args:
        plain: The turns of the full training.
        ours: The turns of the pruned training.

    Returns:
        Samples, seconds and CPU seconds of both, ``saved_samples``, ``saved_time`` and ``saved_cpu_time`` as shares, and ``efficiency`` and
        ``cpu_efficiency``, the share of time over that of samples.
    """
    counted = [[turn for turn in turns if turn.epoch > 0] for turns in (plain, ours)]
    samples = [sum(turn.samples for turn in turns) for turns in counted]
    seconds = [sum(turn.seconds for turn in turns) for turns in counted]
    cpu_seconds = [sum(turn.cpu_seconds for turn in turns) for turns in counted]
    saved_samples, saved_time, saved_cpu_time = (1 - ours / full for full, ours in (samples, seconds, cpu_seconds))
    return {
        'samples': samples,
        'seconds': seconds,
        'cpu_seconds': cpu_seconds,
        'saved_samples': saved_samples,
        'saved_time': saved_time,
        'saved_cpu_time': saved_cpu_time,
        'efficiency': saved_time / saved_samples,
        'cpu_efficiency': saved_cpu_time / saved_samples,
    }


STEP_HOOKS = ('before_train_batch', 'after_backward', 'after_train_batch', 'batch_end')


def wrap_hooks(trainer: Trainer, around: Callable[[str], AbstractContextManager[Any]]) -> None:
    """Runs everything of ours that a training step calls within ``around(name)``, for a trainer with InfoBatch."""

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with around(name):
                return function(*args, **kwargs)

        return call

    plan = EpochPlanner.of(trainer.state)
    assert plan.loss is not None
    for name in STEP_HOOKS:
        owner = plan._advance if name == 'batch_end' else plan
        setattr(owner, name, wrapped(f'plan: {name}', getattr(owner, name)))
    plan.loss.subscribers[:] = [wrapped('scores', subscriber) for subscriber in plan.loss.subscribers]
    trainer.state.model.loss = wrapped('weighted loss', plan.loss)  # type: ignore[method-assign,assignment]


def time_hooks(settings: Settings) -> dict[str, Any]:
    """Times our hooks on the host in a pruned epoch, then profiles another.

    Returns:
        ``hooks``: calls, microseconds a step, and the share of the epoch, of each hook; ``loader``: microseconds to read a batch through
        the user's loader and through the planned one; ``table``: torch's own table of the operations that take longest.
    """
    trainer = make_trainer(settings, [InfoBatch(prune_ratio=0.5, delta=1.0)])
    plan = EpochPlanner.of(trainer.state)
    trainer.fit(duration='1ep')
    seconds: dict[str, list[float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    wrap_hooks(trainer, timed)
    with timed('epoch'):
        trainer.fit(duration='1ep')
    epoch, steps = sum(seconds.pop('epoch')), plan.loader.num_batches
    hooks = [
        {'hook': name, 'calls': len(times), 'microseconds_per_step': 1e6 * sum(times) / steps, 'share': sum(times) / epoch}
        for name, times in seconds.items()
    ]
    loader = {'plain': _microseconds_per_batch(make_loader(settings)), 'planned': _microseconds_per_batch(plan.loader)}

    on_gpu = settings.device == 'gpu'
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        trainer.fit(duration='1ep')
    trainer.close()
    sort_by = 'self_device_time_total' if on_gpu else 'self_cpu_time_total'
    table = profiler.key_averages().table(sort_by=sort_by, row_limit=20, max_name_column_width=40)
    return {'steps': steps, 'epoch_seconds': epoch, 'hooks': hooks, 'loader': loader, 'table': table}


def _microseconds_per_batch(loader: DataLoader) -> float:
    """Median over the batches of one epoch."""
    times = [time.perf_counter()]
    for _ in loader:
        times.append(time.perf_counter())
    return 1e6 * median(later - earlier for earlier, later in itertools.pairwise(times))


def check_synchronisation(settings: Settings) -> dict[str, Any]:
    """Trains two epochs, the second pruned, with our hooks under sync-debug mode ``error``, but for the steps that check the loss.

    Returns:
        How many hook calls ran under it; that the function returns means that none of them waited for the GPU.
    """
    trainer = make_trainer(settings, [InfoBatch(prune_ratio=0.5, delta=1.0)])
    loss, calls = EpochPlanner.of(trainer.state).loss, 0
    assert loss is not None

    @contextmanager
    def no_synchronisation(name: str) -> Iterator[None]:
        nonlocal calls
        if loss.check_due:
            yield
            return
        calls += 1
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode('error')
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    wrap_hooks(trainer, no_synchronisation)
    trainer.fit(duration='2ep')
    trainer.close()
    return {'guarded_calls': calls, 'synchronisations': 0}


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    settings = results['settings']
    rows = []
    for name, ours in (('control', 'plain Composer'), ('overhead', 'InfoBatch(prune_ratio=0)')):
        found = results[name]
        step, low, high = (100 * (found[key] - 1) for key in ('step_ratio', 'step_ratio_low', 'step_ratio_high'))
        epochs = [100 * (ratio - 1) for ratio in found['epoch_ratios']]
        rows.append(
            [
                f'plain against {ours}',
                found['pairs'],
                f'{1e3 * found["plain_step_seconds"]:.2f} / {1e3 * found["our_step_seconds"]:.2f}',
                f'{step:+.2f} % ({low:+.2f} to {high:+.2f})',
                f'{median(epochs):+.2f} % ({min(epochs):+.2f} to {max(epochs):+.2f})',
            ]
        )
    text = (
        f'{settings["model"]}, batches of {settings["batch_size"]}, {settings["precision"]}, {settings["samples"]:,} generated images of '
        f'32x32 pixels in memory, {settings["epochs"]} epochs, of which the first is left out; trainings take turns batch by batch.\n\n'
        '## Step time\n\n'
    )
    header = ['', 'pairs of steps', 'median step, ms', 'median ratio of a pair (95 % interval)', 'whole epochs, planning included (range)']
    text += record.table(header, rows)
    net = 100 * (results['overhead']['step_ratio'] / results['control']['step_ratio'] - 1)
    text += (
        '\nThe control shows what it is worth to be the second of two trainings in a process. '
        f'Less that, InfoBatch costs **{net:+.2f} %** of a step.\n'
        '\n## Samples and time saved by InfoBatch(prune_ratio=0.5, delta=0.875)\n\n'
        'The pruned training is the second of the two for every other seed, the first for the others.\n\n'
    )
    header = [
        'seed',
        'samples, full / pruned',
        'seconds, full / pruned',
        'samples saved',
        'time saved',
        'time over samples',
        'CPU time over samples',
    ]
    text += record.table(
        header,
        [
            [
                number,
                ' / '.join(f'{value:,}' for value in run['samples']),
                ' / '.join(f'{value:.1f}' for value in run['seconds']),
                f'{run["saved_samples"]:.2%}',
                f'{run["saved_time"]:.2%}',
                f'{run["efficiency"]:.3f}',
                f'{run["cpu_efficiency"]:.3f}',
            ]
            for number, run in enumerate(results['saving']['runs'], settings['seed'])
        ],
    )
    saving = results['saving']
    text += (
        f'\nAll runs together: time over samples **{saving["efficiency"]:.3f}**, '
        f'CPU time over samples **{saving["cpu_efficiency"]:.3f}**.\n'
    )
    text += '\n## Where the rest goes\n\nTime of our hooks on the host, in a pruned epoch:\n\n'
    header = ['hook', 'calls', 'microseconds a step', 'share of the epoch']
    hooks = results['hooks']['hooks']
    text += record.table(
        header, [[hook['hook'], hook['calls'], f'{hook["microseconds_per_step"]:.1f}', f'{hook["share"]:.2%}'] for hook in hooks]
    )
    loader = results['hooks']['loader']
    text += (
        '\n“weighted loss” is the model’s loss, sample by sample, and holds “scores”. A batch is read in '
        f'{loader["plain"]:.0f} microseconds by the plain loader, in {loader["planned"]:.0f} by the planned one.\n'
    )
    synchronisation = results['synchronisation']
    if synchronisation is None:
        text += '\nSynchronisations are looked for on a GPU only.\n'
    else:
        text += (
            f'\n{synchronisation["guarded_calls"]:,} calls of our hooks ran under `torch.cuda.set_sync_debug_mode("error")`: none waited.\n'
        )
    return text + f'\nA pruned epoch under torch’s profiler:\n\n```\n{results["hooks"]["table"].strip()}\n```\n'


def measure_saving(settings: Settings, loader_of: Callable[[Settings], DataLoader] = make_loader) -> dict[str, Any]:
    """Full against pruned trainings: what :func:`compare_savings` gives for all of them together, and under ``runs`` for each."""
    races = []
    for seed in range(settings.repeats):
        methods: list[list[Algorithm]] = [[], [InfoBatch(prune_ratio=0.5, delta=0.875)]]
        # every other time the pruned training is the first of the two: being the second costs up to a percent
        order = 1 if seed % 2 == 0 else -1
        races.append(race(settings, methods[::order], seed, loader_of)[::order])
    together = [[turn for turns in races for turn in turns[who]] for who in range(2)]
    return {'runs': [compare_savings(*turns) for turns in races], **compare_savings(*together)}


def measure(settings: Settings) -> dict[str, Any]:
    """Runs everything, for the JSON file."""
    results: dict[str, Any] = {'settings': asdict(settings)}
    results['control'] = compare_steps(*race(settings, [[], []]))
    results['overhead'] = compare_steps(*race(settings, [[], [InfoBatch(prune_ratio=0.0)]]))
    results['saving'] = measure_saving(settings)
    results['hooks'] = time_hooks(settings)
    results['synchronisation'] = check_synchronisation(settings) if settings.device == 'gpu' else None
    return results


def main(argv: Sequence[str] | None = None) -> Path:
    """Measures what the command line says and writes ``infobatch_overhead_<device>.{json,md}``."""
    parser = argparse.ArgumentParser(description='The cost of InfoBatch in a training step, and what it saves.')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder for the results')
    parser.add_argument('--device', choices=('cpu', 'gpu'), default='gpu' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--model', help='a name that recipes know; resnet18_cifar on a GPU, resnet20_cifar on the CPU when not given')
    parser.add_argument('--samples', type=int, help='images; 50,000 on a GPU, 8,192 on the CPU when not given')
    parser.add_argument('--batch-size', type=int, help='128 on a GPU, 32 on the CPU when not given')
    parser.add_argument('--epochs', type=int, default=8, help='epochs of each training, of which the first is not counted')
    parser.add_argument('--repeats', type=int, default=3, help='pruned trainings with seeds of their own')
    parser.add_argument('--seed', type=int, default=17)
    args = parser.parse_args(argv)
    on_gpu = args.device == 'gpu'
    settings = Settings(
        device=args.device,
        model=args.model or ('resnet18_cifar' if on_gpu else 'resnet20_cifar'),
        samples=args.samples or (50_000 if on_gpu else 8_192),
        batch_size=args.batch_size or (128 if on_gpu else 32),
        epochs=args.epochs,
        repeats=args.repeats,
        precision='amp_bf16' if on_gpu else 'fp32',
        seed=args.seed,
    )
    results = measure(settings)
    return record.write(args.out, f'infobatch_overhead_{args.device}', results, markdown(results), title='Overhead of InfoBatch')


if __name__ == '__main__':
    record.steady()
    main()
