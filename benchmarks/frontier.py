"""Equivalent-budget factors of the finished runs of a sweep that trains plain runs at several lengths.

First the runs, then what they show (``baseline+15ep``, ``baseline+30ep``, ... are the plain ones)::

    effalgos bench yamls/sweeps/frontier_cifar10.yaml dataset.path=data --out runs/frontier_cifar10
    python benchmarks/frontier.py runs/frontier_cifar10 --name frontier_cifar10_cpu
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record

from composer_effalgos.report.equal_budget import Cell, equivalent_budget
from composer_effalgos.report.runner import FINISHED
from composer_effalgos.report.runs import Run, read_runs
from composer_effalgos.utils.errors import InputError

BUDGETS: dict[str, Callable[[dict[str, Any]], float]] = {
    'CPU seconds': lambda summary: summary['totals']['train_cpu_seconds'],
    'samples': lambda summary: summary['totals']['samples_seen'],
    'steps': lambda summary: sum(epoch['batches'] for epoch in summary['epochs']),
}


def cells(runs: Sequence[Run], budget: Callable[[dict[str, Any]], float]) -> list[Cell]:
    """The runs by method and length, in their order."""
    methods = dict.fromkeys(run.method for run in runs)
    found = []
    for method in methods:
        own = [run.summary for run in runs if run.method == method]
        quality = [100 * summary['totals']['eval_accuracy'] for summary in own]
        found.append(Cell(method, np.array([budget(summary) for summary in own], float), np.array(quality)))
    return found


def frontier(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a method and length: accuracy, budgets and, but for the plain runs, the factor by each budget."""
    rows: dict[str, dict[str, Any]] = {}
    for unit, budget in BUDGETS.items():
        found = cells(runs, budget)
        baseline = [cell for cell in found if cell.name.partition('+')[0] == 'baseline']
        for cell in found:
            spread = float(cell.quality.std(ddof=1)) if len(cell.quality) > 1 else None
            row = rows.setdefault(
                cell.name, {'method': cell.name, 'seeds': len(cell.quality), 'accuracy': float(cell.quality.mean()), 'sd': spread}
            )
            row[unit] = float(cell.budget.mean())
            if cell not in baseline:
                factor = equivalent_budget(baseline, cell)
                row[f'factor by {unit}'] = str(factor)
    return list(rows.values())


def table(rows: Sequence[dict[str, Any]]) -> str:
    columns = ['method', 'seeds', 'accuracy %', *BUDGETS, *(f'factor by {unit}' for unit in BUDGETS)]
    lines = [f'| {" | ".join(columns)} |', f'| --- |{" ---: |" * (len(columns) - 1)}']
    for row in rows:
        accuracy = f'{row["accuracy"]:.2f}' + ('' if row['sd'] is None else f' ± {row["sd"]:.2f}')
        budgets = [f'{row[unit]:,.0f}' for unit in BUDGETS]
        factors = [row.get(f'factor by {unit}', '–') for unit in BUDGETS]
        lines.append(f'| {" | ".join([row["method"], str(row["seeds"]), accuracy, *budgets, *factors])} |')
    return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, help='folder of runs')
    parser.add_argument('--name', required=True, help='name of the result')
    parser.add_argument('--note', default='', help='a sentence below the table')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'))
    args = parser.parse_args(argv)
    try:
        runs = [run for run in read_runs(args.runs)[0] if (args.runs / run.folder / FINISHED).exists()]
        runs = [run for run in runs if run.summary['totals']['eval_accuracy'] is not None]
        rows = frontier(runs)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    text = table(rows)
    print(text)
    kept = ('run_name', 'seed', 'device', 'world_size', 'versions', 'epochs', 'totals')  # the recipe holds paths of this machine
    summaries = [{key: run.summary[key] for key in kept} for run in runs]
    legend = (
        '\n\nThe factor: what plain training needs for the same accuracy, over what the method spent; its 95 % interval in brackets. '
        f'Above 1 the method pays, below 1 one should train shorter. {args.note}'
    )
    record.write(args.out, args.name, {'rows': rows, 'runs': summaries}, text + legend, title='Equivalent-budget factors')
    return 0


if __name__ == '__main__':
    sys.exit(main())
