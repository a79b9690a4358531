import csv
import json

import pytest

from composer_effalgos.report.results import read_targets, write_results
from composer_effalgos.report.runs import read_runs
from composer_effalgos.report.table import table_rows
from composer_effalgos.utils.errors import InputError


def test_every_run_has_a_line_and_every_method_its_means(tmp_path, write_run):
    for seed, final in ((17, 0.9), (18, 0.8)):
        write_run(f'a_baseline_seed{seed}', seed, (0.5, final))
    write_run('b, "quoted"\nmethod', accuracies=(0.4, None), seconds=1.0)
    rows = table_rows(read_runs(tmp_path / 'runs')[0], [0.85])
    write_results(rows, tmp_path / 'runs', targets=[0.85], about={'failed': ['one']})
    with (tmp_path / 'runs' / 'results.csv').open(newline='') as file:
        lines = list(csv.DictReader(file))
    assert [line['method'] for line in lines] == ['a_baseline', 'a_baseline', 'b, "quoted"\nmethod']
    assert [line['eval_accuracy'] for line in lines] == ['0.9', '0.8', '']
    assert [line['epoch_above_0.85'] for line in lines] == ['2', '', '']
    assert [float(line['train_seconds']) for line in lines] == [4, 4, 2]
    content = json.loads((tmp_path / 'runs' / 'results.json').read_text())
    assert (content['targets'], content['failed']) == ([0.85], ['one'])
    baseline, other = content['methods']
    assert (baseline['accuracy'], baseline['seeds']) == (pytest.approx(0.85), [17, 18])
    assert baseline['reached'] == [{'target': 0.85, 'runs': 1, 'of': 2, 'epoch': 2, 'seconds': 4}]
    assert (other['accuracy'], other['time_ratio']) == (None, 0.5)
    assert [len(run['epochs']) for run in content['runs']] == [2, 2, 2]
    assert read_targets(tmp_path / 'runs') == [0.85]


def test_a_folder_without_results_has_no_targets(tmp_path):
    assert read_targets(tmp_path) == []
    (tmp_path / 'results.json').write_text('{"targets": 3}')
    assert read_targets(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path, write_run):
    write_run('a')
    (tmp_path / 'nowhere').touch()
    with pytest.raises(InputError, match='cannot be written'):
        write_results(table_rows(read_runs(tmp_path / 'runs')[0]), tmp_path / 'nowhere')
