import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from composer_effalgos.bench.report import charts, write_report
from composer_effalgos.bench.table import markdown_table, read_runs, table_rows
from composer_effalgos.errors import InputError

NASTY = '<script>alert(1)</script>"\'&|`%{x}'


class Page(HTMLParser):
    """The tags of a page, the cells of its table and the text of its script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.scripts: list[str] = []
        self._in: str = ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag
        if tag in ('td', 'th'):
            self.cells.append('')
        if tag == 'script':
            self.scripts.append('')

    def handle_data(self, data):
        if self._in in ('td', 'th'):
            self.cells[-1] += data
        if self._in == 'script':
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self._in = ''


@pytest.fixture
def runs(tmp_path, write_run) -> Path:
    for seed in (17, 18):
        write_run(f'digits_baseline_seed{seed}', seed, (0.5, 0.8, 0.9 + seed / 1000))
        write_run(f'{NASTY}_seed{seed}', seed, (0.4, None, 0.8), samples=50, seconds=1.5)
    return tmp_path / 'runs'


def test_the_page_is_self_contained_and_shows_the_table(runs):
    out = write_report(runs)
    assert out == runs / 'report.html'
    text = out.read_text()
    page = Page(text)
    assert not [attrs for _, attrs in page.tags if any(key in attrs for key in ('src', 'href', 'srcset'))]
    assert not re.search(r'@import|url\(', text.split('</style>')[0])
    assert len(page.scripts) == 2, 'plotly once, and the page’s own'
    assert 'prefers-color-scheme: dark' in text
    assert ('meta', {'name': 'viewport', 'content': 'width=device-width, initial-scale=1'}) in page.tags
    rows = table_rows(read_runs(runs)[0])
    shown = [cell for cell in page.cells if cell]
    assert shown == [cell for row in rows for cell in row.cells]
    assert sum(tag == 'button' for tag, _ in page.tags) == len(rows[0].cells)
    assert {path.name for path in runs.iterdir() if path.is_file()} == {'report.html', 'report.md'}


def test_names_are_escaped_wherever_they_stand(runs):
    text = write_report(runs).read_text()
    assert NASTY not in text
    assert '<script>alert' not in text
    traces = [trace for chart in charts(table_rows(read_runs(runs)[0])) for trace in chart['traces']]
    assert not any('<' in trace['name'] for trace in traces)


def test_charts_hold_the_runs_numbers(runs):
    rows = table_rows(read_runs(runs)[0])
    drawn = {chart['title']: chart['traces'] for chart in charts(rows)}
    assert list(drawn) == [
        'Accuracy by epoch',
        'Accuracy by samples seen',
        'Accuracy by training time',
        'Samples by epoch',
        'Batch size',
        'Learning rate',
    ]
    assert all(len(traces) == 4 for traces in drawn.values())
    method = drawn['Accuracy by samples seen'][2]
    assert (method['x'], method['y']) == ([50, 100, 150], [40, None, 80])
    assert drawn['Accuracy by epoch'][0]['x'] == [1, 2, 3]
    assert drawn['Accuracy by training time'][3]['x'] == [1.5, 3.0, 4.5]
    assert drawn['Samples by epoch'][3]['y'] == [50, 50, 50]
    assert drawn['Batch size'][0]['y'] == [10, 20, 40]
    assert drawn['Learning rate'][0]['y'] == pytest.approx([0.1, 0.2 / 3, 0.1 / 3])
    assert [trace['showlegend'] for trace in drawn['Batch size']] == [True, False, True, False]
    assert len({trace['line']['color'] for trace in drawn['Batch size']}) == 2


def test_charts_without_a_value_are_left_out(tmp_path, write_run):
    write_run('a', accuracies=(None, None))
    assert [chart['title'] for chart in charts(table_rows(read_runs(tmp_path / 'runs')[0]))] == [
        'Samples by epoch',
        'Batch size',
        'Learning rate',
    ]
    write_report(tmp_path / 'runs')


def test_twenty_methods_are_told_apart(tmp_path, write_run):
    for number in range(20):
        write_run(f'method{chr(97 + number)}')
    traces = charts(table_rows(read_runs(tmp_path / 'runs')[0]))[0]['traces']
    assert len({(trace['line']['color'], trace['line']['dash']) for trace in traces}) == 20


def test_markdown_lies_beside_the_page(runs, tmp_path):
    out = write_report(runs, tmp_path / 'deep' / 'page.html')
    assert out == tmp_path / 'deep' / 'page.html'
    assert (tmp_path / 'deep' / 'page.md').read_text().startswith(markdown_table(table_rows(read_runs(runs)[0])))


def test_a_broken_summary_is_named_in_the_report_and_in_a_warning(runs, write_run, caplog):
    write_run('broken').joinpath('summary.json').write_text('{')
    out = write_report(runs)
    (record,) = caplog.records
    assert '04/summary.json: left out' in record.getMessage()
    assert '04/summary.json: left out' in out.read_text()
    assert '04/summary.json: left out' in out.with_suffix('.md').read_text()


def test_mixed_machines_are_pointed_out(tmp_path, write_run):
    warning = 'do not compare their times'
    write_run('a')
    assert warning not in write_report(tmp_path / 'runs').read_text()
    write_run('b', device='another')
    assert warning in write_report(tmp_path / 'runs').read_text()


def test_bad_places_are_refused_and_nothing_is_written(runs, tmp_path):
    with pytest.raises(InputError, match=r'page\.txt.*\.html'):
        write_report(runs, tmp_path / 'page.txt')
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot be written'):
        write_report(runs, tmp_path / 'file' / 'page.html')
    with pytest.raises(InputError, match='no such folder'):
        write_report(tmp_path / 'nowhere', tmp_path / 'new' / 'page.html')
    assert not (tmp_path / 'new').exists()


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
def test_a_browser_draws_every_chart_and_sorts_the_table(runs, tmp_path):
    out = write_report(runs)
    text = out.read_text()
    # Sort by the last column, downwards, then say in the page what is there.
    probe = """<script>addEventListener('load', () => setTimeout(() => {
        const heads = document.querySelectorAll('thead th'), last = heads[heads.length - 2];
        last.querySelector('button').click(); last.querySelector('button').click();
        document.body.dataset.probe = JSON.stringify({
          lines: [...document.querySelectorAll('.charts section')].map(s => s.querySelectorAll('.scatterlayer .trace').length),
          first: document.querySelector('tbody th').textContent, sort: last.getAttribute('aria-sort'),
          hidden: (document.querySelector('.legend button').click(),
            [...document.querySelectorAll('.charts section')].map(s => s.querySelectorAll('.scatterlayer .trace').length)),
          overflow: document.documentElement.scrollWidth - innerWidth, legend: document.querySelectorAll('.legend li').length,
        }); }, 500));</script></body>"""
    (tmp_path / 'probe.html').write_text(text.replace('</body>', probe))
    command = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--window-size=500,900', '--virtual-time-budget=5000', '--dump-dom']
    done = subprocess.run([*command, (tmp_path / 'probe.html').as_uri()], capture_output=True, text=True, timeout=120, check=True)
    body = next(attrs for tag, attrs in Page(done.stdout).tags if tag == 'body')
    found = json.loads(body['data-probe'] or '')
    assert found['lines'] == [4] * 6
    assert found['hidden'] == [2] * 6
    assert found['first'] == 'digits_baseline'
    assert found['sort'] == 'descending'
    assert found['overflow'] <= 0
    assert found['legend'] == 2
