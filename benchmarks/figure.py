"""Draws what a sweep gave, for README.md: ``python benchmarks/figure.py RESULTS.json OUT.svg``.

``RESULTS.json`` is the ``results.json`` that ``effalgos bench`` writes. Left, test error against samples trained on, the mean over the
seeds; right, each method's final accuracy (mean and standard deviation) against its training time as a share of the baseline's.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from composer_effalgos.utils.figures import save_figure

# Okabe and Ito's, told apart by colour-blind eyes, in an order of falling contrast; the baseline is grey
COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#56b4e9', '#e69f00', '#000000', '#999933', '#882255')
MARKERS = 'os^vDP*X<>'


def draw(results: dict[str, Any]) -> Figure:
    """Draws both panels."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run in results['runs']:
        by_method.setdefault(run['method'], []).append(run)
    baseline = 'baseline' if 'baseline' in by_method else next(iter(by_method))
    full = statistics.mean(run['train_seconds'] for run in by_method[baseline])
    others = [method for method in by_method if method != baseline]
    colors = {baseline: '#777777', **dict(zip(others, COLORS * 3, strict=False))}

    figure = Figure(figsize=(10.5, 3.6), layout='constrained', facecolor='white')
    curves, ends = figure.subplots(1, 2, width_ratios=(1, 1))
    for method, runs in by_method.items():
        epochs = min(len(run['epochs']) for run in runs)
        columns = [[run['epochs'][epoch] for run in runs] for epoch in range(epochs)]
        columns = [column for column in columns if all(entry['eval_accuracy'] is not None for entry in column)]
        means = [100 * (1 - statistics.mean(entry['eval_accuracy'] for entry in column)) for column in columns]
        samples = [
            statistics.mean(sum(entry['samples'] for entry in run['epochs'][: column[0]['epoch'] + 1]) for run in runs)
            for column in columns
        ]
        style = {'color': colors[method], 'linewidth': 2.6 if method == baseline else 1.5}
        curves.plot([count / 1000 for count in samples], means, label=method, **style)
        accuracy = [100 * run['eval_accuracy'] for run in runs]
        share = 100 * statistics.mean(run['train_seconds'] for run in runs) / full
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0
        marker = MARKERS[list(by_method).index(method) % len(MARKERS)]
        ends.errorbar(
            share, statistics.mean(accuracy), yerr=spread, fmt=marker, color=colors[method], capsize=3, markersize=6, label=method
        )

    curves.set(xlabel='samples trained on, thousands', ylabel='test error, %', yscale='log')
    curves.yaxis.set_major_formatter('{x:g}')
    ends.set(xlabel=f'training time, % of {baseline}', ylabel='test accuracy, %')
    figure.legend(*ends.get_legend_handles_labels(), loc='outside right center', frameon=False, fontsize=8)
    for axes in (curves, ends):
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(color='0.9', linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


def main(arguments: list[str]) -> int:
    """Reads the results and writes the picture."""
    if len(arguments) != 2:
        print('usage: python benchmarks/figure.py RESULTS.json OUT.svg', file=sys.stderr)
        return 2
    figure = draw(json.loads(Path(arguments[0]).read_text(encoding='utf-8')))
    save_figure(figure, Path(arguments[1]))
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
