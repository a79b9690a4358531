"""Time and memory to plan one epoch of InfoBatch, for 1e5 to 1e8 samples.

Planning is what every rank does once an epoch: ``ef.prune`` on the scores, ``plan_epoch`` on what is kept, and the rank's order,
weights and batch boundaries. It is set against ``torch.randperm(N)``, which plain shuffling would cost, timed in turns with it. Each N
has a process of its own; its peak memory is that of the first plan, scores and interpreter not counted.

``--shard`` measures ``shard=True`` instead: each of ``--world-size`` processes on this machine keeps the rows of its own samples, they
plan an epoch together over gloo, and bring the scores back to their owners. Peak memory has the table, the plan and the exchange in it.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
import torch.distributed
from torch import Tensor

from composer_effalgos import functional as ef
from composer_effalgos.plan import EpochPlan, Ranks, SampleRows, Shard, plan_epoch, stream_seed
from composer_effalgos.plan.epoch import epoch_sizes
from composer_effalgos.plan.shard_loader import ShardPlan
from composer_effalgos.pruning.prune import prune_part
from composer_effalgos.utils.machine import peak_resident_bytes

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
    before = peak_resident_bytes()
    plan, first = _timed(lambda: plan_once(scores, epoch=0, **settings))
    extra = peak_resident_bytes() - before
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


def measure_shard(samples: int, *, prune_ratio: float, batch_size: int, world_size: int) -> dict[str, Any]:
    """Plans one epoch as a rank of several that keep their own parts, in this process, which is one of them.

    Args:
        samples: N.
        prune_ratio: As for InfoBatch.
        batch_size: Samples per rank and batch.
        world_size: Number of ranks.

    Returns:
        This rank's samples, those that it trains on, its CPU seconds to plan and to exchange scores, and its peak memory in bytes beyond
        that of the interpreter.
    """
    torch.distributed.init_process_group('gloo')

    def epoch(size: int) -> dict[str, Any]:
        shard = Shard(size, Ranks())
        rows = SampleRows.empty(1, len(shard))
        rows.history[0].uniform_(generator=torch.Generator().manual_seed(shard.ranks.rank))

        def plan() -> ShardPlan:
            kept, weights = prune_part(rows.scores, prune_ratio, stream_seed(0, 10, 1), shard)
            sizes = epoch_sizes(shard.total(len(kept)), batch_size, world_size)
            return ShardPlan(kept, weights, tuple(sizes), shard=shard, seed=stream_seed(0, 0, 1)).dealt()

        planned, seconds = _timed(plan)
        order = planned.rank_order(shard.ranks.rank, world_size)
        (positions, fresh), exchanged = _timed(lambda: shard.to_owners(order, torch.rand(len(order))))
        rows.history[0, positions] = fresh
        return {'own': len(shard), 'trained_on': len(order), 'plan_seconds': seconds, 'exchange_seconds': exchanged}

    epoch(WARM_UP)
    before = peak_resident_bytes()
    return {**epoch(samples), 'peak_bytes': peak_resident_bytes() - before}


def sharded(samples: int, world_size: int, options: Sequence[Any]) -> dict[str, Any]:
    """Measures one N on ranks of this machine; of each number the largest of all ranks."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        meet = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free.getsockname()[1]), 'WORLD_SIZE': str(world_size)}
    command = [sys.executable, __file__, '--one', '--shard', '--samples', samples, *options]
    ranks = [
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env={**os.environ, **meet, 'RANK': str(rank)})
        for rank in range(world_size)
    ]
    found = [json.loads(rank.communicate()[0]) for rank in ranks]
    row = {name: max(one[name] for one in found) for name in found[0]}
    seconds = row['plan_seconds'] + row['exchange_seconds']
    return {
        'samples': samples,
        **row,
        'nanoseconds_per_own_sample': 1e9 * seconds / row['own'],
        'bytes_per_own_sample': row['peak_bytes'] / row['own'],
    }


def markdown_sharded(results: dict[str, Any]) -> str:
    """The results of ``--shard`` as a table, and what 1e9 samples would cost each of 64 ranks."""
    settings, rows = results['settings'], results['rows']
    text = (
        f'`shard=True`, `prune_ratio` {settings["prune_ratio"]}, {settings["world_size"]} processes on one machine over gloo, uniform '
        'scores. CPU seconds of a process, its waiting for the others included where it is busy; peak memory beyond the interpreter: the '
        'table, the plan and both exchanges.\n\n'
    )
    header = [
        'samples',
        'a rank keeps',
        'it trains on',
        'plan, s',
        'scores back, s',
        'ns a sample it keeps',
        'peak, GB',
        'peak, bytes a sample it keeps',
    ]
    cells = [
        [
            f'{row["samples"]:,}',
            f'{row["own"]:,}',
            f'{row["trained_on"]:,}',
            f'{row["plan_seconds"]:.3g}',
            f'{row["exchange_seconds"]:.3g}',
            f'{row["nanoseconds_per_own_sample"]:.0f}',
            f'{row["peak_bytes"] / 1e9:.2f}',
            f'{row["bytes_per_own_sample"]:.1f}',
        ]
        for row in rows
    ]
    own = 10**9 / 64
    nearest = min(rows, key=lambda row: abs(row['own'] - own))
    text += record.table(header, cells)
    return text + (
        f'\n10^9 samples on 64 ranks are {own / 1e6:.1f} million a rank, in proportion to the row that is nearest: '
        f'{own * nearest["bytes_per_own_sample"] / 1e9:.2f} GB and {own * nearest["nanoseconds_per_own_sample"] / 1e9:.1f} s of CPU '
        'time an epoch. The ranks of a real network wait longer for each other; that was not measured.\n'
    )


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
    parser.add_argument('--shard', action='store_true', help='with shard=True, on as many processes of this machine as there are ranks')
    parser.add_argument('--one', action='store_true', help='measure one size in this process and print JSON')
    args = parser.parse_args(argv)
    settings = {'prune_ratio': args.prune_ratio, 'batch_size': args.batch_size, 'world_size': args.world_size}
    if args.one and args.shard:
        print(json.dumps(measure_shard(int(args.samples[0]), **settings)))
        return None
    if args.one:
        print(json.dumps(measure(int(args.samples[0]), args.repeats, **settings)))
        return None
    rows = []
    options = [
        part
        for name in ('repeats', 'prune_ratio', 'batch_size', 'world_size')
        for part in (f'--{name}'.replace('_', '-'), vars(args)[name])
    ]
    if args.shard:
        rows = [sharded(int(samples), args.world_size, options) for samples in args.samples]
        results = {'settings': settings, 'rows': rows}
        return record.write(args.out, 'plan_scale_sharded', results, markdown_sharded(results), title='Planning an epoch, shard=True')
    for samples in args.samples:
        command = [sys.executable, __file__, '--one', '--samples', samples, *options]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout))
    results = {'settings': settings, 'rows': rows, 'exponent': exponent(rows)}
    return record.write(args.out, 'plan_scale', results, markdown(results), title='Planning an epoch')


if __name__ == '__main__':
    main()
