"""AdaBatch against a fixed small and a fixed large batch on CIFAR-10: time per epoch and final accuracy, in one run.

All begin with the same learning rate. The fixed batches decay it by 0.375 where AdaBatch doubles the batch and decays it by 0.75: the
comparison of the paper (arXiv 1712.02029, section 4). The large batch is the one that AdaBatch ends with. Runs that are done are kept:
the same command goes on where ``--minutes`` were over.

On a GPU, with the images of CIFAR-10 decoded in its memory:

    python benchmarks/adabatch.py --device gpu --data data --minutes 9
    python benchmarks/adabatch.py --device gpu --data data --minutes 9 --model resnet18_cifar --out runs/adabatch_resnet18

``--data`` is a folder with ``train.parquet`` and ``test.parquet``, or torchvision's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import compared
import record

from composer_effalgos.report.sweep import Sweep
from composer_effalgos.utils.errors import InputError

NAMES = {'small': 'fixed small batch', 'adabatch': 'AdaBatch', 'large': 'fixed large batch'}


def make_sweep(args: argparse.Namespace) -> Sweep:
    """The three methods on top of the paper's recipes."""
    interval = args.epochs // (args.growths + 1)
    if args.growths < 1 or interval < 1:
        raise InputError(f'--growths: expected at least 1 and less than the {args.epochs} epochs, got {args.growths}')
    times = [f'{interval * (number + 1)}ep' for number in range(args.growths)]
    on_gpu = args.device == 'gpu'
    dataset = {'path': str(args.data), 'batch_size': args.batch_size, 'eval_batch_size': 500, 'num_workers': args.workers}
    settings: dict[str, Any] = {
        'max_duration': f'{args.epochs}ep',
        'device': args.device,
        'precision': 'amp_bf16' if on_gpu else 'fp32',
        'dataset': dataset | {'drop_last': False} | ({} if args.samples is None else {'limit': args.samples}),
        'model': {'name': args.model},
        'optimizer': {'lr': args.lr},
        'eval_interval': f'{interval}ep',
        'save_interval': f'{interval}ep',
        'loggers': None,
        'algorithms': {'channels_last': {}} if on_gpu else {},
    }
    settings |= {'loader': 'device'} if on_gpu else {}
    fixed = {'recipe': 'cifar10/cifar10_resnet20_paper_fixed.yaml', 'scheduler': {'milestones': times}}
    grown = {
        'recipe': 'cifar10/cifar10_resnet20_paper_adabatch.yaml',
        'algorithms': {'adabatch': {'interval': None, 'milestones': times, 'lr_factor': 0.75}},
    }
    large = {'dataset': {'batch_size': args.batch_size * 2**args.growths}}
    methods = {'small': fixed, 'adabatch': grown, 'large': fixed | large}
    return Sweep('adabatch', Path('adabatch'), seeds=args.seeds, settings=settings, methods=methods)


def markdown(runs: compared.Runs, settings: str) -> str:
    """The tables: what each method cost and reached, and the seconds of its epochs by batch size."""
    small = runs['small']
    rows = []
    for method, name in NAMES.items():
        if not runs[method]:
            continue
        seconds, accuracy = (mean(run['totals'][key] for run in runs[method]) for key in ('train_seconds', 'eval_accuracy'))
        batches = [epoch['batch_size'] for epoch in runs[method][0]['epochs']]
        steps = sum(epoch['batches'] for epoch in runs[method][0]['epochs'])
        ratio = f'{mean(run["totals"]["train_seconds"] for run in small) / seconds:.2f}' if small else ''
        gap = f'{100 * (accuracy - mean(run["totals"]["eval_accuracy"] for run in small)):+.2f}' if small else ''
        each = ', '.join(f'{100 * run["totals"]["eval_accuracy"]:.2f}' for run in runs[method])
        batch = f'{batches[0]}' if batches[0] == batches[-1] else f'{batches[0]} to {batches[-1]}'
        rows.append([name, batch, steps, f'{seconds:.1f}', ratio, f'{100 * accuracy:.2f}', each, gap])
    header = ['', 'batch', 'steps', 'training, s', 'times faster', 'accuracy, %', 'each seed', 'difference, points']
    text = (
        f'{settings}\n\n{record.table(header, rows)}\nMean seconds of an epoch, evaluation left out, by the batch it was trained with:\n\n'
    )
    rows = []
    for method, name in NAMES.items():
        by_batch: dict[int, list[float]] = {}
        for run in runs[method]:
            for epoch in run['epochs']:
                by_batch.setdefault(epoch['batch_size'], []).append(epoch['seconds'])
        rows += [[name, batch, len(seconds), f'{mean(seconds):.2f}', f'{min(seconds):.2f}'] for batch, seconds in by_batch.items()]
    return text + record.table(['', 'batch', 'epochs', 'mean, s', 'fastest, s'], rows)


@record.bad_input_is_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the command line says and writes ``adabatch_<device>.{json,md}``.

    Returns:
        The exit status: 0 when every run is done, 3 when the time was over before, 2 for bad input, 1 where a run failed.
    """
    parser = argparse.ArgumentParser(description='AdaBatch against fixed batches on CIFAR-10.')
    parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
    parser.add_argument('--data', type=Path, default=Path('data'), help='folder of the data set')
    parser.add_argument('--model', default='resnet20_cifar', help='a name that recipes know')
    parser.add_argument('--samples', type=int, help='training images; all when not given')
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--batch-size', type=int, default=64, help='the small batch, and the one that AdaBatch begins with')
    parser.add_argument('--growths', type=int, default=4, help='doublings, evenly spaced')
    parser.add_argument('--lr', type=float, default=0.05, help='learning rate that all begin with')
    parser.add_argument('--seeds', type=int, nargs='+', default=[17])
    parser.add_argument('--workers', type=int, default=0, help='loader processes')
    compared.add_arguments(parser, 'adabatch')
    args = parser.parse_args(argv)
    outcome, runs = compared.train(make_sweep, args)
    if any(runs.values()):
        images = 'all images' if args.samples is None else f'{args.samples:,} images'
        settings = (
            f'{args.model} on {images} of CIFAR-10, {args.epochs} epochs, SGD {args.lr} with momentum 0.9 and weight decay 5e-4; '
            f'{args.growths} doublings. Not yet done: {", ".join(outcome.pending) or "nothing"}.'
        )
        results = {'runs': [run for method in runs.values() for run in method], 'pending': outcome.pending}
        name = f'adabatch_{args.device}'
        record.write(args.results, name, results, markdown(runs, settings), title='AdaBatch against fixed batches')
    return outcome.status


if __name__ == '__main__':
    sys.exit(main())
