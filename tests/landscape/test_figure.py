from __future__ import annotations

import math

from composer_effalgos.landscape import Point, draw


def test_the_papers_form_with_gaps_where_the_loss_is_no_number() -> None:
    losses = [1e30, 0.5, 0.1, 0.7, math.inf, math.nan]
    points = [Point(index / 2, loss, 0.9, 2 * loss, 0.8) for index, loss in enumerate(losses)]
    loss_axes, accuracy_axes = draw(points, ('small', 'large'), 'title').axes
    assert loss_axes.get_yscale() == 'log'
    assert accuracy_axes.get_yscale() == 'linear'
    assert 'small' in loss_axes.get_xlabel()
    assert 'large' in loss_axes.get_xlabel()
    curves = [line for line in loss_axes.lines if len(line.get_xdata()) == len(points) and line.get_linestyle() in ('-', '--')]
    assert [curve.get_linestyle() for curve in curves] == ['-', '--']
    for curve, factor in zip(curves, (1, 2), strict=True):
        assert list(curve.get_ydata()[:4]) == [factor * loss for loss in losses[:4]]
        assert all(math.isnan(height) for height in curve.get_ydata()[4:])
    crosses = [line for line in loss_axes.lines if line.get_marker() == 'x']
    assert [list(line.get_xdata()) for line in crosses] == [[2.0, 2.5]] * 2
    assert [list(line.get_ydata()) for line in accuracy_axes.lines] == [[90.0] * 6, [80.0] * 6]
    assert loss_axes.get_ylim()[1] >= 2e30  # drawn in full
