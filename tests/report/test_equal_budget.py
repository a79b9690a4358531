import numpy as np
import pytest
from scipy.stats import chi2

from composer_effalgos.report import equal_budget
from composer_effalgos.report.equal_budget import Cell, Factor, compare
from composer_effalgos.utils.errors import InputError

LENGTHS = np.array([15.0, 30.0, 60.0, 120.0])


def curve(budget):
    return 0.9 - 0.5 * budget**-0.6  # a power law: concave in the logarithm


def cells(rng, factor, noise, seeds=3, lengths=LENGTHS, own=40.0, cost=0.0):
    def cell(name, budget, true):
        return Cell(name, budget * np.exp(cost * rng.standard_normal(seeds)), true + noise * rng.standard_normal(seeds))

    baseline = [cell(f'baseline+{length:g}', length, curve(length)) for length in lengths]
    return baseline, cell('method', own, curve(own * factor))


def factor_of(baseline, method):
    return compare(baseline, [method]).factors[0]


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(equal_budget, '_DRAWS', 1000)
    monkeypatch.setattr(equal_budget, '_GRID', 128)
    monkeypatch.setattr(equal_budget._Curves, 'band', lambda self: None)


@pytest.mark.parametrize('factor', [0.8, 1.0, 1.5])
def test_a_known_factor_is_recovered(factor):
    exact = factor_of(*cells(np.random.default_rng(0), factor, noise=0))
    assert exact.value == pytest.approx(factor, rel=0.02)  # four points of a power law, joined by a cubic
    assert exact.low == pytest.approx(exact.value)
    assert exact.high == pytest.approx(exact.value)
    noisy = factor_of(*cells(np.random.default_rng(1), factor, noise=0.002))
    assert noisy.low < factor < noisy.high
    assert noisy.low < noisy.value < noisy.high


@pytest.mark.parametrize(('seeds', 'cost'), [(3, 0.0), (3, 0.05), (5, 0.0)])
def test_the_interval_covers_the_truth_as_often_as_it_says(few_draws, seeds, cost):
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        found = factor_of(*cells(rng, 1.2, noise=0.004, seeds=seeds, cost=cost))
        covered += found.low <= 1.2 <= found.high
    assert 0.92 <= covered / 200 <= 0.99


def test_budgets_that_vary_widen_the_interval(few_draws):
    def width(cost):
        found = factor_of(*cells(np.random.default_rng(3), 1.1, noise=1e-5, cost=cost))
        return np.log(found.high / found.low)

    # own mean cost and that of the lengths beside it, some t quantile times sd / sqrt(3) each
    assert width(0) < 0.01
    assert 0.15 < width(0.05) < 0.5


def test_a_noisy_method_has_a_wider_interval_than_a_steady_one(few_draws):
    rng = np.random.default_rng(4)
    baseline, steady = cells(rng, 1.1, noise=0.002)
    noisy = Cell('noisy', steady.budget, steady.quality.mean() + np.array([-0.012, 0.0, 0.012]))
    one, other = compare(baseline, [steady, noisy]).factors
    assert np.log(other.high / other.low) > 1.5 * np.log(one.high / one.low)


def test_the_spread_is_ones_own_and_that_of_the_others():
    rng = np.random.default_rng(5)
    values = [scale * rng.standard_normal(count) for scale, count in ((1, 3), (1, 5), (9, 3), (1, 1))]
    squares = [((own - own.mean()) ** 2).sum() for own in values]
    variance, freedom = equal_budget._moderated(values)
    assert freedom.tolist() == [4 + 2, 4 + 4, 4 + 2, 4]
    median = {2: 2 * np.log(2), 4: chi2.ppf(0.5, 4)}  # of the chi-squared distribution
    typical = [square / median[len(own) - 1] for square, own in zip(squares[:3], values[:3], strict=True)]
    prior = [np.mean([typical[1], typical[2]]), np.mean([typical[0], typical[2]]), np.mean(typical[:2]), np.median(typical[:3])]
    expected = [(4 * common + square) / free for common, square, free in zip(prior, [*squares[:3], 0.0], freedom, strict=True)]
    assert variance == pytest.approx(expected)
    assert equal_budget._moderated([values[0], values[3]])[1].tolist() == [2, 2]  # never more than there is


def test_the_curve_is_not_extrapolated():
    rng = np.random.default_rng(6)
    worse = factor_of(*cells(rng, 0.2, noise=0.0001))
    assert (worse.value, worse.low, worse.high) == (0, 0, 0)
    assert str(worse) == '< 0.38 (< 0.38 to < 0.38)'  # 15 / 40
    better = factor_of(*cells(rng, 9.0, noise=0.0001))
    assert str(better) == '> 3.00 (> 3.00 to > 3.00)'
    edge = factor_of(*cells(rng, 3.0, noise=0.003))
    assert np.isinf(edge.high)
    assert 1 < edge.low < 3


@pytest.mark.parametrize(
    ('value', 'low', 'high', 'verdict'),
    [
        (1.3, 1.05, 1.6, 'pays'),
        (1.3, 0.95, 1.6, 'not resolved'),
        (0.8, 0.6, 0.95, 'train shorter instead'),
        (1.8, 1.2, np.inf, 'pays'),
        (np.inf, np.inf, np.inf, 'pays'),  # twice the budget at least
        (0.0, 0.0, 0.0, 'train shorter instead'),
        (np.inf, 0.9, np.inf, 'not resolved: needs a longer plain run'),
        (0.0, 0.0, 1.1, 'not resolved: needs a shorter plain run'),
    ],
)
def test_the_interval_decides(value, low, high, verdict):
    assert Factor(value, low, high, least=0.25, most=2.0).verdict == verdict


@pytest.mark.parametrize(
    'true',
    [
        lambda t: 0.75 - 0.9 * t**-0.55,
        lambda t: 0.9 - 0.9 * t**-0.3,
        lambda t: 0.75 - 3 / t,
        lambda t: 0.1 * np.log(t),
        lambda t: 0.7 - 0.7 * np.exp(-t / 25),
    ],
)
def test_with_lengths_that_double_the_interpolation_costs_at_most_three_percent(true):
    lengths = (8.0, 16.0, 32.0, 64.0)
    baseline = [Cell(f'{length}', np.array([length]), np.array([true(length)])) for length in lengths]
    budgets = np.geomspace(9, 60, 30)
    methods = [Cell('m', np.array([budget]), np.array([true(budget)])) for budget in budgets]
    assert [factor.value for factor in compare(baseline, methods).factors] == pytest.approx([1.0] * 30, abs=0.03)


@pytest.mark.parametrize(
    ('lengths', 'own', 'verdict'),
    [
        ((10, 40), 20, 'not resolved: needs 3 plain lengths'),
        ((10, 20), 12, 'not resolved: needs 3 plain lengths'),
        ((8, 30, 60), 16, 'not resolved: needs closer plain lengths'),
        ((8, 30, 60), 40, 'pays'),
        ((8, 15, 30, 60), 16, 'pays'),
    ],
)
def test_distant_plain_lengths_give_no_verdict(lengths, own, verdict):
    assert factor_of(*cells(np.random.default_rng(4), 1.4, noise=0.001, lengths=lengths, own=own)).verdict == verdict


def test_between_two_distant_lengths_a_plain_run_itself_would_seem_to_pay():
    assert factor_of(*cells(np.random.default_rng(4), 1.0, noise=0.001, lengths=(10, 40), own=20)).low > 1


def test_beyond_the_plain_runs_a_bound_may_decide_nothing():
    assert Factor(np.inf, np.inf, np.inf, least=0.1, most=0.7).verdict == 'not resolved: needs a longer plain run'
    assert Factor(0.0, 0.0, 0.0, least=1.3, most=9.0).verdict == 'not resolved: needs a shorter plain run'


def test_only_ratios_of_budgets_count_and_an_order_that_noise_turned_over_is_mended():
    baseline, method = cells(np.random.default_rng(7), 1.1, noise=0.003)
    found = factor_of(baseline, method)
    scaled = factor_of([Cell(c.name, 7 * c.budget, c.quality) for c in reversed(baseline)], Cell('m', 7 * method.budget, method.quality))
    assert scaled.value == pytest.approx(found.value)
    assert scaled.low == pytest.approx(found.low)
    baseline[2], baseline[3] = (Cell(a.name, a.budget, b.quality) for a, b in ((baseline[2], baseline[3]), (baseline[3], baseline[2])))
    assert 0 < factor_of(baseline, method).value < np.inf
    shuffled = [baseline[number] for number in (2, 0, 3, 1)]
    assert compare(shuffled, [method]).quality[:, 0] == pytest.approx([cell.quality.mean() for cell in [*shuffled, method]])


def test_the_band_holds_the_points_and_the_curve_goes_through_them():
    baseline, method = cells(np.random.default_rng(8), 1.1, noise=0.002)
    found = compare(baseline, [method]).curve
    assert (found.budget[0], found.budget[-1]) == pytest.approx((15, 120))
    assert np.all(np.diff(found.quality) >= 0)
    assert np.all(found.low <= found.quality + 1e-12)
    assert np.all(found.quality <= found.high + 1e-12)
    for cell in baseline:
        assert np.interp(cell.budget[0], found.budget, found.quality) == pytest.approx(cell.quality.mean(), abs=1e-4)


def test_too_little_to_say_anything_is_refused():
    baseline, method = cells(np.random.default_rng(9), 1.0, noise=0.01)
    with pytest.raises(InputError, match='at least two lengths'):
        factor_of(baseline[:1], method)


def test_one_seed_of_everything_gives_a_factor_and_no_interval():
    baseline, method = cells(np.random.default_rng(9), 1.2, noise=0)
    one = [Cell(c.name, c.budget[:1], c.quality[:1]) for c in [*baseline, method]]
    found = factor_of(one[:-1], one[-1])
    assert found.value == pytest.approx(1.2, rel=0.02)
    assert (found.low, found.high) == (0, np.inf)
    assert found.verdict == 'not resolved'
