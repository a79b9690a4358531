"""Writes the measured factors into README, docs/frontier.md and the method cards, from the records in benchmarks/results.

Run it after a new record; with ``--check`` it writes nothing and names the documents that differ from the records::

    python benchmarks/documents.py

A document holds the tables between comments, such as ``<!-- measured: table text -->`` and ``<!-- end -->``: a kind and its arguments.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import record

from composer_effalgos.report.frontier import UNITS
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_text
from composer_effalgos.utils.tables import markdown_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    *('README.md', 'docs/frontier.md'),
    *('composer_effalgos/adabatch/README.md', 'composer_effalgos/pruning/README.md', 'composer_effalgos/pruning/infobatch.md'),
)
RECORDS = {  # by the name of the task, its title as a column of README and after "on"
    'few': ('frontier_small_cpu', '5,000 images of CIFAR-10', '5,000 images'),
    'all': ('frontier_cifar10_cpu', 'all 50,000', '50,000 images'),
    'noisy': ('frontier_noisy_cpu', '10,000, 40 % wrong labels', 'images with wrong labels'),
    'rare': ('frontier_long_tail_cpu', '4,958, classes 100:1', 'images with rare classes'),
    'text': ('frontier_text_cpu', 'text', 'text'),
}
METHODS = {  # rows of README's table
    'infobatch': 'InfoBatch',
    'random': '`random`',
    'seta': '`seta`',
    'ies': '`ies`',
    'ucb': '`ucb`',
    'epsilon_greedy': '`epsilon_greedy`',
    'pdd': '`pdd`',
    'rho': '`rho`',
    'small_batch': 'batch size halved, fixed',
    'seesaw': 'AdaBatch with Seesaw, from half the batch size to twice',
    'seesaw_full': 'AdaBatch with Seesaw, from the whole batch size to four times',
    'adabatch': 'AdaBatch from half the batch size, doubled three times',
    'random_subset': 'random subset of 30 % (text: 50 %), new each epoch',
    'gradmatch': 'GradMatch, 30 %',
    'glister': 'GLISTER, 30 %',
    'craig': 'CRAIG, 30 %',
    'selective_backprop': "Composer's SelectiveBackprop",
    'eslm': '`ESLM`',
    'lin_upper': '`LinUpper`',
}
SHOWN = {'infobatch': {'text': 'infobatch+8ep', None: 'infobatch+30ep'}}  # of a method with several lengths, the one in README
NONE = '–'
_BLOCK = re.compile(r'(<!-- measured: ([^>]*?) -->\n).*?(<!-- end -->)', re.DOTALL)

Points = Mapping[str, Mapping[str, Any]]


def points_of(task: str) -> Points:
    """The points of a task's record, by their names."""
    return {point['method']: point for point in json.loads(read_text(ROOT / f'benchmarks/results/{RECORDS[task][0]}.json'))['points']}


def shown(points: Points, task: str, method: str) -> Mapping[str, Any] | None:
    """The point of a method at the length that README shows, if the task has the method."""
    lengths = SHOWN.get(method, {})
    names = [name for name in points if name.rpartition('+')[0] == method]
    name = lengths.get(task, lengths.get(None)) if lengths else names[0] if names else None
    return points.get(name or '')


def seeds(point: Mapping[str, Any]) -> int:
    """The number of a point's seeds."""
    return len(point['seeds'].split())


def epochs(point: Mapping[str, Any]) -> int:
    """The length of a point in epochs, by its name."""
    return int(re.fullmatch(r'.*\+(\d+)ep', point['method'])[1])  # type: ignore[index]


def table(task: str) -> str:
    """The table of a task's record: plain runs by length, then the methods, the largest factor first."""
    header, rule, *lines = re.findall(r'^\| .*\n', read_text(ROOT / f'benchmarks/results/{RECORDS[task][0]}.md'), flags=re.MULTILINE)
    rows = {line.split(' | ')[0].removeprefix('| '): line for line in lines}
    points = points_of(task).values()
    by = next(unit for unit in UNITS if unit in next(iter(points)))

    def rank(point: Mapping[str, Any]) -> float:
        """The factor; a bound counts as beyond all others."""
        value = point[f'factor_{by}_value']
        return value if value is not None else float('inf') if str(point[f'factor_{by}']).startswith('>') else 0.0

    plain = sorted((point for point in points if point['plain']), key=lambda point: point['samples'])
    methods = sorted((point for point in points if not point['plain']), key=rank, reverse=True)
    return ''.join([header, rule, *(rows[point['method']] for point in [*plain, *methods])])


def overview(unit: str = 'samples', *methods: str) -> str:
    """The factor by a unit of methods, all by default, on every task that has one of them, in bold where it lies above 1."""
    found = {task: {method: shown(points_of(task), task, method) for method in methods or METHODS} for task in RECORDS}
    tasks = [task for task, own in found.items() if any(own.values())]

    def cell(task: str, method: str) -> str:
        point = found[task][method]
        return NONE if point is None else _bold_if_above_one(point[f'factor_{unit}'])

    rows = [[METHODS[method], *(cell(task, method) for task in tasks)] for method in methods or METHODS]
    text = markdown_table(['method', *(RECORDS[task][1] for task in tasks)], rows)
    return text.replace('\\', '')  # the cells are Markdown, which the table has escaped


def _bold_if_above_one(factor: str) -> str:
    """A factor such as ``1.13 (1.05 to 1.22)``, in bold if its interval lies above 1."""
    low = factor.partition('(')[2].partition(' to ')[0]
    return f'**{factor}**' if not low.startswith('<') and float(low.removeprefix('> ')) > 1 else factor


def factors(method: str) -> str:
    """A line with the factors of a method on every task that has it."""
    found = {task: shown(points_of(task), task, method) for task in RECORDS}
    texts = [f'{point["factor_samples"]} on {RECORDS[task][2]}' for task, point in found.items() if point is not None]
    return f'Equivalent-budget factor: {", ".join(texts)}.\n'


def infobatch() -> str:
    """InfoBatch's factor at every length of every task."""
    tasks = {
        'few': 'CIFAR-10, 5,000 images, ResNet-20 at 16 pixels',
        'all': 'all 50,000 images',
        'rare': '4,958 images, largest class 100 times the smallest',
        'noisy': '10,000 images, 40 % wrong labels',
        'text': 'text, a byte-level GPT',
    }
    rows = []
    for task, label in tasks.items():
        points = points_of(task)
        plain = next(point for point in points.values() if point['plain'])
        size = plain['samples'] / epochs(plain)
        own = sorted((point for point in points.values() if point['method'].startswith('infobatch+')), key=epochs)
        for point in own:
            saved = 1 - point['samples'] / (size * epochs(point))
            rows.append([label, epochs(point), f'{100 * saved:.0f} %', point['factor_samples'], seeds(point)])
    return markdown_table(['task', 'epochs', 'samples saved', 'factor', 'seeds'], rows)


def map_of(method: str) -> str:
    """The factor of a method over the size of the training set and the length, of the tasks that differ in nothing else."""
    tasks = {'5,000': points_of('few'), '50,000': points_of('all')}
    found = {
        size: {epochs(point): point for name, point in points.items() if name.startswith(f'{method}+')} for size, points in tasks.items()
    }
    lengths = sorted({length for own in found.values() for length in own})
    rows = [[size, *(own[length]['factor_samples'] if length in own else NONE for length in lengths)] for size, own in found.items()]
    return markdown_table(['training samples', *(f'{length} epochs' for length in lengths)], rows, left=())


KINDS: dict[str, Callable[..., str]] = {
    'table': table,
    'overview': overview,
    'factors': factors,
    'infobatch': infobatch,
    'map': map_of,
}


def written(text: str) -> str:
    """A document with its measured parts written again."""

    def block(match: re.Match[str]) -> str:
        kind, *arguments = match[2].split()
        return f'{match[1]}{KINDS[kind](*arguments)}{match[3]}'

    return _BLOCK.sub(block, text)


@record.bad_input_is_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; fail if a document differs from the records')
    args = parser.parse_args(argv)
    changed = {ROOT / name: text for name in DOCUMENTS if (text := written(before := read_text(ROOT / name))) != before}
    if args.check and changed:
        names = ', '.join(str(path.relative_to(ROOT)) for path in changed)
        raise InputError(f'{names}: expected the figures of benchmarks/results; run python benchmarks/documents.py')
    for path, text in changed.items():
        path.write_text(text, encoding='utf-8')
        print(f'wrote {path.relative_to(ROOT)}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
