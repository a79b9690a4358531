"""What benchmarks that train a few methods side by side have in common: their arguments, the training, the summaries."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer_effalgos.monitor import SUMMARY
from composer_effalgos.report.runner import Outcome, finished, run_jobs
from composer_effalgos.report.runs import read_summary
from composer_effalgos.report.sweep import Sweep

Runs = dict[str, list[dict[str, Any]]]
"""The summaries of the runs that are done, by method."""


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the arguments that say where runs and results go, for how long to train, and what to set on top; ``name`` is the folder's."""
    parser.add_argument('--minutes', type=float, help='stop after so many')
    parser.add_argument('--out', type=Path, default=Path('runs', name), help='folder of the runs')
    parser.add_argument('--results', type=Path, default=Path('benchmarks/results'), help='folder for the tables')
    parser.add_argument(
        '--set', dest='overrides', action='append', default=[], metavar='key=value', help='a setting on top of every recipe'
    )


def train(make_sweep: Callable[[argparse.Namespace], Sweep], args: argparse.Namespace) -> tuple[Outcome, Runs]:
    """Trains what is left of a sweep, made of the script's arguments; says what failed.

    Returns what failed and what is left, and the runs that are done.
    """
    sweep = make_sweep(args)
    jobs = sweep.jobs(args.out, args.overrides)
    outcome = run_jobs(jobs, args.out, minutes=args.minutes)
    runs: Runs = {method: [] for method in sweep.all_methods()}
    for job in jobs:
        if finished(job):
            runs[job.method].append(read_summary(job.recipe.run_folder / SUMMARY))
    for failure in outcome.failures:
        print(f'error: {failure}', file=sys.stderr)
    return outcome, runs
