"""CIFAR-10 with a ResNet-18: all samples against InfoBatch over several seeds, and the methods with BlurPool and SqueezeExcite.

Made for machines that are lent for minutes: it trains one run after the other until ``--minutes`` are over, stops the one under way,
and writes what there is. The same command goes on from the last checkpoint; runs that are done are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record

from composer_effalgos.bench.table import Row, markdown_table, read_runs, table_rows
from composer_effalgos.errors import InputError
from composer_effalgos.monitor import SUMMARY
from composer_effalgos.recipe import load_recipe, recipe_folder

# Recipe in yamls/cifar10 and what is set on top of it. The pair to compare differs in nothing but InfoBatch.
METHODS: dict[str, tuple[str, list[str]]] = {
    'baseline': ('cifar10_resnet18_baseline', []),
    'infobatch': ('cifar10_resnet18_baseline', ['algorithms.infobatch={prune_ratio: 0.5, delta: 0.875}']),
    'infobatch_blurpool_squeeze_excite': ('cifar10_resnet18_infobatch', []),
    'glister_blurpool_squeeze_excite': ('cifar10_resnet18_glister_blurpool_squeeze_excite', []),
}
COMPARED = ('baseline', 'infobatch')
GRACE = 30.0  # seconds for a run to end after SIGTERM


@dataclass(frozen=True)
class Job:
    """One run to train."""

    run_name: str
    recipe: Path
    overrides: list[str]
    epochs: int

    def done(self, out: Path) -> bool:
        """Whether its summary has every epoch, the last with its accuracy."""
        path = out / self.run_name / SUMMARY
        if not path.exists():
            return False
        epochs = json.loads(path.read_text(encoding='utf-8'))['epochs']
        return len(epochs) == self.epochs and epochs[-1]['eval_accuracy'] is not None


def plan_jobs(args: argparse.Namespace) -> list[Job]:
    """The runs in order: the two that are compared next to each other, seed by seed, then the others once."""
    order = [(method, seed) for seed in args.seeds for method in COMPARED]
    order += [(method, args.seeds[0]) for method in METHODS if method not in COMPARED]
    common = [
        f'max_duration={args.epochs}ep',
        f'dataset.path={json.dumps(str(args.data))}',
        f'dataset.num_workers={args.workers}',
        'algorithms.channels_last={}',
        'loggers=null',
        *args.overrides,
    ]
    # Not part of what is compared
    keeping = ['progress_bar=false', 'autoresume=true', f'save_interval={args.save_interval}', 'save_num_checkpoints_to_keep=1']
    jobs = []
    for method, seed in order:
        if method in args.methods:
            name, own = METHODS[method]
            recipe = recipe_folder() / 'cifar10' / f'{name}.yaml'
            run_name = f'{method}_{args.epochs}ep_seed{seed}'
            placed = [f'run_name={run_name}', f'seed={seed}', f'save_folder={json.dumps(str(args.out))}']
            jobs.append(Job(run_name, recipe, [*common, *own, *keeping, *placed], args.epochs))
    for job in jobs:
        load_recipe(job.recipe, job.overrides)  # refuses what is wrong before the first minute is spent
    return jobs


def train(job: Job, out: Path, deadline: float) -> bool:
    """Trains a run, or what is left of it, no longer than to the deadline.

    Returns:
        Whether the run came to its end.

    Raises:
        RuntimeError: It failed.
    """
    folder = out / job.run_name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, '-m', 'composer_effalgos.train', str(job.recipe), *job.overrides]
    with (folder / 'train.log').open('a', encoding='utf-8') as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    if process.returncode != 0:
        lines = (folder / 'train.log').read_text(encoding='utf-8', errors='replace').strip().splitlines()
        raise RuntimeError(f'{job.run_name}: {lines[-1] if lines else f"exit status {process.returncode}"} (see {folder / "train.log"})')
    return True


def efficiency(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Share of time saved over share of samples saved, of each method that has a baseline."""
    return [
        {
            'method': row.method,
            'saved_samples': row.saved_fraction,
            'saved_time': 1 - row.time_ratio,
            'efficiency': (1 - row.time_ratio) / row.saved_fraction,
        }
        for row in rows
        if row.time_ratio is not None and row.saved_fraction > 0
    ]


def report(jobs: Sequence[Job], out: Path) -> Path:
    """Writes ``gpu_cifar10.{json,md}`` from the runs that are done."""
    done = {job.run_name for job in jobs if job.done(out)}
    pending = [job.run_name for job in jobs if job.run_name not in done]
    runs = [run for run in read_runs(out)[0] if run.summary['run_name'] in done] if done else []
    rows = table_rows(runs)
    saved = efficiency(rows)
    results = {
        'runs': [{key: run.summary[key] for key in ('run_name', 'seed', 'device', 'totals', 'epochs', 'recipe')} for run in runs],
        'efficiency': saved,
        'pending': pending,
    }
    text = markdown_table(rows) if rows else ''
    if saved:
        header = ['', 'samples saved', 'time saved', 'time over samples']
        cells = [
            [item['method'], f'{item["saved_samples"]:.2%}', f'{item["saved_time"]:.2%}', f'{item["efficiency"]:.3f}'] for item in saved
        ]
        text += '\n' + record.table(header, cells)
        text += '\nTime is that of training, data loading included; a method with other layers than the baseline is not comparable in it.\n'
    if pending:
        text += f'\nNot done yet: {", ".join(pending)}.\n'
    return record.write(out, 'gpu_cifar10', results, text, title='CIFAR-10, ResNet-18')


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the command line says.

    Returns:
        The exit status: 0 when every run is done, 3 when the time was over before, 2 for bad input, 1 where a run failed.
    """
    parser = argparse.ArgumentParser(description='CIFAR-10 with a ResNet-18, in portions of some minutes.')
    parser.add_argument('--data', type=Path, default=Path('data'), help='folder of the data set')
    parser.add_argument('--out', type=Path, default=Path('runs/gpu_cifar10'), help='folder of runs and results, to be kept between calls')
    parser.add_argument('--minutes', type=float, default=9.0, help='stop after so many')
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--seeds', type=int, nargs='+', default=[17, 18, 19])
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    parser.add_argument('--workers', type=int, default=8, help='loader processes')
    parser.add_argument('--save-interval', default='5ep', help='between checkpoints')
    parser.add_argument(
        '--set', dest='overrides', action='append', default=[], metavar='key=value', help='a setting on top of every recipe'
    )
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    status = 0
    try:
        jobs = plan_jobs(args)
        for job in jobs:
            if job.done(args.out):
                continue
            if time.monotonic() >= deadline or not train(job, args.out, deadline):
                status = 3
                break
            print(f'{job.run_name}: done', flush=True)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f'error: {error}', file=sys.stderr)
        status = 1
    print(report(jobs, args.out).read_text(encoding='utf-8'))
    return status


if __name__ == '__main__':
    sys.exit(main())
