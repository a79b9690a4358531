"""The picture of a sweep."""

import json

import pytest

RESULTS = {
    'runs': [
        {
            'method': method,
            'train_seconds': seconds,
            'eval_accuracy': accuracy,
            'epochs': [
                {'epoch': 0, 'samples': 100, 'eval_accuracy': 0.5},
                {'epoch': 1, 'samples': samples, 'eval_accuracy': accuracy},
            ],
        }
        for method, seconds, accuracy, samples in [
            ('baseline', 10.0, 0.9, 100),
            ('baseline', 12.0, 0.8, 100),
            ('infobatch', 5.5, 0.75, 60),
        ]
    ]
}


def test_curves_and_ends_are_the_results(script):
    figure = script('figure').draw(RESULTS)
    curves, ends = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in curves.get_lines()}
    assert lines['baseline'] == [[0.1, 50.0], [0.2, pytest.approx(15.0)]]
    assert lines['infobatch'] == [[0.1, 50.0], [0.16, pytest.approx(25.0)]]
    points = [container.lines[0].get_xydata()[0].tolist() for container in ends.containers]
    assert points == [[100.0, pytest.approx(85.0)], [50.0, pytest.approx(75.0)]]


def test_the_file_is_the_same_every_time(script, tmp_path):
    (tmp_path / 'results.json').write_text(json.dumps(RESULTS))
    target, drawn = tmp_path / 'a.svg', []
    for _ in range(2):
        assert script('figure').main([str(tmp_path / 'results.json'), str(target)]) == 0
        drawn.append(target.read_bytes())
    assert drawn[0] == drawn[1]
    assert b'infobatch' in drawn[0]


def test_usage(script, capsys):
    assert script('figure').main([]) == 2
    assert 'RESULTS.json' in capsys.readouterr().err
