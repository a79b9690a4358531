"""Each rule's decision against a straight-line implementation of its paper's, on fixed losses."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_effalgos import InputError, Pruning
from composer_effalgos import functional as ef
from composer_effalgos.plan import SampleRows
from composer_effalgos.pruning import Epoch, Step
from composer_effalgos.pruning.ratio import ratio_schedule
from composer_effalgos.pruning.rules import RULES, find_rule
from composer_effalgos.pruning.rules.seta import loss_groups


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def epoch(number: int = 1, ratio: float = 0.5, seed: int = 0, labels: np.ndarray | None = None) -> Epoch:
    return Epoch(number, 10, number / 10, ratio, generator(seed), None if labels is None else torch.from_numpy(labels))


def table(losses: np.ndarray, trained: np.ndarray | None = None) -> SampleRows:
    """``losses[t, i]``: the loss of sample ``i`` in training ``t``, the oldest first."""
    history = torch.tensor(np.atleast_2d(losses)[::-1].copy(), dtype=torch.float32)
    rows = SampleRows.empty(len(history), history.shape[1])
    rows.history[:], rows.scored[:] = history, True
    rows.trained[:] = torch.from_numpy(trained) if trained is not None else len(history)
    return rows


def test_infobatch_is_prune():
    losses = np.random.default_rng(0).exponential(size=200).astype(np.float32)
    kept, weights = find_rule('infobatch').keep(table(losses), epoch(seed=3))
    expected = ef.prune(torch.from_numpy(losses), 0.5, generator(3))
    assert torch.equal(kept, expected[0])
    assert torch.equal(weights, expected[1])


@pytest.mark.parametrize(('size', 'ratio'), [(100, 0.5), (103, 0.7), (60, 0.75)])
def test_random_trains_on_every_sample_once_before_any_twice(size, ratio):
    rule, rows = find_rule('random'), SampleRows.empty(0, size)
    sets = set()
    for number in range(12):
        kept, weights = rule.keep(rows, epoch(number, ratio, number))
        assert weights is None
        assert len(kept) == round(size * (1 - ratio))
        rows.trained[kept] += 1
        assert int(rows.trained.max() - rows.trained.min()) <= 1
        sets.add(tuple(kept.tolist()))
    assert len(sets) == 12


def test_random_draws_evenly_among_those_trained_least():
    rows, counts = SampleRows.empty(0, 8), np.zeros(8)
    rows.trained[:2] = 1
    for seed in range(3000):
        counts[find_rule('random').keep(rows, epoch(1, 0.5, seed))[0]] += 1
    assert (counts[:2] == 0).all()
    assert abs(counts[2:] - 2000).max() < 5 * math.sqrt(3000 * (2 / 3) * (1 / 3))


def test_random_with_a_ramp_keeps_a_power_of_gamma():
    rule, rows = find_rule({'name': 'random', 'gamma': 0.9}), SampleRows.empty(0, 1000)
    assert [len(rule.keep(rows, epoch(number))[0]) for number in range(5)] == [round(1000 * 0.9**number) for number in range(5)]


def seta_by_hand(losses, share, number, groups, window):
    """The released code's steps, with scikit-learn's k-means in the place of ours."""
    cluster = pytest.importorskip('sklearn.cluster')
    labels = cluster.KMeans(groups, random_state=0, n_init=10).fit(losses[share][:, None]).labels_
    by_centre = sorted(range(groups), key=lambda group: losses[share][labels == group].mean())
    size = round(groups * window)
    start = number % (groups - size + 1)
    return sorted(i for group in by_centre[start : start + size] for i in share[labels == group])


@pytest.mark.parametrize(('groups', 'window', 'ratio'), [(5, 0.9, 0.1), (10, 0.5, 0.0), (4, 0.5, 0.4)])
@pytest.mark.parametrize('number', range(1, 8))
def test_seta_slides_a_window_over_groups_of_loss(groups, window, ratio, number):
    draw = np.random.default_rng(1)
    losses = (draw.integers(0, groups, 300) * 5 + draw.random(300)).astype(np.float32)  # groups that any k-means finds
    rule = find_rule({'name': 'seta', 'groups': groups, 'window': window})
    kept, weights = rule.keep(table(losses), epoch(number, ratio, 7))
    share = np.sort(torch.randperm(300, generator=generator(7))[: int(300 * (1 - ratio))].numpy())
    assert kept.tolist() == seta_by_hand(losses, share, number, groups, window)
    assert weights is None
    at_end, _ = rule.keep_at_end(table(losses), epoch(number, ratio, 7))
    assert at_end.tolist() == share.tolist()


@given(st.integers(1, 8), st.lists(st.floats(0, 100, width=32), min_size=1, max_size=60))
def test_groups_of_loss_are_a_fixed_point_of_k_means(groups, losses):
    values = torch.tensor(losses)
    found = loss_groups(values, groups)
    order = values.argsort(stable=True)
    if values.min() < values.max():
        assert (found[order].diff() >= 0).all()  # intervals
        centres = {g: values[found == g].double().mean().item() for g in found.unique().tolist()}
        for value, group in zip(losses, found.tolist(), strict=True):  # each is nearest to the centre of its own group
            nearest = min(abs(value - centre) for centre in centres.values())
            assert abs(value - centres[group]) <= nearest + 1e-4
    else:
        assert set(found.bincount(minlength=groups).tolist()) <= {len(losses) // groups, -(-len(losses) // groups)}


def test_pdd_keeps_whatever_the_model_is_not_sure_of():
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(40, 5)).astype(np.float32) * 3, draw.integers(0, 5, 40)
    rule = find_rule({'name': 'pdd', 'threshold': 0.3})
    step = Step(torch.zeros(40), torch.from_numpy(logits), (None, torch.from_numpy(labels)), torch.arange(40))
    scores = rule.score(step)
    expected = [math.exp(row[label]) / sum(map(math.exp, row)) for row, label in zip(logits.tolist(), labels, strict=True)]
    assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    kept, weights = rule.keep(table(scores.numpy()), epoch())
    assert kept.tolist() == [i for i, p in enumerate(expected) if p < 0.3]
    assert weights is None


@pytest.mark.parametrize('confidence', [0.0, 1.0, 5.0])
def test_ucb_keeps_the_highest_upper_bounds(confidence):
    draw = np.random.default_rng(2)
    losses, trained = draw.exponential(size=(5, 60)), draw.integers(1, 9, 60)
    bounds = []
    for i in range(60):
        past = losses[-min(5, trained[i]) :, i].astype(np.float32).astype(float)
        mean, variance = past[0], 0.0
        for loss in past[1:]:
            variance = 0.2 * variance + 0.8 * (loss - mean) ** 2
            mean = 0.2 * mean + 0.8 * loss
        bounds.append(mean + confidence * math.sqrt(variance))
    kept, _ = find_rule({'name': 'ucb', 'confidence': confidence}).keep(table(losses, trained), epoch(ratio=0.6))
    assert kept.tolist() == sorted(sorted(range(60), key=lambda i: -bounds[i])[:24])


@pytest.mark.parametrize('epsilon', [0.0, 0.25, 1.0])
def test_epsilon_greedy_keeps_the_highest_and_some_at_random(epsilon):
    losses = np.random.default_rng(3).exponential(size=100)
    rule = find_rule({'name': 'epsilon_greedy', 'epsilon': epsilon})
    highest = sorted(range(100), key=lambda i: -losses[i])
    drawn = int(epsilon * 40)
    counts = np.zeros(100)
    for seed in range(300):
        kept = rule.keep(table(losses), epoch(ratio=0.6, seed=seed))[0].tolist()
        assert len(kept) == 40
        assert set(highest[: 40 - drawn]) <= set(kept)
        counts[kept] += 1
    others = counts[highest[40 - drawn :]]
    assert others.sum() == 300 * drawn
    assert (others > 0).all() == (drawn > 0)


def test_epsilon_greedy_goes_by_a_moving_average():
    assert find_rule({'name': 'epsilon_greedy', 'alpha': 0.75}).decay == 0.25


@pytest.mark.parametrize('window', [1, 3])
def test_ies_stops_samples_whose_loss_has_stopped_changing(window):
    draw = np.random.default_rng(4)
    length = window + 2
    losses = 1 + draw.normal(size=(length, 200)) * draw.choice([1e-5, 1e-3, 0.1], 200)
    trained = draw.integers(length, length + 3, 200)
    kept, weights = find_rule({'name': 'ies', 'threshold': 1e-3, 'window': window}).keep(table(losses, trained), epoch())
    expected = []
    for i in range(200):
        past = losses[:, i].astype(np.float32)
        second = [past[t] - 2 * past[t - 1] + past[t - 2] for t in range(2, length)]
        if trained[i] < window + 3 or sum(map(abs, second)) / window >= 1e-3:
            expected.append(i)
    assert kept.tolist() == expected
    assert 0 < len(expected) < 200
    assert weights is None


@pytest.mark.parametrize('kind', ['tensor', 'npy', 'parquet', 'safetensors'])
def test_rho_keeps_the_highest_reducible_losses(tmp_path, kind):
    draw = np.random.default_rng(5)
    irreducible, losses = draw.exponential(size=50).astype(np.float32), draw.exponential(size=50).astype(np.float32)
    path = tmp_path / f'losses.{kind}'
    if kind == 'npy':
        np.save(path, irreducible)
    elif kind == 'parquet':
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({'loss': irreducible}), path)
    elif kind == 'safetensors':
        from safetensors.torch import save_file

        save_file({'loss': torch.from_numpy(irreducible)}, path)
    rule = find_rule({'name': 'rho', 'irreducible': torch.from_numpy(irreducible) if kind == 'tensor' else str(path)})
    rule.new_data(50)
    samples = torch.from_numpy(draw.permutation(50))
    scores = torch.zeros(50)
    scores[samples] = rule.score(Step(torch.from_numpy(losses)[samples], None, None, samples))
    kept, weights = rule.keep(table(scores.numpy()), epoch(ratio=0.7))
    assert kept.tolist() == sorted(sorted(range(50), key=lambda i: irreducible[i] - losses[i])[:15])
    assert weights is None
    with pytest.raises(InputError, match='one number for each of 51 training samples, got 50'):
        rule.new_data(51)


def rcap_counts_by_hand(losses, labels, keep):
    """Samples of each class: the closed form of the released code, with what full classes leave divided over the others."""
    classes = sorted(set(labels.tolist()))
    sizes = {c: int((labels == c).sum()) for c in classes}
    weight = {c: math.sqrt(np.minimum(losses[labels == c], math.log(len(classes))).mean() * sizes[c] / len(labels)) for c in classes}
    counts, open_classes = {}, list(classes)
    while True:
        left = keep - sum(counts.values())
        wanted = {c: weight[c] / sum(weight[d] for d in open_classes) * left for c in open_classes}
        full = [c for c in open_classes if wanted[c] > sizes[c]]
        if not full:
            return counts | {c: math.ceil(round(wanted[c], 6)) for c in open_classes}
        for c in full:
            counts[c] = sizes[c]
            open_classes.remove(c)


@pytest.mark.parametrize('ratio', [0.2, 0.5, 0.9])
@pytest.mark.parametrize('shares', [[0.25] * 4, [0.9, 0.05, 0.03, 0.02]])
def test_rcap_divides_the_samples_over_the_classes(ratio, shares):
    draw = np.random.default_rng(6)
    labels = draw.choice(4, 400, p=shares)
    losses = (draw.exponential(size=400) * (1 + labels)).astype(np.float32)
    kept, weights = find_rule('rcap').keep(table(losses), epoch(ratio=ratio, labels=labels))
    expected = rcap_counts_by_hand(losses.astype(float), labels, round(400 * (1 - ratio)))
    assert {c: int((labels[kept] == c).sum()) for c in range(4)} == expected
    assert round(400 * (1 - ratio)) <= len(kept) < round(400 * (1 - ratio)) + 4
    assert weights is None


def test_rcap_draws_within_a_class_by_the_softmax_of_the_losses():
    losses, labels, runs = np.array([0.1, 0.3, 0.6, 5.0, 0.2, 0.2]), np.array([3, 3, 3, 3, 7, 7]), 4000
    rule, counts, pairs = find_rule({'name': 'rcap', 'beta': 0.5, 'clip': 1.0}), np.zeros(6), set()
    for seed in range(runs):
        kept = rule.keep(table(losses), epoch(ratio=0.5, seed=seed, labels=labels))[0].numpy()
        counts[kept] += 1
        pairs.add(len(kept))
    assert pairs == {4}  # 2.3 and 0.7 of 3, rounded up
    p = np.exp(np.minimum(losses[:4], 1.0) / 0.5)
    p /= p.sum()
    expected = np.zeros(4)  # of three drawn one after the other, each with the probabilities of those that are left
    for first, second, third in itertools.permutations(range(4), 3):
        chance = p[first] * p[second] / (1 - p[first]) * p[third] / (1 - p[first] - p[second])
        expected[[first, second, third]] += chance
    assert abs(counts[:4] / runs - expected).max() < 5 * 0.5 / math.sqrt(runs)
    assert abs(counts[4:] / runs - 0.5).max() < 5 * 0.5 / math.sqrt(runs)


@given(st.sampled_from([name for name in RULES if name != 'rho']), st.integers(1, 40), st.integers(0, 20), st.integers(1, 12))
def test_every_rule_gives_ascending_positions_whatever_the_losses(name, size, seed, number):
    rule = find_rule(name)
    draw = np.random.default_rng(seed)
    losses = draw.choice([0.0, 1.0, 5.0, np.inf, 1e-9], (max(1, rule.history), size))
    rows = table(losses, draw.integers(1, 9, size))
    if not rule.history:
        rows = SampleRows.empty(0, size)
    for decide in (rule.keep, rule.keep_at_end):
        answer = decide(rows, epoch(number, 0.5, seed, draw.integers(0, 3, size)))
        if answer is not None:
            kept, weights = answer
            assert kept.dtype == torch.int64
            assert (kept.diff() > 0).all()
            assert len(kept) == 0 or 0 <= kept[0] <= kept[-1] < size
            assert weights is None or torch.isfinite(weights).all()


@pytest.mark.parametrize(
    ('rule', 'message'),
    [
        ('sita', "rule: expected .*; did you mean 'seta'"),
        (3, 'rule: expected'),
        ({'groups': 3}, 'rule: expected'),
        ({'name': 'seta', 'group': 3}, "rule.group: unknown option of 'seta'; known: groups, window"),
        ({'name': 'seta', 'groups': 0}, 'rule.groups: expected'),
        ({'name': 'seta', 'window': 0.01}, 'rule.window: expected'),
        ({'name': 'random', 'gamma': 0}, 'rule.gamma'),
        ({'name': 'pdd', 'threshold': 2}, 'rule.threshold'),
        ({'name': 'ucb', 'alpha': 0}, 'rule.alpha'),
        ({'name': 'ucb', 'history': 0}, 'rule.history'),
        ({'name': 'epsilon_greedy', 'epsilon': 1.5}, 'rule.epsilon'),
        ({'name': 'ies', 'window': True}, 'rule.window'),
        ({'name': 'rcap', 'beta': 0}, 'rule.beta'),
        ({'name': 'rcap', 'clip': -1}, 'rule.clip'),
        ('rho', 'rule.irreducible: missing'),
        ({'name': 'rho', 'irreducible': 'missing.npy'}, 'rule.irreducible: missing.npy: cannot be read'),
        ({'name': 'rho', 'irreducible': 'a.txt'}, 'rule.irreducible: expected a .npy'),
        ({'name': 'rho', 'irreducible': [1.0, math.nan]}, 'rule.irreducible: expected finite numbers'),
    ],
)
def test_refuses_rules(rule, message):
    with pytest.raises(InputError, match=message):
        Pruning(rule)


def test_the_pruned_fraction_may_change_over_the_run():
    points = ratio_schedule([(0.0, 0.1), (0.5, 0.5), (1.0, 0.0)])
    assert [points(p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0.1, 0.3, 0.5, 0.25, 0])
    assert ratio_schedule({0.2: 0.3})(0.9) == 0.3
    assert ratio_schedule(lambda progress: progress / 2)(0.5) == 0.25
    for wrong in (1.0, 'half', [(0, 0.1), (0, 0.2)], [(0.5, 0.1), (0.2, 0.2)], [], [(0, 1.0)], [3], [(-1, 0.1)]):
        with pytest.raises(InputError, match='prune_ratio'):
            ratio_schedule(wrong)
    with pytest.raises(InputError, match=r'prune_ratio at progress 0.5'):
        ratio_schedule(lambda progress: 2 * progress)(0.5)
