"""How a benchmark leaves its numbers: a JSON file and a Markdown file with the machine, the versions, the date and the command."""

from __future__ import annotations

import ctypes
import datetime
import functools
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.machine import versions
from composer_effalgos.utils.tables import markdown_table

_M_ARENA_MAX, _M_MMAP_MAX, _M_TRIM_THRESHOLD = -8, -4, -1  # of malloc.h

PACKAGES = ('composer-effalgos', 'mosaicml', 'torch', 'torchvision', 'timm', 'numpy')


def environment() -> dict[str, Any]:
    """The machine, the versions, the date and the command."""
    hardware = {
        'cpu': _cpu_name(),
        'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        'threads': torch.get_num_threads(),
        'load_average': round(os.getloadavg()[0], 2),
        'gpu': torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    script = Path(sys.argv[0])
    command = shlex.join(['python', f'{script.parent.name}/{script.name}', *sys.argv[1:]])
    return {'date': datetime.date.today().isoformat(), 'command': command, 'hardware': hardware, 'versions': versions(PACKAGES)}


def without_paths(summary: dict[str, Any]) -> dict[str, Any]:
    """A run's summary, its recipe without the paths of this machine."""
    kept = {key: summary[key] for key in ('run_name', 'seed', 'device', 'world_size', 'versions', 'epochs', 'totals')}
    return kept | {'recipe': _without_paths(summary['recipe'])}


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _without_paths(item) for key, item in value.items() if key not in ('path', 'save_folder')}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def write(out: Path, name: str, results: dict[str, Any], markdown: str, *, title: str) -> Path:
    """Writes ``name.json`` and ``name.md``, a file with a title before the tables in ``markdown``; prints the latter and gives its path."""
    out.mkdir(parents=True, exist_ok=True)
    about = environment()
    (out / f'{name}.json').write_text(json.dumps(about | results, indent=2, allow_nan=False) + '\n', encoding='utf-8')
    hardware = about['hardware']
    machine = hardware['gpu'] or f'{hardware["cpu"]}, {hardware["cores"]} cores, {hardware["threads"]} threads'
    versions = ', '.join(f'{package} {version}' for package, version in about['versions'].items())
    machine += f', load {hardware["load_average"]} at the end'
    head = f'# {title}\n\n{about["date"]}; {machine}; {versions}\n\n```bash\n{about["command"]}\n```\n'
    target = out / f'{name}.md'
    text = f'{head}\n{markdown.strip()}\n'
    target.write_text(text, encoding='utf-8')
    print(text)
    return target


def bad_input_is_one_line(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Lets a script say what is wrong with its input in one line and end with status 2."""

    @functools.wraps(main)
    def checked(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except InputError as error:
            print(f'error: {error}', file=sys.stderr)
            return 2

    return checked


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table with all columns aligned to the left."""
    return markdown_table(header, rows, left=range(len(header)))


def steady() -> None:
    """Rules out two things that slow one of two sides by chance.

    glibc gives no memory back, and all threads share one heap: otherwise a step takes up to a thousand page faults, or none, by where its
    tensors happen to lie, up to a tenth of a training step's time and half of a permutation's. Subnormal numbers are off, on which the CPU
    is slow: the better a network has learnt, the more of them its gradients hold.
    """
    torch.set_flush_denormal(True)
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is not None:
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
            mallopt(option, value)


def power(points: Sequence[tuple[float, float]]) -> float | None:
    """The p of ``y = a x^p``, by least squares on the logarithms; ``None`` for fewer than two different x."""
    if len({x for x, _ in points}) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def _cpu_name() -> str:
    info = Path('/proc/cpuinfo')
    found = re.search(r'^model name\s*:\s*(.+)$', info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
