import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from composer_effalgos.report.charts import charts, published
from composer_effalgos.report.page import write_report
from composer_effalgos.report.results import write_results
from composer_effalgos.report.runs import read_runs
from composer_effalgos.report.table import columns, markdown_table, table_rows
from composer_effalgos.utils.errors import InputError

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
        if tag == 'wbr':
            return
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
    assert shown == [column.text(row) for row in rows for column in columns(rows)]
    assert sum(tag == 'button' and 'class' not in attrs for tag, attrs in page.tags) == len(columns(rows))
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
        'Accuracy by training time',
        'Accuracy by samples seen',
        'Accuracy by epoch',
        'Samples left out',
        'Batch size',
        'Learning rate',
        'Selection time',
    ]
    assert all(len(traces) == 4 for traces in drawn.values())
    method = drawn['Accuracy by samples seen'][2]
    assert (method['x'], method['y']) == ([50, 100, 150], [40, None, 80])
    assert drawn['Accuracy by epoch'][0]['x'] == [1, 2, 3]
    assert drawn['Accuracy by training time'][3]['x'] == [1.5, 3.0, 4.5]
    assert drawn['Samples left out'][3]['y'] == [50, 50, 50]
    assert drawn['Selection time'][3]['y'] == [0.25, 0.25, 0.25]
    assert drawn['Batch size'][0]['y'] == [10, 20, 40]
    assert drawn['Learning rate'][0]['y'] == pytest.approx([0.1, 0.2 / 3, 0.1 / 3])
    assert [trace['showlegend'] for trace in drawn['Batch size']] == [True, False, True, False]
    assert len({trace['line']['color'] for trace in drawn['Batch size']}) == 2


def test_the_share_left_out_of_a_part_of_an_epoch_is_of_that_part(tmp_path, write_run):
    for name in ('new', 'old'):
        path = write_run(name, settings={'max_duration': '25ba'}) / 'summary.json'
        summary = json.loads(path.read_text())
        for entry, full in zip(summary['epochs'], (100, 100, 50), strict=True):
            entry |= {'samples': full} | ({'samples_full': full} if name == 'new' else {})
        summary['epochs'][1]['samples'] = 75
        summary['totals']['samples_full'] = 250
        path.write_text(json.dumps(summary))
    drawn = {chart['title']: chart['traces'] for chart in charts(table_rows(read_runs(tmp_path / 'runs')[0]))}
    assert [trace['y'] for trace in drawn['Samples left out']] == [[0, 25, 0], [-20, 10, 40]]


def test_charts_without_a_value_are_left_out(tmp_path, write_run):
    write_run('a', accuracies=(None, None))
    assert [chart['title'] for chart in charts(table_rows(read_runs(tmp_path / 'runs')[0]))] == [
        'Samples left out',
        'Batch size',
        'Learning rate',
        'Selection time',
    ]
    write_report(tmp_path / 'runs')


def test_scores_are_drawn_as_shares_of_the_samples(tmp_path, write_run):
    histograms = {
        'edges': [0.001, 0.01, 0.1, 1.0, 10.0],
        'epochs': [{'epoch': 0, 'mean': 2.0, 'counts': [0, 0, 30, 10]}, {'epoch': 1, 'mean': 0.1, 'counts': [0, 20, 20, 0]}],
    }
    write_run('infobatch', score_histograms=histograms)
    write_run('other')
    (chart,) = [chart for chart in charts(table_rows(read_runs(tmp_path / 'runs')[0])) if chart['title'].startswith('Scores')]
    assert chart['title'] == 'Scores: infobatch, seed 17'
    assert [trace['name'] for trace in chart['traces']] == ['after epoch 1', 'after epoch 2']
    assert [trace['y'][:-1] for trace in chart['traces']] == [[0, 0, 75, 25], [0, 50, 50, 0]]
    assert chart['traces'][0]['x'] == histograms['edges']
    assert chart['xaxis']['range'] == [-2, 1], 'empty ends are cut off'


@pytest.mark.parametrize(('limit', 'shown'), [(None, True), (5000, False)])
def test_published_runs_stand_beside_ours_on_the_same_data_and_model(tmp_path, write_run, limit, shown):
    dataset = {'name': 'cifar10', 'limit': limit}
    write_run('ours', accuracies=(0.5, 0.6, 0.7, 0.8), settings={'dataset': dataset, 'model': {'name': 'resnet18_cifar'}})
    write_run('another', dataset='cifar10')
    title = 'Beside published runs: resnet18_cifar on cifar10'
    drawn = {chart['title']: chart['traces'] for chart in charts(table_rows(read_runs(tmp_path / 'runs')[0]))}
    text = write_report(tmp_path / 'runs').read_text()
    assert (title in drawn, 'GLISTER + ChannelsLast' in text) == (shown, shown)
    if shown:
        assert [trace['name'] for trace in drawn[title]] == ['ours', 'published: InfoBatch', 'published: all samples']
        ours, infobatch, _ = drawn[title]
        assert (ours['x'], ours['y']) == ([25, 50, 75, 100], [50, 60, 70, 80])
        assert (len(infobatch['y']), infobatch['x'][-1], infobatch['y'][-1]) == (200, 100, 95.14)


def test_what_is_published_is_whole():
    for record in published():
        assert record['seconds'] > 0
        assert len(record['accuracy']) in (0, record['epochs'])
        assert all(0 <= value <= 100 for value in record['accuracy'])
        if record['accuracy']:
            assert record['final_accuracy'] == pytest.approx(record['accuracy'][-1], abs=0.006)
            above = [epoch for epoch, value in enumerate(record['accuracy'], start=1) if value > 70]
            assert record['first_above_70'] == (above[0] if above else None)


def test_of_many_methods_the_baseline_and_the_best_are_shown_first(tmp_path, write_run):
    write_run('baseline', accuracies=(0.5, 0.7))
    for number in range(20):
        write_run(f'method{number:02d}x', accuracies=(0.5, 0.5 + number / 100))
    traces = charts(table_rows(read_runs(tmp_path / 'runs')[0]))[0]['traces']
    # from 0.70 on they are as good as the baseline, but none of two epochs is faster
    assert [trace['name'] for trace in traces if trace['visible']] == ['baseline', *(f'method{number}x' for number in range(13, 20))]


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
    assert '04/summary.json: not the summary of a run' in record.getMessage()
    assert '04/summary.json: not the summary of a run' in out.read_text()
    assert '04/summary.json: not the summary of a run' in out.with_suffix('.md').read_text()


def test_unfinished_runs_are_listed_and_not_averaged(tmp_path, write_run):
    lengths = {'max_duration': '3ep'}
    write_run('infobatch_seed17', 17, (0.5, 0.8, 0.9), settings=lengths)
    cut = write_run('infobatch_seed18', 18, (0.1, 0.2), settings=lengths)
    write_run('marked_seed17', 17, (0.1, 0.3), settings=lengths).joinpath('finished').touch()
    write_run('in_batches_seed17', 17, (0.1, 0.4), settings={'max_duration': '90ba'})
    write_run('may_stop_seed17', 17, (0.1, 0.6), settings=lengths | {'callbacks': {'early_stopper': {'monitor': 'loss'}}})
    page = write_report(tmp_path / 'runs')
    text = page.with_suffix('.md').read_text()
    assert '| infobatch | 1 | 90.00 |' in text
    assert all(f'{name} | 1 | {value}.00 |' in text for name, value in (('marked', 30), ('in_batches', 40), ('may_stop', 60)))
    line = 'infobatch_seed18: not finished (2 epochs of max_duration 3ep)'
    assert f'Left out:\n\n- {line}\n' in text
    assert f'<p class="warning">{line}</p>' in page.read_text()
    assert '| infobatch | 1 | 20.00 |' in write_report(cut).with_suffix('.md').read_text(), 'a run given alone is shown'
    for path in (tmp_path / 'runs').iterdir():
        if path.is_dir() and path != cut:
            shutil.rmtree(path)
    write_run('other_seed17', settings={'max_duration': 8})
    with pytest.raises(InputError, match='expected a finished run, got 2 unfinished'):
        write_report(tmp_path / 'runs')


def test_mixed_machines_are_pointed_out(tmp_path, write_run):
    warning = 'do not compare their times'
    write_run('a')
    assert warning not in write_report(tmp_path / 'runs').read_text()
    write_run('b', device='another')
    assert warning in write_report(tmp_path / 'runs').read_text()


def test_a_single_run_and_targets(tmp_path, write_run):
    folder = write_run('alone', accuracies=(0.5, 0.8))
    out = write_report(folder, targets=[0.7])
    assert out == folder / 'report.html'
    assert '| epoch > 70 % | s to 70 % |' in out.with_suffix('.md').read_text().splitlines()[0]
    with pytest.raises(InputError, match=r'target: expected accuracies in \(0, 1\], got 70'):
        write_report(folder, targets=[70])


def test_targets_are_those_of_the_sweep_where_none_are_given(runs):
    rows = table_rows(read_runs(runs)[0], [0.85])
    write_results(rows, runs, targets=[0.85])
    assert 'epoch > 85 %' in write_report(runs).with_suffix('.md').read_text()
    assert 'epoch > 85 %' not in write_report(runs, targets=[0.5]).with_suffix('.md').read_text()


def test_bad_places_are_refused_and_nothing_is_written(runs, tmp_path):
    with pytest.raises(InputError, match=r'ends in \.html, got .*page\.txt'):
        write_report(runs, tmp_path / 'page.txt')
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='cannot be written'):
        write_report(runs, tmp_path / 'file' / 'page.html')
    with pytest.raises(InputError, match='no such folder'):
        write_report(tmp_path / 'nowhere', tmp_path / 'new' / 'page.html')
    assert not (tmp_path / 'new').exists()


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
def test_a_browser_draws_every_chart_sorts_the_table_and_saves_svg(runs, write_run, tmp_path):
    task = {'dataset': {'name': 'cifar10'}, 'model': {'name': 'resnet18_cifar'}}
    histograms = {'edges': [0.01, 0.1, 1.0], 'epochs': [{'epoch': 0, 'counts': [1, 3]}, {'epoch': 1, 'counts': [3, 1]}]}
    write_run('infobatch', settings=task, score_histograms=histograms)
    write_run('cifar_baseline', settings=task, seconds=3.0)
    text = write_report(runs).read_text()
    # Sort by the third column, downwards, hide the first method, then say in the page what is there.
    probe = """<script>addEventListener('load', () => setTimeout(async () => {
        const lines = () => [...document.querySelectorAll('.charts section')].map(s => s.querySelectorAll('.scatterlayer .trace').length);
        const head = document.querySelectorAll('#runs thead th')[2], found = {lines: lines()};
        head.querySelector('button').click(); head.querySelector('button').click();
        found.first = document.querySelector('#runs tbody th').textContent; found.sort = head.getAttribute('aria-sort');
        document.querySelector('#legend button').click();
        found.hidden = lines();
        found.overflow = document.documentElement.scrollWidth - innerWidth;
        found.legend = document.querySelectorAll('#legend li').length;
        let download;
        Plotly.downloadImage = (figure, options) => download = [figure, options];
        document.querySelector('[data-svg]').click();
        found.file = download[1].filename;
        found.svg = decodeURIComponent(await Plotly.toImage(...download)).slice(0, 60);
        document.body.dataset.probe = JSON.stringify(found);
      }, 500));</script></body>"""
    (tmp_path / 'probe.html').write_text(text.replace('</body>', probe))
    command = [CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--window-size=500,900', '--virtual-time-budget=8000']
    command += ['--enable-logging=stderr', '--dump-dom', (tmp_path / 'probe.html').as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert not [line for line in done.stderr.splitlines() if 'CONSOLE' in line]
    body = next(attrs for tag, attrs in Page(done.stdout).tags if tag == 'body')
    found = json.loads(body['data-probe'] or '')
    # seven charts of six runs, the scores' two epochs, and our two runs beside two published ones
    assert found['lines'] == [6] * 7 + [2, 4]
    assert found['hidden'] == [4] * 7 + [2, 4]
    assert found['first'] == 'digits_baseline'
    assert found['sort'] == 'descending'
    assert found['overflow'] <= 0
    assert found['legend'] == 4
    assert found['file'] == 'accuracy_by_training_time'
    assert found['svg'].startswith('data:image/svg+xml,<svg')
