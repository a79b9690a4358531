"""One selection from given gradients: this package against CORDS on the same data, in time, memory and what is reached.

Each case - a method, a number of samples, classes and budget, a backend - has a process of its own. It makes the gradients, selects once
from a few of them (so that code is loaded and compiled), and then measures one selection: seconds on the wall clock and of CPU time, and
the memory it took beyond the gradients, as the high-water mark of resident memory from there on (on a GPU, of the memory allocated).
A case of CORDS that reaches ``--limit`` is stopped there: its time and its memory are then lower bounds, and larger N of the same
method and number of classes are not tried.

The gradients are those of a cross-entropy at a linear classifier over features as after a ReLU, in clusters by class, wrong for about a
fifth of the samples. Selection types are ``PerClass``, options are the defaults; ``glister-rgreedy`` is GLISTER with ``greedy='RGreedy'``.
What is reached is computed from the gradients alone, by the definitions below, for whichever backend chose:

- GLISTER: the sum of each pick's first-order gain at the validation gradient of its turn (larger is better);
- GradMatch: ``|sum w g - sum g|^2 + lam |w|^2`` over all classes, as a share of ``|sum g|^2`` (smaller is better);
- CRAIG: the value of facility location (larger is better).

On a GPU, one million samples, this package alone::

    python benchmarks/selection.py --device gpu
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from composer_effalgos import functional as ef
from composer_effalgos.subset_selection import LastLayerGradients
from composer_effalgos.utils.figures import save_figure
from composer_effalgos.utils.machine import peak_resident_bytes

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    'glister': ('glister', {}),
    'glister-rgreedy': ('glister', {'greedy': 'RGreedy'}),
    'gradmatch': ('gradmatch', {}),
    'craig': ('craig', {}),
}
ETA, LAM, ROUNDS = 0.01, 0.5, 15  # the strategies' defaults
WARM_UP = 300  # samples
ROWS = 4096  # made, or compared, at a time
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One selection to measure."""

    method: str
    samples: int
    classes: int
    fraction: float
    backend: str = 'torch'
    features: int = 512
    device: str = 'cpu'
    seed: int = 17

    @property
    def budget(self) -> int:
        return round(self.fraction * self.samples)


def make_gradients(case: Case, samples: int | None = None) -> tuple[LastLayerGradients, Tensor]:
    """Gradients as of a trained classifier, made in blocks so that they alone are in memory; ``samples`` overrides the case's number.

    Returns gradients of ``[samples, classes]`` and ``[samples, features]``, and the labels, int64 ``[samples]``.
    """
    device = 'cuda' if case.device == 'gpu' else 'cpu'
    samples = case.samples if samples is None else samples
    generator = torch.Generator(device).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    centres = normal(case.classes, case.features)
    classifier = (centres + 2 * normal(case.classes, case.features)).div_(case.features**0.5)
    labels = torch.arange(samples, device=device) % case.classes
    error = torch.empty(samples, case.classes, device=device)
    embedding = torch.empty(samples, case.features, device=device)
    for start in range(0, samples, ROWS):
        rows = slice(start, start + ROWS)
        embedding[rows] = (0.3 * centres[labels[rows]] + normal(len(labels[rows]), case.features)).relu_()
        error[rows] = torch.softmax(embedding[rows] @ classifier.T, dim=1) - one_hot(labels[rows], case.classes)
    return LastLayerGradients(error, embedding), labels


def select(case: Case, gradients: LastLayerGradients, labels: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """The selection that is measured."""
    strategy, options = METHODS[case.method]
    return ef.select_subset(strategy, gradients, budget, labels=labels, backend=case.backend, seed=case.seed, **options)


def measure(case: Case, limit: float) -> dict[str, Any]:
    """Measures a case in this process; at the limit, in seconds, it prints what there is and ends the process.

    Gives the case, ``seconds``, ``cpu_seconds``, ``peak_bytes``, ``stopped`` and ``objective``.
    """
    on_gpu = case.device == 'gpu'
    select(case, *make_gradients(case, max(WARM_UP, 4 * case.classes)), 2 * case.classes)
    gradients, labels = make_gradients(case)
    start_of_peak = torch.cuda.reset_peak_memory_stats if on_gpu else reset_peak
    peak = torch.cuda.max_memory_allocated if on_gpu else peak_resident_bytes
    synchronise = torch.cuda.synchronize if on_gpu else lambda: None
    synchronise()
    start_of_peak()
    base, started, cpu_started = peak(), time.perf_counter(), time.process_time()

    def result(stopped: bool) -> dict[str, Any]:
        return asdict(case) | {
            'seconds': time.perf_counter() - started,
            'cpu_seconds': time.process_time() - cpu_started,
            'peak_bytes': peak() - base,
            'stopped': stopped,
            'objective': None,
        }

    def stop() -> None:
        print(json.dumps(result(stopped=True)), file=sys.__stdout__, flush=True)  # CORDS's own output is caught meanwhile
        os._exit(0)

    timer = threading.Timer(limit, stop)
    timer.daemon = True
    timer.start()
    indices, weights = select(case, gradients, labels, case.budget)
    synchronise()
    timer.cancel()
    found = result(stopped=False)
    assert len(indices.unique()) == case.budget
    return found | {'objective': objective(case.method, gradients, labels, indices, weights)}


def reset_peak() -> None:
    """Gives freed memory back and lets the high-water mark of resident memory start again from what is in use."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5', encoding='ascii')
    except (AttributeError, OSError):  # not on Linux: the mark is that of making the gradients, which is hardly more
        pass


def objective(method: str, gradients: LastLayerGradients, labels: Tensor, indices: Tensor, weights: Tensor) -> float:
    """What a selection by class reaches, by the definitions at the head of this file."""
    total = reference = 0.0
    for label in range(gradients.error.shape[1]):
        mine = labels[indices] == label
        part, chosen = gradients.take(labels == label), gradients.take(indices[mine])
        if method == 'gradmatch':
            w, target = weights[mine].double(), part.sum().double()
            weighted = LastLayerGradients(chosen.error * weights[mine, None], chosen.embedding).sum().double()
            total += float((weighted - target).square().sum() + LAM * w.square().sum())
            reference += float(target.square().sum())
        elif method == 'craig':
            total += facility_location(part, chosen)
        else:
            total += taylor_gain(part, label, chosen, max(1, len(chosen) // ROUNDS) if method == 'glister-rgreedy' else 1)
    return total / reference if reference else total


def taylor_gain(validation: LastLayerGradients, label: int, picks: LastLayerGradients, size: int) -> float:
    """Sum of the picks' inner products with the validation gradient, which moves on after every ``size`` of them."""
    assert validation.embedding is not None
    assert picks.embedding is not None
    error, total = validation.error, torch.zeros((), dtype=torch.float64, device=validation.device)
    onehot = torch.zeros_like(error)
    onehot[:, label] = 1
    logits = (error + onehot).clamp(min=1e-12).log()
    for start in range(0, len(picks), size):
        turn = picks.take(slice(start, start + size))
        assert turn.embedding is not None
        total += turn.dot(LastLayerGradients(error, validation.embedding).mean()).sum()
        logits -= ETA * ((validation.embedding @ turn.embedding.T + 1) @ turn.error)
        error = torch.softmax(logits, dim=1) - onehot
    return float(total)


def facility_location(items: LastLayerGradients, chosen: LastLayerGradients) -> float:
    """Sum over the items of the similarity, largest squared distance less squared distance, to the nearest of the chosen."""
    nearest, largest = [], []
    for start in range(0, len(items), ROWS):
        rows = items.take(slice(start, start + ROWS))
        nearest.append(rows.squared_distances(chosen).min(dim=1).values.double())
        largest.append(rows.squared_distances(items).max())
    return float((torch.stack(largest).max().double() - torch.cat(nearest)).sum())


def plan_cases(args: argparse.Namespace) -> tuple[list[Case], list[Case]]:
    """The cases to compare with CORDS, and those of this package that show how time grows with the classes and the budget."""

    def grid(samples: Sequence[int], classes: Sequence[int], fractions: Sequence[float]) -> Iterator[Case]:
        for method, c, n, f in itertools.product(args.methods, classes, samples, fractions):
            yield Case(method, n, c, f, features=args.features, device=args.device)

    compared = list(grid(args.samples, args.classes, [args.fraction]))
    growth = [*grid([args.growth_samples], args.growth_classes, [args.fraction])]
    growth += grid([args.growth_samples], args.classes[:1], args.growth_fractions)
    return compared, [case for case in dict.fromkeys(growth) if case not in compared]


def run(case: Case, limit: float, threads: int) -> dict[str, Any]:
    """Measures a case in a process of its own."""
    command = [sys.executable, __file__, '--one', json.dumps(asdict(case)), '--limit', str(limit), '--threads', str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    state = 'stopped' if found['stopped'] else 'done'
    where = f'{case.method}, N {case.samples:,}, C {case.classes}, {case.fraction:.0%}, {case.backend}'
    print(f'{where}: {state} after {found["seconds"]:.3g} s, {found["peak_bytes"] / MIB:.1f} MiB', file=sys.stderr, flush=True)
    return found


def compare(cases: Sequence[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures each case with this package and, as far as the limit lets it, with CORDS."""
    rows = []
    over: set[tuple[str, int]] = set()
    for case in cases:
        theirs = None
        if args.cords and (case.method, case.classes) not in over:
            theirs = run(Case(**asdict(case) | {'backend': 'cords'}), args.limit, args.threads)
            if theirs['stopped']:
                over.add((case.method, case.classes))
        rows.append({'torch': run(case, 10 * args.limit, args.threads), 'cords': theirs})
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    settings = results['settings']
    text = (
        f'{settings["features"]} features, {settings["fraction"]:.0%} selected `PerClass`, {settings["threads"]} thread(s). Seconds on the '
        'wall clock, CPU seconds in brackets; MiB beyond the gradients themselves. "Reached": GLISTER, CRAIG: more is better; GradMatch: '
        'less is better.\n\n'
    )
    if settings['cords']:
        text += (
            f'CORDS was stopped after {settings["limit"]:g} s a case: ">" marks what is a lower bound for that reason. "–": larger than a '
            'case that was stopped, not tried.\n\n'
        )
    header = ['method', 'N', 'classes', 'torch, s', 'cords, s', 'times faster', 'torch, MiB', 'cords, MiB', 'share of memory']
    header += ['reached, torch', 'reached, cords']
    cells = []
    for row in results['rows']:
        ours, theirs = row['torch'], row['cords']
        at_least, at_most = ('> ', '< ') if theirs and theirs['stopped'] else ('', '')
        cells.append(
            [
                ours['method'],
                f'{ours["samples"]:,}',
                ours['classes'],
                _seconds(ours),
                at_least + _seconds(theirs) if theirs else '–',
                f'{at_least}{theirs["cpu_seconds"] / ours["cpu_seconds"]:.0f}' if theirs else '–',
                f'{ours["peak_bytes"] / MIB:.1f}',
                f'{at_least}{theirs["peak_bytes"] / MIB:.0f}' if theirs else '–',
                f'{at_most}{ours["peak_bytes"] / theirs["peak_bytes"]:.1%}' if theirs else '–',
                f'{ours["objective"]:.6g}',
                f'{theirs["objective"]:.6g}' if theirs and theirs['objective'] is not None else '–',
            ]
        )
    text += record.table(header, cells)
    text += '\n"times faster" is of CPU seconds.\n\nTime grows, this package, as a power of\n\n'
    powers = [[method, *(_power(results, method, axis) for axis in AXES)] for method in settings['methods']]
    text += record.table(['method', *AXES.values()], powers)
    text += '\n![How the time of a selection grows](' + results['figure'] + ')\n' if results['figure'] else ''
    text += '\nThis package, other numbers of classes and budgets:\n\n'
    growth = [
        [row['method'], f'{row["samples"]:,}', row['classes'], f'{row["fraction"]:.0%}', _seconds(row), f'{row["peak_bytes"] / MIB:.1f}']
        for row in results['growth']
    ]
    return text + record.table(['method', 'N', 'classes', 'budget', 'torch, s', 'torch, MiB'], growth)


AXES = {'samples': 'N', 'classes': 'classes', 'fraction': 'budget'}


def _seconds(found: dict[str, Any]) -> str:
    return f'{found["seconds"]:.3g} ({found["cpu_seconds"]:.3g})'


def series(results: dict[str, Any], method: str, axis: str, backend: str = 'torch') -> list[dict[str, Any]]:
    """A method's cases along one axis, the others as in the first of ``settings``, in rising order."""
    settings = results['settings']
    fixed = {'samples': settings['growth_samples'], 'classes': settings['classes'][0], 'fraction': settings['fraction']}
    del fixed[axis]
    found = [row[backend] for row in results['rows'] if row[backend]] + (results['growth'] if backend == 'torch' else [])
    found = [row for row in found if row['method'] == method and all(row[name] == value for name, value in fixed.items())]
    return sorted(found, key=lambda row: row[axis])


def _power(results: dict[str, Any], method: str, axis: str) -> str:
    power = record.power([(row[axis], row['cpu_seconds']) for row in series(results, method, axis)])
    return '–' if power is None else f'{power:.2f}'


def draw(results: dict[str, Any], target: Path) -> None:
    """Draws how the time grows with N, the classes and the budget."""
    from matplotlib.figure import Figure

    settings = results['settings']
    figure = Figure(figsize=(12, 4), layout='constrained')
    panels = figure.subplots(1, 3, sharey=True)
    fixed = {
        'samples': f'{settings["classes"][0]} classes, {settings["fraction"]:.0%}',
        'classes': f'N = {settings["growth_samples"]:,}, {settings["fraction"]:.0%}',
        'fraction': f'N = {settings["growth_samples"]:,}, {settings["classes"][0]} classes',
    }
    for panel, (axis, name) in zip(panels, AXES.items(), strict=True):
        for number, method in enumerate(settings['methods']):
            for backend, style in (('torch', '-o'), ('cords', ':x')):
                rows = series(results, method, axis, backend)
                label = f'{method}, {backend}' if axis == 'samples' and rows else None
                scale = 100 if axis == 'fraction' else 1
                panel.plot([scale * row[axis] for row in rows], [row['seconds'] for row in rows], style, color=f'C{number}', label=label)
                for row in rows:
                    if row['stopped']:
                        panel.annotate('stopped', (row[axis], row['seconds']), color=f'C{number}', fontsize=7, ha='center', va='bottom')
        panel.set(xscale='log', yscale='log', xlabel=f'{name}, %' if axis == 'fraction' else name, title=fixed[axis])
        panel.xaxis.set_minor_formatter('')  # labels between the powers of ten run into each other
        panel.grid(alpha=0.3)
    panels[0].set_ylabel('seconds')
    figure.legend(loc='outside right upper', fontsize=8)
    save_figure(figure, target)


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Measures what the command line says and writes ``selection_<device>.{json,md,svg}``."""
    parser = argparse.ArgumentParser(description='One selection: this package against CORDS.')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder for the results')
    parser.add_argument('--device', choices=['cpu', 'gpu'], default='cpu', help='gpu: this package alone')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    parser.add_argument('--samples', type=int, nargs='+', help='N; 5,000 to 50,000, on a GPU to 1,000,000')
    parser.add_argument('--classes', type=int, nargs='+', default=[10, 100])
    parser.add_argument('--fraction', type=float, default=0.1, help='the budget, as a share of N')
    parser.add_argument('--features', type=int, default=512)
    parser.add_argument('--growth-samples', type=int, help='N at which classes and budget are varied')
    parser.add_argument('--growth-classes', type=int, nargs='*', default=[5, 10, 30, 100])
    parser.add_argument('--growth-fractions', type=float, nargs='*', default=[0.01, 0.03, 0.1, 0.3])
    parser.add_argument('--no-cords', dest='cords', action='store_false', help='this package alone')
    parser.add_argument('--limit', type=float, default=600, help='seconds after which a case of CORDS is stopped')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--one', help=argparse.SUPPRESS)  # a case, as JSON, to measure in this process
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(Case(**json.loads(args.one)), args.limit)), flush=True)
        return None
    on_gpu = args.device == 'gpu'
    args.samples = args.samples or ([50_000, 200_000, 1_000_000] if on_gpu else [5_000, 10_000, 20_000, 50_000])
    args.growth_samples = args.growth_samples or (200_000 if on_gpu else 20_000)
    args.cords &= not on_gpu
    compared, growth = plan_cases(args)
    rows = compare(compared, args)
    names = ('methods', 'samples', 'classes', 'fraction', 'features', 'growth_samples', 'cords', 'limit', 'threads')
    results = {
        'settings': {name: getattr(args, name) for name in names},
        'rows': rows,
        'growth': [run(case, 10 * args.limit, args.threads) for case in growth],
        'figure': f'selection_{args.device}.svg',
    }
    args.out.mkdir(parents=True, exist_ok=True)
    draw(results, args.out / results['figure'])
    return record.write(args.out, f'selection_{args.device}', results, markdown(results), title='The cost of one selection')


if __name__ == '__main__':
    main()
