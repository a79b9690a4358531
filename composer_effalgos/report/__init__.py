"""Sweeps of training runs, their results and reports."""

from composer_effalgos.report.bench import run_sweep, show_frontier
from composer_effalgos.report.frontier import Frontier, frontier
from composer_effalgos.report.page import write_report
from composer_effalgos.report.runner import Outcome, run_jobs
from composer_effalgos.report.runs import Run, read_runs, read_summary
from composer_effalgos.report.search import run_search
from composer_effalgos.report.sweep import Job, Sweep, load_sweep
from composer_effalgos.report.table import Row, markdown_table, note, rich_table, table_rows

__all__ = [
    'Frontier',
    'Job',
    'Outcome',
    'Row',
    'Run',
    'Sweep',
    'frontier',
    'load_sweep',
    'markdown_table',
    'note',
    'read_runs',
    'read_summary',
    'rich_table',
    'run_jobs',
    'run_search',
    'run_sweep',
    'show_frontier',
    'table_rows',
    'write_report',
]
