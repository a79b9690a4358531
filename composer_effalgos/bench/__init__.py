"""Runs compared: the demo, the table and the report."""

from composer_effalgos.bench.demo import run_demo
from composer_effalgos.bench.report import write_report
from composer_effalgos.bench.table import Row, Run, markdown_table, read_runs, rich_table, table_rows

__all__ = ['Row', 'Run', 'markdown_table', 'read_runs', 'rich_table', 'run_demo', 'table_rows', 'write_report']
