"""The frontier of finished runs, recorded with machine, versions and command; ``effalgos frontier`` trains them.

First the runs (the same command goes on after ``--minutes``), then their record::

    effalgos frontier yamls/sweeps/frontier_cifar10.yaml dataset.path=data --out runs/frontier_cifar10
    python benchmarks/frontier.py runs/frontier_cifar10 --name frontier_cifar10_cpu

A sweep that is trained in parts, on several days or machines of one kind, is recorded in parts: give the earlier record beside the folder::

    python benchmarks/frontier.py runs/frontier_cifar10 benchmarks/results/frontier_cifar10_cpu.json --name frontier_cifar10_cpu
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import record

from composer_effalgos.report import frontier, read_runs
from composer_effalgos.report.frontier import UNITS, finished_among
from composer_effalgos.report.frontier_table import as_json, markdown, write_figure
from composer_effalgos.report.runs import Run, check_summary
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_text
from composer_effalgos.utils.text import one_line


@record.bad_input_is_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Records the finished runs of one or several folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, nargs='+', help='folders of runs of one sweep, and earlier records (.json) of it')
    parser.add_argument('--name', required=True, help='name of the result')
    parser.add_argument('--by', choices=UNITS, help='what a budget is; CPU seconds by default on a CPU, seconds elsewhere')
    parser.add_argument(
        '--untimed', action='store_true', help='leave out times: the runs are of several machines, or of one under other loads'
    )
    parser.add_argument('--note', default='', help='a sentence below the table')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'))
    args = parser.parse_args(argv)
    parts = [finished_runs(path) for path in args.runs]
    runs = [run for done, _ in parts for run in done]
    left_out = [line for _, lines in parts for line in lines]
    found = frontier(runs, ', '.join(map(str, args.runs)), args.by, timed=not args.untimed, left_out=left_out)
    picture = f'![Quality over budget: the curve of plain runs with its 95 % band, and each method]({args.name}.svg)\n\n'
    results = as_json(found) | {'runs': [record.without_paths(run.summary) for run in runs]}
    record.write(args.out, args.name, results, f'{picture}{markdown(found)}\n{args.note}', title='Equivalent-budget factors')
    write_figure(found, args.out, args.name, ['svg'])
    return 0


def finished_runs(path: Path) -> tuple[list[Run], list[str]]:
    """The finished runs of a folder, with a line for each other one; or the runs of an earlier record."""
    if path.suffix != '.json':
        runs, problems = read_runs(path)
        done, unfinished = finished_among(runs, path)
        return done, [*problems, *unfinished]
    try:
        summaries = json.loads(read_text(path))['runs']
        for summary in summaries:
            check_summary(summary)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'{path}: expected a record of runs, as this script writes it, got {one_line(error)}') from error
    return [Run(Path(summary['run_name']), summary) for summary in summaries], []


if __name__ == '__main__':
    sys.exit(main())
