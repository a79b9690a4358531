"""What training on selected subsets costs as a share of full training, selection included, and what accuracy it reaches on CIFAR-10.

One full training, then one for each strategy and budget, with a selection every ``--select-every`` epochs. The first epoch of each run
is on a subset too (``kappa`` is 0). Evaluation, at the end of each run, is not counted. A run's time splits into

- batches: the training itself, loading included;
- forward pass: last-layer gradients of all samples;
- strategy: the choice from these gradients;
- rest: planning, and what Composer does around an epoch.

On a CPU it is the process's CPU time, which other work on the machine does not lengthen, on a GPU the wall clock's. ``random`` draws once,
``adaptive-random`` at every selection: they cost no forward pass, and a strategy has to beat their accuracy at the same budget.

On a GPU, ResNet-18, 200 epochs; on a CPU, ResNet-20 on a few thousand images::

    python benchmarks/selection_training.py --data data --device gpu --epochs 200
    python benchmarks/selection_training.py --data data --model resnet20_cifar --samples 2000 --batch-size 50
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import record
from composer import Callback, Logger, State
from composer.utils import reproducibility

from composer_effalgos import SubsetSelection
from composer_effalgos.monitor import SUMMARY
from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.schema import load_recipe
from composer_effalgos.recipes.settings import recipe_folder

TARGETS = {0.1: 0.13, 0.3: 0.33}  # budget: most time, as shares of full training
STRATEGIES = ('glister', 'gradmatch', 'craig', 'random', 'adaptive-random')
YARDSTICKS = ('random', 'adaptive-random')


class Stopwatch(Callback):
    """Seconds of training, evaluation left out, and of its parts."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.seconds = {'total': 0.0, 'batches': 0.0, 'forward pass': 0.0, 'strategy': 0.0}
        self._since: dict[str, float] = {}
        self._paused: list[str] = []

    def start(self, part: str) -> None:
        self._since[part] = self.clock()

    def stop(self, part: str) -> None:
        self.seconds[part] += self.clock() - self._since.pop(part)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted to a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.start(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.stop(part)

        return call

    def fit_start(self, state: State, logger: Logger) -> None:
        self.start('total')

    def fit_end(self, state: State, logger: Logger) -> None:
        self.stop('total')

    def eval_start(self, state: State, logger: Logger) -> None:
        self._paused = list(self._since)
        for part in self._paused:
            self.stop(part)

    def eval_end(self, state: State, logger: Logger) -> None:
        for part in self._paused:
            self.start(part)

    def epoch_start(self, state: State, logger: Logger) -> None:
        self.start('batches')  # callbacks come after the algorithms: the selection is made

    def epoch_end(self, state: State, logger: Logger) -> None:
        self.stop('batches')


def train(args: argparse.Namespace, strategy: str | None, fraction: float, folder: Path) -> dict[str, Any]:
    """Trains once, on everything or on what a strategy selects.

    Returns:
        ``strategy``, ``fraction``, ``seconds`` by part with their ``total``, ``accuracy`` in [0, 1], and ``samples`` trained on.
    """
    name = 'full' if strategy is None else f'{strategy}_{fraction:g}'
    selection = {} if strategy is None else {'strategy': strategy, 'fraction': fraction, 'select_every': f'{args.select_every}ep'}
    overrides = [
        f'run_name={name}',
        f'seed={args.seed}',
        f'save_folder={json.dumps(str(folder))}',
        f'max_duration={args.epochs}ep',
        f'dataset.path={json.dumps(str(args.data))}',
        f'dataset.batch_size={args.batch_size}',
        f'dataset.num_workers={args.workers}',
        f'model.name={args.model}',
        f'device={args.device}',
        'eval_interval=1dur',
        'progress_bar=false',
        'loggers=null',
        *([f'dataset.limit={args.samples}'] if args.samples else []),
        *([f'algorithms.subset_selection={json.dumps(selection)}'] if selection else []),
        *args.overrides,
    ]
    recipe = load_recipe(recipe_folder() / 'cifar10' / 'cifar10_resnet18_baseline.yaml', overrides)
    reproducibility.seed_all(args.seed)
    trainer = build_trainer(recipe)
    watch = Stopwatch(time.process_time if args.device == 'cpu' else time.perf_counter)
    trainer.state.callbacks.append(watch)
    for algorithm in trainer.state.algorithms:
        if isinstance(algorithm, SubsetSelection):
            source = algorithm._source
            source.read = watch.timed('forward pass', source.read)  # type: ignore[method-assign]
            source.pick = watch.timed('strategy', source.pick)  # type: ignore[method-assign]
    trainer.fit()
    trainer.close()
    totals = json.loads((folder / name / SUMMARY).read_text(encoding='utf-8'))['totals']
    seconds = watch.seconds
    seconds['rest'] = seconds['total'] - sum(seconds[part] for part in ('batches', 'forward pass', 'strategy'))
    found = {'strategy': strategy or 'full', 'fraction': fraction, 'seconds': seconds}
    return found | {'accuracy': totals['eval_accuracy'], 'samples': totals['samples_seen']}


PARTS = ('batches', 'forward pass', 'strategy', 'rest')


def verdict(runs: Sequence[dict[str, Any]]) -> str:
    """Which strategies are above their time, and which are not better than a random subset of the same size."""
    full = runs[0]['seconds']['total']
    lines = []
    for fraction in sorted({run['fraction'] for run in runs[1:]}):
        same = [run for run in runs[1:] if run['fraction'] == fraction]
        target = TARGETS.get(fraction)
        slow = [run['strategy'] for run in same if target and run['seconds']['total'] > target * full]
        if target:
            held = 'every run keeps to it' if not slow else f'above it: {", ".join(slow)}'
            lines.append(f'- {fraction:.0%} of the samples, at most {target:.0%} of the time: {held}.')
        yardsticks = [run['accuracy'] for run in same if run['strategy'] in YARDSTICKS]
        if yardsticks:
            behind = [run['strategy'] for run in same if run['strategy'] not in YARDSTICKS and run['accuracy'] <= max(yardsticks)]
            better = [run['strategy'] for run in same if run['strategy'] not in YARDSTICKS and run['accuracy'] > max(yardsticks)]
            lines.append(
                f'- {fraction:.0%} of the samples: better than both random subsets ({100 * max(yardsticks):.2f} % at best): '
                f'{", ".join(better) or "none"}; not better: {", ".join(behind) or "none"}.'
            )
    return '\n'.join(lines)


def markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    settings, runs = results['settings'], results['runs']
    full = runs[0]['seconds']['total']
    clock = 'CPU seconds' if settings['device'] == 'cpu' else 'Seconds'
    limit = f'{settings["samples"]:,} training images' if settings['samples'] else 'all training images'
    text = (
        f'CIFAR-10, {settings["model"]}, {limit}, batches of {settings["batch_size"]}, {settings["epochs"]} epochs, a selection every '
        f'{settings["select_every"]}, seed {settings["seed"]}. {clock}; shares are of the full training. One seed.\n\n'
    )
    header = ['strategy', 'budget', 'samples', 'seconds', 'share', *(f'{part}, s' for part in PARTS), 'accuracy %']
    cells = [
        [
            run['strategy'],
            f'{run["fraction"]:.0%}',
            f'{run["samples"]:,}',
            f'{run["seconds"]["total"]:.2f}',
            f'{run["seconds"]["total"] / full:.1%}',
            *(f'{run["seconds"][part]:.2f}' for part in PARTS),
            f'{100 * run["accuracy"]:.2f}',
        ]
        for run in runs
    ]
    return text + record.table(header, cells) + '\n' + verdict(runs)


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains what the command line says and writes ``selection_training_<device>.{json,md}``."""
    parser = argparse.ArgumentParser(description='Time and accuracy of training on selected subsets.')
    parser.add_argument('--data', type=Path, required=True, help='CIFAR-10: a folder with train.parquet and test.parquet, or torchvision’s')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder for the results')
    parser.add_argument('--device', choices=['cpu', 'gpu'], default='cpu')
    parser.add_argument('--strategies', nargs='+', default=list(STRATEGIES))
    parser.add_argument('--fractions', type=float, nargs='+', default=list(TARGETS))
    parser.add_argument('--epochs', type=int, default=40)
    parser.add_argument('--select-every', type=int, default=20, help='epochs')
    parser.add_argument('--model', default='resnet18_cifar')
    parser.add_argument('--samples', type=int, help='training images, drawn at random; all by default')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--seed', type=int, default=17)
    parser.add_argument('--set', dest='overrides', nargs='+', default=[], metavar='key=value', help='settings on top of the recipe')
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        train(argparse.Namespace(**vars(args) | {'epochs': 1}), args.strategies[0], args.fractions[0], Path(folder) / 'warm_up')
        runs = [train(args, None, 1.0, Path(folder))]
        for fraction in args.fractions:
            runs += [train(args, strategy, fraction, Path(folder)) for strategy in args.strategies]
    settings = {name: value for name, value in vars(args).items() if name not in ('data', 'out')}
    results = {'settings': settings, 'runs': runs}
    title = 'Training on selected subsets'
    return record.write(args.out, f'selection_training_{args.device}', results, markdown(results), title=title)


if __name__ == '__main__':
    main()
