"""Everything here that needs a GPU, most useful first, in portions: the tests, the overhead, the data paths, the frontier.

Run the same command again until it ends with status 0; status 3 means that steps are left (``make gpu DATA=data`` is the same)::

    python benchmarks/gpu.py --data data --minutes 9
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

UNFINISHED = 3  # the exit status of a command that stopped when its --minutes were over


@dataclass(frozen=True)
class Step:
    """A command of the list.

    Attributes:
        name: What it is called in the file of what is done.
        words: Its words after the interpreter.
        minutes: What it takes on an H100 or the like; it starts only where so many are left, or as the first of a portion. None for one
            that takes ``--minutes`` and goes on where it stopped.
    """

    name: str
    words: list[str]
    minutes: float | None


def steps(data: Path, out: Path, runs: Path) -> list[Step]:
    """What is run, in this order."""
    quoted = {'data': data, 'out': out, 'runs': runs / 'frontier_cifar10_gpu'}
    paths = {name: shlex.quote(str(path)) for name, path in quoted.items()}
    commands = [
        ('tests', 4, '-m pytest -q -m gpu tests/gpu tests/subset_selection tests/benchmarks'),
        ('overhead', 8, 'benchmarks/infobatch_overhead.py --device gpu --out {out}'),
        ('loaders', 9, 'benchmarks/loaders.py --device gpu --out {out} --cifar {data} --workers 8'),
        ('frontier runs', None, '-m composer_effalgos.cli bench yamls/sweeps/frontier_cifar10_gpu.yaml dataset.path={data} --out {runs}'),
        ('frontier', 1, 'benchmarks/frontier.py {runs} --name frontier_cifar10_gpu --out {out}'),
    ]
    return [Step(name, shlex.split(words.format(**paths)), minutes) for name, minutes, words in commands]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, default=Path('data'), help='folder of CIFAR-10')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder of the results')
    parser.add_argument('--runs', type=Path, default=Path('runs'), help='folder of the runs, and of the list of what is done')
    parser.add_argument('--minutes', type=float, help='stop after so many')
    args = parser.parse_args(argv)
    end = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    args.runs.mkdir(parents=True, exist_ok=True)
    marks = args.runs / 'gpu_steps.json'
    done: dict[str, int] = json.loads(marks.read_text(encoding='utf-8')) if marks.exists() else {}
    first = True
    for step in steps(args.data, args.out, args.runs):
        left = None if end is None else (end - time.monotonic()) / 60
        if step.name in done:
            continue
        if left is not None and not first and left < (step.minutes or 1):
            print(f'{step.name}: left for the next portion', flush=True)
            return UNFINISHED
        portion = [] if left is None or step.minutes is not None else ['--minutes', f'{max(left, 0.1):.2f}']
        command = [sys.executable, *step.words, *portion]
        print(f'{step.name}: {" ".join(command)}', flush=True)
        status = subprocess.run(command, check=False).returncode
        if status == UNFINISHED and step.minutes is None:
            return UNFINISHED
        done[step.name], first = status, False
        marks.write_text(json.dumps(done, indent=2) + '\n', encoding='utf-8')
    failed = [name for name, status in done.items() if status]
    print(f'failed: {", ".join(failed)}; take them out of {marks} to try again' if failed else 'all done')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
