"""Seesaw against cosine on text at equal tokens: held-out loss, steps and CPU seconds, over several seeds.

A byte-level GPT-2 on the source of Python's standard library, AdamW, warm-up and cosine to zero. Seesaw doubles the batch where the cosine
has halved the rate, up to ``--growth`` times, and lowers the rate by the square root instead. The third method has a fixed batch with
about as many steps as Seesaw, at the square-root rule's rate. Runs that are done are kept: the same command goes on where ``--minutes``
were over.

On one CPU core, some 15 minutes::

    python benchmarks/seesaw_text.py --epochs 4

On a GPU, 30 million parameters in bfloat16::

    python benchmarks/seesaw_text.py --device gpu --epochs 8 --batch-size 32 --samples 16384 --lr 1e-3 --minutes 9 \\
        --set model.layers=10 --set model.width=512 --set model.heads=8 --set dataset.seq_len=512
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compared
import numpy as np
import record
from scipy import stats

from composer_effalgos.report.sweep import Sweep
from composer_effalgos.utils.errors import InputError

NAMES = {'cosine': 'cosine', 'seesaw': 'Seesaw', 'fixed': 'cosine, larger batch'}


def steps_of_seesaw(growth: int) -> float:
    """Steps along a cosine to zero with powers of two up to ``growth``, as a share of the fixed batch's; warm-up left out."""
    halvings = round(math.log2(growth))
    # the rate has fallen to a times its peak after acos(2 a - 1) / pi of the way
    ends = [math.acos(2 * 0.5**k - 1) / math.pi for k in range(1, halvings + 1)] + [1.0]
    starts = [0.0, *ends[:-1]]
    return sum((end - start) / 2**k for k, (start, end) in enumerate(zip(starts, ends, strict=True)))


def make_sweep(args: argparse.Namespace) -> Sweep:
    """The three methods on top of the recipe."""
    if args.growth < 2 or args.growth & (args.growth - 1):
        raise InputError(f'--growth: expected a power of two of at least 2, got {args.growth}')
    larger = round(args.batch_size / steps_of_seesaw(args.growth))
    settings: dict[str, Any] = {
        'max_duration': f'{args.epochs}ep',
        'device': args.device,
        'precision': 'amp_bf16' if args.device == 'gpu' else 'fp32',
        'dataset': {'batch_size': args.batch_size, 'limit': args.samples},
        'optimizer': {'lr': args.lr},
        'eval_interval': f'{args.epochs}ep',
        'save_interval': '1ep',
    }
    seesaw = {'policy': 'seesaw', 'max_batch_size': args.batch_size * args.growth}
    fixed = {'dataset': {'batch_size': larger}, 'optimizer': {'lr': args.lr * math.sqrt(larger / args.batch_size)}}
    methods = {'cosine': {}, 'seesaw': {'algorithms': {'adabatch': seesaw}}, 'fixed': fixed}
    methods = {name: {'recipe': 'text/python_source_gpt_cpu.yaml'} | methods[name] for name in args.methods}
    return Sweep('seesaw_text', Path('seesaw_text'), seeds=args.seeds, settings=settings, methods=methods)


def interval(differences: Sequence[float]) -> str:
    """Mean and 95 % interval of paired differences, by Student's t."""
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return f'{mean:+.4f}'
    half = float(stats.t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / math.sqrt(len(differences)))
    return f'{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]'


def markdown(runs: compared.Runs) -> str:
    """A row a method; differences are seed by seed from the plain cosine."""
    rows = []
    cosine = {run['seed']: run['totals']['eval_loss'] for run in runs.get('cosine', [])}
    for method, name in NAMES.items():
        own = runs.get(method, [])
        if not own:
            continue
        losses = [run['totals']['eval_loss'] for run in own]
        steps = np.mean([sum(epoch['batches'] for epoch in run['epochs']) for run in own])
        batches = [epoch['batch_size'] for run in own for epoch in run['epochs']]
        seconds = np.mean([run['totals']['train_cpu_seconds'] for run in own])
        spread = f' ± {np.std(losses, ddof=1):.4f}' if len(losses) > 1 else ''
        pairs = [run['totals']['eval_loss'] - cosine[run['seed']] for run in own if run['seed'] in cosine]
        batch = f'{min(batches)}' if min(batches) == max(batches) else f'{min(batches)} to {max(batches)}'
        difference = '' if method == 'cosine' or not pairs else interval(pairs)
        rows.append([name, len(own), batch, f'{steps:,.0f}', f'{seconds:.1f}', f'{np.mean(losses):.4f}{spread}', difference])
    return record.table(['', 'seeds', 'batch', 'steps', 'CPU s', 'held-out loss', 'difference by seed, 95 %'], rows)


@record.bad_input_is_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the command line says and writes ``<name>_<device>.{json,md}``.

    Returns:
        The exit status: 0 when every run is done, 3 when the time was over before, 2 for bad input, 1 where a run failed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--samples', type=int, default=4096, help='training sequences')
    parser.add_argument('--batch-size', type=int, default=16, help='the batch that Seesaw begins with')
    parser.add_argument('--growth', type=int, default=4, help='largest batch over the first one')
    parser.add_argument('--lr', type=float, default=3e-3)
    parser.add_argument('--seeds', type=int, nargs='+', default=[17, 18, 19, 20, 21])
    parser.add_argument('--methods', nargs='+', choices=list(NAMES), default=list(NAMES))
    parser.add_argument('--name', default='seesaw_text', help='of the result')
    parser.add_argument('--note', default='', help='words below the table')
    compared.add_arguments(parser, 'seesaw_text')
    args = parser.parse_args(argv)
    outcome, runs = compared.train(make_sweep, args)
    if any(runs.values()):
        about = (
            f'Sequences of 128 bytes, {args.samples:,} an epoch, {args.epochs} epochs; AdamW {args.lr:g}, warm-up and cosine to zero. '
            f'Not yet done: {", ".join(outcome.pending) or "nothing"}.'
        )
        results = {'runs': [record.without_paths(run) for method in runs.values() for run in method]}
        text = f'{about}\n\n{markdown(runs)}\n{args.note}'
        record.write(args.results, f'{args.name}_{args.device}', results, text, title='Seesaw against cosine on text')
    return outcome.status


if __name__ == '__main__':
    sys.exit(main())
