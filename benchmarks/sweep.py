"""A sweep of ``yamls/sweeps`` as a benchmark: trained by ``effalgos bench``, its table recorded with machine, versions and command.

The composition table on a GPU (the same command goes on after ``--minutes``, until it ends with status 0)::

    python benchmarks/sweep.py yamls/sweeps/cifar10_compose.yaml dataset.path=data --minutes 9

On a CPU::

    python benchmarks/sweep.py yamls/sweeps/cifar10_compose_cpu.yaml dataset.path=data

The time to equal accuracy, where a sweep trains every method for several lengths::

    python benchmarks/sweep.py yamls/sweeps/digits_lengths.yaml --equal-to baseline+16ep
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
from rich.console import Console

from composer_effalgos.report import load_sweep, markdown_table, read_runs, run_sweep, table_rows
from composer_effalgos.report.charts import published_for
from composer_effalgos.report.results import JSON
from composer_effalgos.report.runner import FINISHED
from composer_effalgos.report.table import PARITY, Row, note
from composer_effalgos.utils.errors import InputError


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


def equal_accuracy(rows: Sequence[Row], reference: str) -> list[dict[str, Any]]:
    """How soon each method gets to the final accuracy of ``reference``, the name of a row, when it may choose its length.

    A method's rows are those whose name differs in what follows the last ``+`` alone: ``infobatch+8ep``, ``infobatch+16ep``. Of its lengths
    whose final accuracy, the mean over the seeds, is no more than :data:`PARITY` below the reference's, the one that trains for the fewest
    seconds counts. The reference's own method is there too: it may get to that accuracy in a shorter run.

    Gives for each method its shortest such run, and how many times sooner than the reference it ends (``times_faster``); where no length is
    accurate enough, the most accurate one, with None.
    """
    named = {row.method: row for row in rows}
    if reference not in named or named[reference].accuracy is None:
        raise InputError(f'--equal-to: {reference!r} is none of the methods: {", ".join(named)}')
    goal: float = named[reference].accuracy  # type: ignore[assignment]
    methods: dict[str, list[Row]] = {}
    for row in rows:
        if row.accuracy is not None:
            methods.setdefault(row.method.rpartition('+')[0] or row.method, []).append(row)
    found = []
    for method, lengths in methods.items():
        there = [row for row in lengths if row.accuracy >= goal - PARITY]  # type: ignore[operator]
        best = min(there, key=lambda row: row.train_seconds) if there else max(lengths, key=lambda row: row.accuracy or 0)
        found.append(
            {
                'method': method,
                'run': best.method,
                'seeds': len(best.runs),
                'accuracy': best.accuracy,
                'samples_seen': best.samples_seen,
                'train_seconds': best.train_seconds,
                'times_faster': named[reference].train_seconds / best.train_seconds if there else None,
            }
        )
    return found


def equal_accuracy_table(found: Sequence[dict[str, Any]], reference: str) -> str:
    """The rows of :func:`equal_accuracy` as Markdown."""
    header = ['method', 'shortest run as accurate', 'accuracy %', 'samples', 'train s', f'times faster than {reference}']
    cells = [
        [
            item['method'],
            item['run'] if item['times_faster'] else f'none; most accurate: {item["run"]}',
            f'{100 * item["accuracy"]:.2f}',
            f'{item["samples_seen"]:,.0f}',
            f'{item["train_seconds"]:.1f}',
            f'{item["times_faster"]:.2f}' if item['times_faster'] else '–',
        ]
        for item in found
    ]
    return (
        f'\nTime to equal accuracy: the shortest run of each method whose mean final accuracy is at most {100 * PARITY:g} points below '
        f'that of {reference}.\n\n{record.table(header, cells)}'
    )


def report(
    runs_dir: Path,
    targets: Sequence[float],
    out: Path,
    name: str,
    title: str,
    left: Sequence[str],
    reference: str | None = None,
    search: Path | None = None,
) -> Path:
    """Writes ``name.json`` and ``name.md`` from the runs that are done.

    ``reference`` is what :func:`equal_accuracy` compares with; ``search`` the folder of the search that chose the methods.
    """
    runs = [run for run in read_runs(runs_dir)[0] if (runs_dir / run.folder / FINISHED).exists()]
    rows = table_rows(runs, targets)
    saved = efficiency(rows)
    text = f'{markdown_table(rows)}\n{note(rows)}\n'
    if saved:
        header = ['', 'samples saved', 'time saved', 'time over samples']
        cells = [
            [item['method'], f'{item["saved_samples"]:.2%}', f'{item["saved_time"]:.2%}', f'{item["efficiency"]:.3f}'] for item in saved
        ]
        text += f'\n{record.table(header, cells)}'
        text += '\nTime is that of training, data loading included; a method with other layers than the baseline is not comparable in it.\n'
    equal = [] if reference is None else equal_accuracy(rows, reference)
    if reference is not None:
        text += equal_accuracy_table(equal, reference)
    trials = []
    if search is not None:
        trials = json.loads((search / 'search.json').read_text(encoding='utf-8'))['trials']
        table = (search / 'search.md').read_text(encoding='utf-8')
        text += f'\nThe search that chose them, {len(trials)} runs with one seed:\n\n{table}'
    theirs = [item for item in published_for(rows) if item['epochs'] in {len(run.summary['epochs']) for run in runs}]
    if theirs:
        header = ['published', 's/epoch', 'epoch > 70 %', 'source']
        text += '\n' + record.table(
            header, [[item['method'], f'{item["seconds"] / item["epochs"]:.2f}', item['first_above_70'], item['source']] for item in theirs]
        )
    if left:
        text += f'\nNot done yet: {", ".join(left)}.\n'
    methods = json.loads((runs_dir / JSON).read_text(encoding='utf-8'))['methods']
    results = {'methods': methods, 'efficiency': saved, 'equal_accuracy': equal, 'search': trials, 'left': list(left)}
    return record.write(out, name, results, text, title=title)


@record.bad_input_is_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the command line says, and records it.

    Returns:
        The exit status: 0 when every run is done, 3 when the time was over before, 2 for bad input, 1 where a run failed.
    """
    parser = argparse.ArgumentParser(description='A sweep as a benchmark.')
    parser.add_argument('sweep', type=Path)
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='settings on top of every recipe')
    parser.add_argument('--runs', type=Path, help='folder of the runs, to be kept between calls; runs/<name of the sweep> by default')
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'results', help='folder of the results')
    parser.add_argument('--name', help='of the results; the name of the sweep by default')
    parser.add_argument('--minutes', type=float, help='stop after so many')
    parser.add_argument('--seeds', type=int, nargs='+', default=[], help='in place of those of the sweep')
    parser.add_argument(
        '--equal-to', metavar='METHOD', help='how soon does each method get to the accuracy of this one, at any of its lengths'
    )
    parser.add_argument('--only', nargs='+', default=[], help='methods to train')
    args = parser.parse_intermixed_args(argv)
    sweep = load_sweep(args.sweep)
    runs = args.runs or Path('runs') / sweep.name
    outcome = run_sweep(args.sweep, runs, args.overrides, seeds=args.seeds, only=args.only, minutes=args.minutes, console=Console())
    for failure in outcome.failures:
        print(f'error: {failure}', file=sys.stderr)
    title = args.sweep.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')
    left = [*outcome.failures, *outcome.pending]
    if any(runs.glob(f'*/{FINISHED}')):
        searched = args.sweep.name == 'best.yaml' and (args.sweep.parent / 'search.json').exists()  # written by a search
        search = args.sweep.parent if searched else None
        report(runs, sweep.targets, args.out, args.name or sweep.name, title, left, args.equal_to, search)
    return outcome.status


if __name__ == '__main__':
    sys.exit(main())
