"""Damaged result files, searches beside broken files, and odd command lines: one line or a success, and nothing hangs."""

import io
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from composer_effalgos import cli
from composer_effalgos.report import load_sweep, read_runs, rich_table, run_search, runner, table_rows, write_report
from composer_effalgos.report.results import write_results
from composer_effalgos.utils.errors import InputError
from tests.fuzz.mutate import damage_tree, limit
from tests.fuzz.refused import SECONDS, SMALL, one_line_or_none


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize('number', range(8))
def test_damaged_results(number, write_run):
    """Tables, charts, page and files of results; a summary that cannot be used is named and left out."""
    draw = random.Random(number)
    good = json.loads((write_run('baseline_seed17') / 'summary.json').read_text())
    histograms = {'edges': [1e-3, 1.0, 100.0], 'epochs': [{'epoch': 0, 'mean': 1.0, 'counts': [1, 2]}]}
    folder = Path('runs')
    for case in range(12):
        shutil.rmtree(folder, ignore_errors=True)
        for name in ('a', 'b'):
            (folder / name).mkdir(parents=True)
            damaged = damage_tree(draw, good | {'score_histograms': histograms})
            (folder / name / 'summary.json').write_text(json.dumps(damaged, default=str))
        (folder / 'results.json').write_text(json.dumps(damage_tree(draw, {'targets': [0.5, 0.9]})))

        def read() -> None:
            rows = table_rows(read_runs(folder)[0], [0.5])
            Console(file=io.StringIO()).print(rich_table(rows))
            write_results(rows, folder)
            write_report(folder)

        one_line_or_none(read, (number, case))


def test_names_that_are_no_text_or_markup(write_run):
    name = '\ud800<script>alert(1)</script>[bold]|`x`'
    folder = write_run(name).parent
    write_report(folder)
    page, table = ((folder / f'report.{end}').read_text(encoding='utf-8') for end in ('html', 'md'))
    assert '<script>alert(1)' not in page
    assert '<script>' not in table


@pytest.mark.parametrize('content', [None, '', '{', '[]', '{"epochs": [3]}', 'folder'])
@pytest.mark.parametrize('file', ['summary.json', 'target', 'recipe.yaml'])
def test_a_search_beside_what_is_broken(file, content, tmp_path, monkeypatch):
    pytest.importorskip('optuna')
    monkeypatch.setattr(runner, '_command', lambda recipe, ranks: [sys.executable, '-c', 'raise SystemExit("error: not now")'])
    Path('tiny.yaml').write_text(yaml.safe_dump(SMALL | {'max_duration': '1ep'}))
    Path('space.yaml').write_text('{recipe: tiny.yaml, targets: [0.5], search: {rate: {usual: {}, fast: {optimizer: {lr: 0.2}}}}}')
    folder = Path('out/baseline_seed17')
    folder.mkdir(parents=True)
    (folder / 'finished').touch()
    path = Path('out/target') if file == 'target' else folder / file
    if content == 'folder':
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    one_line_or_none(lambda: run_search('space.yaml', 'out', trials=2, console=Console(file=io.StringIO())), (file, content))


@pytest.mark.parametrize('key', ['matrix', 'search'])
def test_millions_of_runs_are_counted_not_made(key):
    Path('tiny.yaml').write_text(yaml.safe_dump(SMALL))
    axes = {f'a{axis}': {f'c{axis}_{choice}': {'seed': choice} for choice in range(10)} for axis in range(7)}
    Path('huge.yaml').write_text(yaml.safe_dump({'recipe': 'tiny.yaml', 'targets': [0.5], key: axes}))
    with limit(SECONDS), pytest.raises(InputError, match=f'huge.yaml: {key}: expected at most 10000 runs, got 10000000'):
        load_sweep('huge.yaml')


WORDS = ['bench', 'search', 'report', 'recipes', 'select', 'interpolate', 'check-data', 'convert', 'demo', '--traceback', '--help']
OPTIONS = ['--out', '--minutes', '--jobs', '--ranks', '--seed', '--only', '--target', '--trials', '--points', '--to', '--recipe', '--fresh']
VALUES = [
    'nan',
    'inf',
    '-1',
    '0',
    '1e400',
    '',
    '..',
    'nowhere',
    'tiny.yaml',
    '/dev/null',
    '/dev/zero',
    'a=1',
    '\udc80',
    '[x',
    'x' * 5000,
    '10000000000000',
]


@pytest.mark.parametrize('number', range(6))
def test_odd_command_lines(number, monkeypatch, capsys):
    draw = random.Random(number)
    Path('tiny.yaml').write_text(yaml.safe_dump(SMALL))
    monkeypatch.setattr(
        'composer_effalgos.cli.run_sweep', lambda *args, **options: runner.deadline_in(options.get('minutes')) or runner.Outcome([], [])
    )
    for _ in range(20):
        words = [draw.choice(WORDS[:-3]), *(draw.choice(OPTIONS + VALUES) for _ in range(draw.randrange(5)))]
        monkeypatch.setattr(sys, 'argv', ['effalgos', *words])

        statuses: list[Any] = []

        def case(statuses=statuses) -> None:
            try:
                statuses.append(cli.main())
            except SystemExit as stop:
                statuses.append(stop.code)

        one_line_or_none(case, words)
        assert statuses[0] in (0, 1, 2, 3), words
        capsys.readouterr()
