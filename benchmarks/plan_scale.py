"""Time and memory to plan one epoch of InfoBatch, for 1e5 to 1e8 samples.

Planning is what every rank does once an epoch: ``ef.prune`` on the scores, ``plan_epoch`` on what is kept, and the rank's order,
weights and batch boundaries. It is set against ``torch.randperm(N)``, which plain shuffling would cost, timed in turns with it. Each N
has a process of its own; its peak memory is that of the first plan, scores and interpreter not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from torch import Tensor

from composer_effalgos import functional as ef
from composer_effalgos.plan import EpochPlan, plan_epoch

WARM_UP = 10_000


def plan_once(scores: Tensor, *, prune_ratio: float, batch_size: int, world_size: int, epoch: int) -> EpochPlan:
    """Plans an epoch as a rank does, rank 0's share included.

    Args:
        scores: float32 ``[N]``.
        prune_ratio: As for InfoBatch.
        batch_size: Samples per rank and batch.
        world_size: Number of ranks.
        epoch: Seeds the draw and the order.

    Returns:
        The plan of all ranks.
    """
    kept, weights = ef.prune(scores, prune_ratio, torch.Generator().manual_seed(epoch))
    plan = plan_epoch(kept, weights, batch_size, seed=0, epoch=epoch, world_size=world_size)
    plan.rank_order(0, world_size)
    plan.rank_weights(0, world_size)
    plan.rank_offsets(0, world_size)
    return plan


def measure(samples: int, repeats: int, **settings: Any) -> dict[str, Any]:
    """Measures one N in this process.

    Args:
        samples: N.
        repeats: Plans and permutations, in turns; the first pair, which meets fresh memory, counts only where it is the only one.
        **settings: As for :func:`plan_once`.

    Returns:
        Seconds of each plan and each permutation, the median ratio of a pair, the samples kept, and the peak memory of a plan in bytes.
    """
    plan_once(torch.rand(WARM_UP), epoch=0, **settings)
    scores = torch.rand(samples, generator=torch.Generator().manual_seed(0))
    before = record.peak_bytes()
    plan, first = _timed(lambda: plan_once(scores, epoch=0, **settings))
    extra = record.peak_bytes() - before
    kept = plan.num_samples
    del plan
    record.steady()
    plans, permutations = [first], [_timed(lambda: torch.randperm(samples))[1]]
    for repeat in range(1, repeats):
        plans.append(_timed(lambda epoch=repeat: plan_once(scores, epoch=epoch, **settings))[1])
        permutations.append(_timed(lambda: torch.randperm(samples))[1])
    warm = slice(1 if repeats > 1 else 0, None)
    return {
        'samples': samples,
        'kept': kept,
        'plan_seconds': plans,
        'randperm_seconds': permutations,
        'ratio': median(plan / permutation for plan, permutation in zip(plans[warm], permutations[warm], strict=True)),
        'nanoseconds_per_sample': 1e9 * median(plans[warm]) / samples,
        'peak_bytes': extra,
        'bytes_per_sample': extra / samples,
    }


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the CPU seconds: all of this runs in one thread, and what else the machine does is not counted."""
    started = time.process_time()
    result = function()
    return result, time.process_time() - started


def exponent(rows: Sequence[dict[str, Any]]) -> float | None:
    """The power of N that time grows as: 1 for linear; ``None`` for a single N."""
    return record.power([(row['samples'], row['nanoseconds_per_sample'] * row['samples']) for row in rows])


def markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    settings, rows = results['settings'], results['rows']
    text = (
        f'`prune_ratio` {settings["prune_ratio"]}, {settings["world_size"]} ranks, {settings["batch_size"]} samples per rank and batch, '
        'uniform scores. CPU times of one thread, medians after a first plan, the one whose memory is measured; after it memory stays '
        'with the process, so that neither side pays for page faults by chance.\n\n'
    )
    header = ['samples', 'kept', 'plan, s', 'randperm, s', 'plan / randperm', 'ns a sample', 'peak, bytes a sample']
    cells = []
    for row in rows:
        seconds = [f'{median(row[name][1:] or row[name]):.4g}' for name in ('plan_seconds', 'randperm_seconds')]
        ratios = [f'{row["ratio"]:.2f}', f'{row["nanoseconds_per_sample"]:.1f}', f'{row["bytes_per_sample"]:.1f}']
        cells.append([f'{row["samples"]:,}', f'{row["kept"]:,}', *seconds, *ratios])
    text += record.table(header, cells)
    if results['exponent'] is not None:
        text += f'\nTime grows as N to the power {results["exponent"]:.2f}.\n'
    return text


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Measures what the command line says and writes ``plan_scale.{json,md}``."""
    parser = argparse.ArgumentParser(description='Time and memory to plan an epoch of InfoBatch.')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder for the results')
    parser.add_argument('--samples', type=float, nargs='+', default=[1e5, 1e6, 1e7, 1e8], help='data set sizes')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--prune-ratio', type=float, default=0.5)
    parser.add_argument('--batch-size', type=int, default=128, help='samples per rank and batch')
    parser.add_argument('--world-size', type=int, default=8, help='ranks')
    parser.add_argument('--one', action='store_true', help='measure one size in this process and print JSON')
    args = parser.parse_args(argv)
    settings = {'prune_ratio': args.prune_ratio, 'batch_size': args.batch_size, 'world_size': args.world_size}
    if args.one:
        print(json.dumps(measure(int(args.samples[0]), args.repeats, **settings)))
        return None
    rows = []
    for samples in args.samples:
        options = [
            '--repeats',
            args.repeats,
            '--prune-ratio',
            args.prune_ratio,
            '--batch-size',
            args.batch_size,
            '--world-size',
            args.world_size,
        ]
        command = [sys.executable, __file__, '--one', '--samples', samples, *options]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
    results = {'settings': settings, 'rows': rows, 'exponent': exponent(rows)}
    target = record.write(args.out, 'plan_scale', results, markdown(results), title='Planning an epoch')
    print(target.read_text(encoding='utf-8'))
    return target


if __name__ == '__main__':
    main()
