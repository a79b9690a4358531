"""What bfloat16, channels-last memory and the compiler gain on a CPU: CPU time of a training step, one process a configuration.

Each configuration trains the same network on the same batch in a process of its own, with one thread. The configurations take turns, a few
steps each, so that whatever else the machine does falls on all of them alike. Compiling is reported apart.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from torch.nn.functional import cross_entropy

from composer_effalgos.models import build_model
from composer_effalgos.models.autocast import has_bf16
from composer_effalgos.utils.tables import markdown_table

CLASSES = 10
# (name, autocast, channels-last memory, torch.compile)
CONFIGURATIONS = [
    ('fp32', False, False, False),
    ('fp32, channels last', False, True, False),
    ('fp32, channels last, compiled', False, True, True),
    ('bf16, channels last', True, True, False),
    ('bf16, channels last, compiled', True, True, True),
]


def worker(pipe: Connection, network: str, pixels: int, batch_size: int, autocast: bool, channels_last: bool, compiled: bool) -> None:
    """Trains the number of steps it is sent and answers with the CPU seconds of each; the first answer is the time to the first step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = build_model(network, CLASSES).to(memory_format=layout)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch_size, 3, pixels, pixels).to(memory_format=layout)
    labels = torch.randint(CLASSES, (batch_size,))

    def step() -> float:
        start = time.process_time()
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
            outputs = forward(images)
        optimizer.zero_grad()
        cross_entropy(outputs.float(), labels).backward()
        optimizer.step()
        return time.process_time() - start

    start = time.perf_counter()
    step()
    pipe.send(time.perf_counter() - start)
    while steps := pipe.recv():
        pipe.send([step() for _ in range(steps)])


def measure(network: str, pixels: int, batch_size: int, turns: int, steps: int) -> list[dict[str, Any]]:
    """CPU milliseconds of a step for each configuration, the median over all turns."""
    context = multiprocessing.get_context('spawn')
    running = []
    for name, *options in CONFIGURATIONS:
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(theirs, network, pixels, batch_size, *options), daemon=True)
        process.start()
        running.append((name, ours, process, ours.recv()))  # one after the other: compilers share the machine badly
    seconds: dict[str, list[float]] = {name: [] for name, *_ in running}
    for _ in range(turns):
        for name, pipe, *_ in running:
            pipe.send(steps)
            seconds[name] += pipe.recv()
    for _, pipe, process, _ in running:
        pipe.send(0)
        process.join()
    reference = median(seconds[CONFIGURATIONS[0][0]])
    return [
        {
            'configuration': name,
            'cpu_ms': 1e3 * median(seconds[name]),
            'times_faster': reference / median(seconds[name]),
            'first_step_s': first,
        }
        for name, _, _, first in running
    ]


def table(cases: Sequence[dict[str, Any]]) -> str:
    header = ['network', 'pixels', 'configuration', 'CPU ms a step', 'times faster', 'first step, s']
    rows = [
        [
            case['network'],
            case['pixels'],
            row['configuration'],
            f'{row["cpu_ms"]:.0f}',
            f'{row["times_faster"]:.2f}',
            f'{row["first_step_s"]:.1f}',
        ]
        for case in cases
        for row in case['rows']
    ]
    return markdown_table(header, rows, left=(0, 2))


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--cases', nargs='+', default=['resnet20_cifar:16', 'resnet20_cifar:32', 'resnet18_cifar:32'], help='NETWORK:PIXELS'
    )
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--turns', type=int, default=5)
    parser.add_argument('--steps', type=int, default=3, help='steps a turn')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'))
    args = parser.parse_args(argv)
    os.environ['OMP_NUM_THREADS'] = '1'
    cases = []
    for case in args.cases:
        network, pixels = case.split(':')
        rows = measure(network, int(pixels), args.batch_size, args.turns, args.steps)
        cases.append({'network': network, 'pixels': int(pixels), 'batch_size': args.batch_size, 'rows': rows})
        print(table(cases[-1:]), flush=True)
    results = {'cases': cases, 'bf16_in_hardware': has_bf16(), 'amx': torch.cpu._is_amx_tile_supported()}
    note = f'\nBatch {args.batch_size}, one thread. bfloat16 in hardware: {results["bf16_in_hardware"]}; AMX: {results["amx"]}.'
    return record.write(args.out, 'cpu_precision', results, table(cases) + note, title='Precision, memory format and compiler on a CPU')


if __name__ == '__main__':
    main()
