import json
import re

import pytest

PAGES = ('README.md', 'docs/*.md', 'composer_effalgos/*/*.md', 'yamls/*.md', 'benchmarks/*.md')


RECORD = """# Equivalent-budget factors

| method | seeds | accuracy % | verdict by samples | factor by samples | factor by steps | samples | steps |
| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |
| baseline+10ep | 2 | 50.00 | baseline | – | – | 1,000 | 8 |
| craig+10ep | 2 | 50.00 ± 1.00 | train shorter instead | 0.50 (0.40 to 0.60) | 0.50 (0.40 to 0.60) | 700 | 8 |
| infobatch+10ep | 2 | 50.00 ± 1.00 | pays | > 1.43 (1.02 to > 1.43) | 0.90 (0.80 to 1.00) | 700 | 8 |

A note.
"""


@pytest.fixture
def documents(script):
    return script('documents')


def test_the_documents_have_the_figures_of_the_records(documents, capsys):
    assert documents.main(['--check']) == 0, capsys.readouterr().err


def test_every_factor_in_the_prose_is_one_of_a_record(documents):
    factor = r'(?:[<>] )?\d+\.\d\d \((?:[<>] )?\d+\.\d\d to (?:[<>] )?\d+\.\d\d\)'
    points = [point for task in documents.RECORDS for point in documents.points_of(task).values()]
    known = {value for point in points for key, value in point.items() if re.fullmatch('factor_[a-z]+(_seconds)?', key)}
    pages = [path for pattern in PAGES for path in documents.ROOT.glob(pattern)]
    found = {text for page in pages for text in re.findall(factor, page.read_text())}
    assert len(found) > 60
    assert found <= known


def test_a_record_that_changed_is_written_into_the_documents(documents, tmp_path, monkeypatch, capsys):
    (tmp_path / 'benchmarks/results').mkdir(parents=True)
    shared = {'plain': False, 'seeds': '17 18', 'eval_accuracy': 0.5, 'sd': 0.01, 'samples': 700.0, 'steps': 8.0, 'verdict': 'pays'}
    own = {'factor_samples': '> 1.43 (1.02 to > 1.43)', 'factor_samples_value': None, 'factor_steps': '0.90 (0.80 to 1.00)'}
    plain = {
        **shared,
        'method': 'baseline+10ep',
        'plain': True,
        'sd': None,
        'samples': 1000.0,
        'verdict': 'baseline',
        'factor_samples': None,
    }
    points = [{**plain, 'factor_steps': None}, {**shared, **own, 'method': 'infobatch+10ep'}]
    points[1:] = [{**points[1], 'method': 'craig+10ep', 'factor_samples': '0.50 (0.40 to 0.60)', 'factor_samples_value': 0.5}, points[1]]
    for name, *_ in documents.RECORDS.values():
        (tmp_path / f'benchmarks/results/{name}.json').write_text(json.dumps({'points': points}))
        (tmp_path / f'benchmarks/results/{name}.md').write_text(RECORD)
    text = '# Title\n\n<!-- measured: {} -->\nold\n<!-- end -->\n\nAfter.\n'
    (tmp_path / 'a.md').write_text(text.format('table few'))
    (tmp_path / 'b.md').write_text(text.format('infobatch'))
    (tmp_path / 'c.md').write_text(text.format('factors craig'))
    monkeypatch.setattr(documents, 'ROOT', tmp_path)
    monkeypatch.setattr(documents, 'DOCUMENTS', ('a.md', 'b.md', 'c.md'))
    assert documents.main(['--check']) == 2
    assert capsys.readouterr().err.startswith('error: a.md, b.md, c.md: expected the figures of benchmarks/results')
    assert documents.main([]) == 0
    assert documents.main(['--check']) == 0
    table = (tmp_path / 'a.md').read_text()
    rows = [line.split(' | ')[0] for line in table.splitlines() if 'ep |' in line]
    assert rows == ['| baseline+10ep', '| infobatch+10ep', '| craig+10ep']  # beyond the plain runs first
    assert '| 2 | 50.00 ± 1.00 | pays | > 1.43 (1.02 to > 1.43) | 0.90 (0.80 to 1.00) | 700 | 8 |\n' in table
    assert table.endswith('<!-- end -->\n\nAfter.\n')
    assert (
        '| CIFAR-10, 5,000 images, ResNet-20 at 16 pixels | 10 | 30 % | > 1.43 (1.02 to > 1.43) | 2 |\n' in (tmp_path / 'b.md').read_text()
    )
    assert 'factor: 0.50 (0.40 to 0.60) on 5,000 images, 0.50' in (tmp_path / 'c.md').read_text()
