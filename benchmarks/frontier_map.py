"""Where does a method pay? A map of its equivalent-budget factor over the length of training and the size of the training set.

One frontier per size, in a folder of its own or as a record of ``frontier.py``, then the map (see benchmarks/README.md)::

    effalgos frontier yamls/sweeps/frontier_map.yaml dataset.path=data dataset.limit=5000 --out runs/frontier_map/5000
    python benchmarks/frontier_map.py runs/frontier_map/* --method infobatch --name frontier_map_cpu
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import record
from frontier import finished_runs
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from composer_effalgos.report import frontier
from composer_effalgos.report.frontier import UNITS
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.figures import save_figure

LARGEST = 2.0  # factor at the end of the colours


def factors(path: Path, method: str, by: str | None) -> list[dict[str, Any]]:
    """The factors of a method's lengths in a folder of runs or a record of them, with the size of the training set in samples."""
    runs, _ = finished_runs(path)
    found = frontier(runs, str(path), by)
    summary = runs[0].summary
    plain = next(point for point in found.points if point.plain)
    size = next(run.summary['epochs'][0]['samples'] for run in runs if run.method == plain.method)
    epochs = {run.method: len(run.summary['epochs']) for run in runs}
    return [
        {
            'size': size,
            'epochs': epochs[point.method],
            'seeds': len(point.seeds),
            'text': str(point.factors[found.by]),
            'verdict': point.factors[found.by].verdict,
            'value': float(np.clip(point.factors[found.by].value, point.factors[found.by].least, point.factors[found.by].most)),
            'by': found.by,
            'versions': summary['versions'],
        }
        for point in found.points
        if not point.plain and point.method.rpartition('+')[0] == method
    ]


def draw(cells: Sequence[dict[str, Any]], method: str) -> Figure:
    """A cell for each length and size: blue where the method pays, red where plain training does."""
    sizes, lengths = (sorted({cell[key] for cell in cells}) for key in ('size', 'epochs'))
    values = np.full((len(sizes), len(lengths)), np.nan)
    figure = Figure(figsize=(1.6 + 1.5 * len(lengths), 1.4 + 0.8 * len(sizes)), layout='constrained', facecolor='white')
    axes = figure.subplots()
    for cell in cells:
        row, column = sizes.index(cell['size']), lengths.index(cell['epochs'])
        values[row, column] = cell['value']
        weight = 'normal' if cell['verdict'].startswith('not') else 'bold'
        axes.text(column, row, cell['text'].replace(' (', '\n('), ha='center', va='center', fontsize=8, fontweight=weight)
    image = axes.imshow(values, origin='lower', aspect='auto', cmap='RdBu', norm=TwoSlopeNorm(1.0, 1 / LARGEST, LARGEST))
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(sizes)), [f'{size:,}' for size in sizes])
    axes.set(xlabel='epochs', ylabel='training samples', title=f'{method}: equivalent-budget factor by {UNITS[cells[0]["by"]]}')
    figure.colorbar(image, ax=axes, label='factor')
    return figure


@record.bad_input_is_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the map."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', type=Path, nargs='+', help='one for each size: a folder of runs, or a record by frontier.py (.json)')
    parser.add_argument('--method', default='infobatch', help='the name before the last +')
    parser.add_argument('--name', default='frontier_map', help='name of the result')
    parser.add_argument('--by', choices=UNITS, help='what a budget is')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'))
    args = parser.parse_args(argv)
    cells = [cell for path in args.runs for cell in factors(path, args.method, args.by)]
    if not cells:
        raise InputError(f'--method: expected the name of a method in {args.runs[0]}, got {args.method!r}')
    rows = [[f'{cell["size"]:,}', cell['epochs'], cell['seeds'], cell['text'], cell['verdict']] for cell in cells]
    text = record.table(['training samples', 'epochs', 'seeds', f'factor by {UNITS[cells[0]["by"]]}', 'verdict'], rows)
    title = f'Where {args.method} pays'
    record.write(args.out, args.name, {'cells': cells}, f'![{title}]({args.name}.svg)\n\n{text}', title=title)
    save_figure(draw(cells, args.method), args.out / f'{args.name}.svg')
    return 0


if __name__ == '__main__':
    sys.exit(main())
