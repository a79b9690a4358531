"""Results of runs as ``results.csv`` and ``results.json``, for other tools."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from composer_effalgos.report.runs import Run, first_above
from composer_effalgos.report.table import Row
from composer_effalgos.utils.files import read_text, write_texts
from composer_effalgos.utils.tables import csv_text

CSV, JSON = 'results.csv', 'results.json'
_TOTALS = ('eval_accuracy', 'train_seconds', 'samples_seen', 'samples_full', 'saved_fraction', 'selection_seconds', 'peak_memory_bytes')
_LATER = ('eval_loss', 'tokens_seen', 'tokens_full')  # summaries of older versions lack some of these


def write_results(rows: Sequence[Row], out: Path, *, targets: Sequence[float] = (), about: dict[str, Any] | None = None) -> None:
    """Writes ``results.csv``, one line per run, and ``results.json``, with the means of each method, the runs and their epochs.

    ``targets`` are accuracies for which to give the first epoch above and the seconds until then; ``about`` goes to the top of
    ``results.json``.
    """
    runs = [(row.method, run, _of_run(run, targets)) for row in rows for run in row.runs]
    table = csv_text([{'method': method, **values} for method, _, values in runs])
    methods = [
        {item.name: getattr(row, item.name) for item in fields(row) if item.name not in ('runs', 'reached', 'parity')}
        | {'seeds': [run.summary['seed'] for run in row.runs]}
        | {'reached': [vars(reached) for reached in row.reached], 'parity': row.parity and vars(row.parity)}
        for row in rows
    ]
    content = {
        'date': datetime.date.today().isoformat(),
        **(about or {}),
        'targets': list(targets),
        'methods': methods,
        'runs': [
            {'method': method, **values} | {key: run.summary[key] for key in ('versions', 'recipe', 'epochs')}
            for method, run, values in runs
        ],
    }
    write_texts({out / CSV: table, out / JSON: json.dumps(content, indent=2) + '\n'}, 'the results')


def _of_run(run: Run, targets: Sequence[float]) -> dict[str, Any]:
    summary = run.summary
    found = {key: summary[key] for key in ('run_name', 'seed', 'device', 'world_size')}
    found |= {'epochs_trained': len(summary['epochs'])} | {key: summary['totals'][key] for key in _TOTALS}
    found |= {key: summary['totals'].get(key) for key in _LATER}
    for target in targets:
        epoch, seconds = first_above(run, target) or (None, None)
        found |= {f'epoch_above_{target:g}': epoch, f'seconds_to_{target:g}': seconds}
    return found


def read_targets(folder: Path) -> list[float]:
    """Reads the targets, accuracies in [0, 1], from a folder's ``results.json``; empty without a valid file."""
    try:
        targets = json.loads(read_text(folder / JSON))['targets']
        return [float(target) for target in targets]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
