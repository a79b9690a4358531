import numpy as np
import pytest

from composer_effalgos.report.equal_budget import Cell, equivalent_budget
from composer_effalgos.utils.errors import InputError

LENGTHS = np.array([15.0, 30.0, 60.0, 120.0])


def curve(budget):
    return 0.9 - 0.5 * budget**-0.6  # a power law: concave in the logarithm


def cells(rng, factor, noise, seeds=3, lengths=LENGTHS, own=40.0):
    def cell(name, budget, true):
        return Cell(name, np.full(seeds, budget), true + noise * rng.standard_normal(seeds))

    baseline = [cell(f'baseline+{length:g}', length, curve(length)) for length in lengths]
    return baseline, cell('method', own, curve(own * factor))


@pytest.mark.parametrize('factor', [0.8, 1.0, 1.5])
def test_a_known_factor_is_recovered(factor):
    exact = equivalent_budget(*cells(np.random.default_rng(0), factor, noise=0))
    assert exact.value == pytest.approx(factor, rel=0.02)  # four points of a power law, joined by a cubic
    noisy = equivalent_budget(*cells(np.random.default_rng(1), factor, noise=0.002))
    assert noisy.low < factor < noisy.high
    assert noisy.low < noisy.value < noisy.high


@pytest.mark.parametrize('seeds', [3, 5])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds):
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        found = equivalent_budget(*cells(rng, 1.2, noise=0.004, seeds=seeds))
        covered += found.low <= 1.2 <= found.high
    assert 0.92 <= covered / 300 <= 0.98


def test_the_curve_is_not_extrapolated():
    rng = np.random.default_rng(3)
    worse = equivalent_budget(*cells(rng, 0.2, noise=0.0001))
    assert (worse.value, worse.low, worse.high) == (0, 0, 0)
    assert str(worse) == '< 0.38 (< 0.38 to < 0.38)'  # 15 / 40
    better = equivalent_budget(*cells(rng, 9.0, noise=0.0001))
    assert str(better) == '> 3.00 (> 3.00 to > 3.00)'
    edge = equivalent_budget(*cells(rng, 3.0, noise=0.003))
    assert np.isinf(edge.high)
    assert 1 < edge.low < 3


def test_only_ratios_of_budgets_count_and_an_order_that_noise_turned_over_is_mended():
    baseline, method = cells(np.random.default_rng(4), 1.1, noise=0.003)
    found = equivalent_budget(baseline, method)
    scaled = equivalent_budget(
        [Cell(c.name, 7 * c.budget, c.quality) for c in reversed(baseline)], Cell('m', 7 * method.budget, method.quality)
    )
    assert scaled.value == pytest.approx(found.value)
    assert scaled.low == pytest.approx(found.low)
    baseline[2], baseline[3] = (Cell(a.name, a.budget, b.quality) for a, b in ((baseline[2], baseline[3]), (baseline[3], baseline[2])))
    assert 0 < equivalent_budget(baseline, method).value < np.inf


def test_too_little_to_say_anything_is_refused():
    baseline, method = cells(np.random.default_rng(5), 1.0, noise=0.01)
    with pytest.raises(InputError, match='at least two lengths'):
        equivalent_budget(baseline[:1], method)
    one = [Cell(c.name, c.budget[:1], c.quality[:1]) for c in [*baseline, method]]
    with pytest.raises(InputError, match='at least two seeds'):
        equivalent_budget(one[:-1], one[-1])
