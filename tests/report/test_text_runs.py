"""Runs on tokens in the report: held-out loss, perplexity, tokens."""

import json
import math
from pathlib import Path

import pytest

from composer_effalgos.report.charts import charts
from composer_effalgos.report.results import write_results
from composer_effalgos.report.runs import read_runs
from composer_effalgos.report.table import columns, note, table_rows


@pytest.fixture
def write_text_run(write_run):
    """Writes the summary of a run on tokens: those of each epoch, and the held-out loss at its end."""

    def write(run_name: str, seed: int, tokens: int, losses: tuple[float | None, ...], **options) -> Path:
        folder = write_run(run_name, seed, (None,) * len(losses), **options)
        summary = json.loads((folder / 'summary.json').read_text())
        for entry, loss in zip(summary['epochs'], losses, strict=True):
            entry |= {'tokens': tokens, 'eval_loss': loss}
        summary['totals'] |= {'tokens_seen': tokens * len(losses), 'tokens_full': 1000 * len(losses), 'eval_loss': losses[-1]}
        (folder / 'summary.json').write_text(json.dumps(summary))
        return folder

    return write


def test_the_table_has_loss_perplexity_and_tokens_for_text(tmp_path, write_text_run):
    for seed, loss in ((17, 1.5), (18, 1.7)):
        write_text_run(f'baseline_seed{seed}', seed, 1000, (2.0, loss))
        write_text_run(f'infobatch_seed{seed}', seed, 700, (2.0, loss + 0.25), samples=60, seconds=1.0)
    rows = table_rows(read_runs(tmp_path / 'runs')[0])
    titles = [column.title for column in columns(rows)]
    assert titles[:5] == ['run', 'seeds', 'held-out loss', 'Δ loss', 'perplexity'], 'no accuracy was measured'
    cells = [{column.title: column.text(row) for column in columns(rows)} for row in rows]
    assert [row['held-out loss'] for row in cells] == ['1.600 ± 0.141', '1.850 ± 0.141']
    assert [row['Δ loss'] for row in cells] == ['–', '+0.250']
    assert [row['perplexity'] for row in cells] == [f'{math.exp(1.6):.2f}', f'{math.exp(1.85):.2f}']
    assert [row['tokens'] for row in cells] == ['2,000', '1,400']
    assert [row['saved tokens %'] for row in cells] == ['0.0', '30.0'], 'samples saved are another number'
    assert [row['saved %'] for row in cells] == ['0.0', '40.0']
    assert [row['tokens/s'] for row in cells] == ['500', '700']
    assert all(f'{title}: ' in note(rows) for title in titles[2:])


def test_images_and_older_summaries_have_no_such_columns(tmp_path, write_run, write_text_run):
    write_run('digits')
    rows = table_rows(read_runs(tmp_path / 'runs')[0])
    assert not [column.title for column in columns(rows) if 'token' in column.title or 'loss' in column.title]
    write_text_run('text', 17, 500, (2.0, None))
    rows = table_rows(read_runs(tmp_path / 'runs')[0])
    titles = [column.title for column in columns(rows)]
    assert 'accuracy %' in titles, 'the images have one'
    cells = [{column.title: column.text(row) for column in columns(rows)} for row in rows]
    assert [row['tokens'] for row in cells] == ['–', '1,000']
    write_results(rows, tmp_path / 'runs')
    content = json.loads((tmp_path / 'runs' / 'results.json').read_text())
    assert [run['tokens_seen'] for run in content['runs']] == [None, 1000]


@pytest.mark.parametrize(('part', 'key'), [('totals', 'tokens_seen'), ('totals', 'eval_loss'), ('epochs', 'tokens')])
def test_a_summary_with_something_else_there_is_left_out(tmp_path, write_run, write_text_run, part, key):
    write_run('good')
    folder = write_text_run('text', 17, 500, (2.0, 1.0))
    summary = json.loads((folder / 'summary.json').read_text())
    (summary['totals'] if part == 'totals' else summary['epochs'][1])[key] = 'many'
    (folder / 'summary.json').write_text(json.dumps(summary))
    (_,), (problem,) = read_runs(tmp_path / 'runs')
    assert problem.endswith(f"'{part}': '{key}' must be a number or null")


def test_charts_of_the_held_out_loss_over_seconds_and_tokens(tmp_path, write_run, write_text_run):
    write_run('digits')
    assert not [chart for chart in charts(table_rows(read_runs(tmp_path / 'runs')[0])) if 'loss' in chart['title']]
    write_text_run('text', 17, 500, (2.0, 1.0))
    found = {chart['title']: chart['traces'] for chart in charts(table_rows(read_runs(tmp_path / 'runs')[0]))}
    digits, text = found['Held-out loss by tokens seen']
    assert (text['x'], text['y']) == ([500, 1000], [2.0, 1.0])
    assert set(digits['y']) == {None}
    assert found['Held-out loss by training time'][1]['x'] == [2.0, 4.0]
