"""Strategies that CORDS does not have, against their definitions."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.selection import _equal_shares, select_subset
from composer_effalgos.subset_selection.strategies.milo import importance
from composer_effalgos.subset_selection.strategies.points import farthest_first, unit_length
from composer_effalgos.utils.errors import InputError

SUPERVISED = {'selection_type': 'Supervised'}


def probabilities(gradients, labels):
    return gradients.error.double() + torch.nn.functional.one_hot(labels, gradients.error.shape[1])


def scores_by_definition(strategy, gradients, labels):
    if strategy == 'el2n':
        return [row.norm().item() for row in gradients.error.double()]
    if strategy == 'grand':
        return [row.norm().item() for row in gradients.dense().double()]
    rows = probabilities(gradients, labels).tolist()
    if strategy == 'margin':
        return [sorted(row)[-2] - sorted(row)[-1] for row in rows]
    if strategy == 'entropy':
        return [-sum(p * math.log(p) for p in row) for row in rows]
    return [1 - max(row) for row in rows]


@pytest.mark.parametrize('strategy', ['el2n', 'grand', 'margin', 'entropy', 'least-confidence'])
def test_ranks_by_its_score(make_gradients, strategy):
    gradients, labels = make_gradients(40, 4, 5)
    scores = scores_by_definition(strategy, gradients, labels)
    ranking = sorted(range(40), key=lambda i: -scores[i])
    indices, weights = select_subset(strategy, gradients, 9, labels=labels, **SUPERVISED)
    assert indices.tolist() == ranking[:9]
    assert (weights == 1).all()
    assert select_subset(strategy, gradients, 9, labels=labels, keep='lowest', **SUPERVISED)[0].tolist() == ranking[::-1][:9]
    assert select_subset(strategy, gradients, 9, labels=labels, skip=0.1, **SUPERVISED)[0].tolist() == ranking[4:13]
    assert select_subset(strategy, gradients, 38, labels=labels, skip=0.5, **SUPERVISED)[0].tolist() == ranking[2:]  # skips what it can
    by_class, _ = select_subset(strategy, gradients, 8, labels=labels)
    for label in range(4):
        assert by_class[labels[by_class] == label].tolist() == [i for i in ranking if labels[i] == label][:2]
    if strategy != 'grand':
        assert torch.equal(select_subset(strategy, gradients.without_embedding(), 9, labels=labels, **SUPERVISED)[0], indices)


def test_equal_scores_are_broken_at_random(make_gradients):
    gradients, _ = make_gradients(30, 3, 2)
    scores = torch.tensor([2.0] * 5 + [1.0] * 20 + [torch.inf] * 5)
    drawn = set()
    for seed in range(20):
        indices, _ = select_subset('forgetting', gradients, 14, scores=scores, seed=seed)
        assert set(indices[:5].tolist()) == set(range(25, 30))
        assert set(indices[5:10].tolist()) == set(range(5))
        drawn |= set(indices[10:].tolist())
    assert drawn == set(range(5, 25))


@pytest.mark.parametrize('strategy', ['margin', 'entropy', 'least-confidence'])
def test_refuses_to_read_probabilities_from_another_loss(make_gradients, strategy):
    gradients, labels = make_gradients(12, 3, 2)
    with pytest.raises(InputError, match=r'gradients\.error: is not softmax'):
        select_subset(strategy, LastLayerGradients(3 * gradients.error), 4, labels=labels)


@settings(max_examples=30)
@given(
    n=st.integers(1, 12),
    dim=st.integers(1, 4),
    budget=st.integers(1, 6),
    seed=st.integers(0, 99),
    features=st.sampled_from(['embedding', 'gradient']),
)
def test_herding_by_definition(make_gradients, n, dim, budget, seed, features):
    gradients, _ = make_gradients(n, 3, dim, seed)
    budget = min(budget, n)
    rows = (gradients.embedding if features == 'embedding' else gradients.dense()).double()
    indices, _ = select_subset('herding', gradients, budget, features=features)
    taken: list[int] = []
    for index in indices.tolist():
        distance = {i: (rows[[*taken, i]].mean(dim=0) - rows.mean(dim=0)).norm().item() for i in range(n) if i not in taken}
        assert distance[index] <= min(distance.values()) + 1e-5
        taken.append(index)


def test_herding_matches_the_mean_better_than_chance(make_gradients):
    gradients, _ = make_gradients(200, 3, 8)
    points, mean = gradients.embedding, gradients.embedding.mean(dim=0)
    chosen, _ = select_subset('herding', gradients, 20)
    by_chance = [(points[select_subset('random', gradients, 20, seed=seed)[0]].mean(dim=0) - mean).norm() for seed in range(10)]
    assert (points[chosen].mean(dim=0) - mean).norm() < 0.2 * min(by_chance)


def radius(rows, chosen):
    return torch.cdist(rows, rows[list(chosen)]).min(dim=1).values.max().item()


@settings(max_examples=30)
@given(
    n=st.integers(1, 9),
    dim=st.integers(1, 3),
    budget=st.integers(1, 4),
    seed=st.integers(0, 99),
    features=st.sampled_from(['embedding', 'gradient']),
)
def test_k_center_takes_the_farthest_and_stays_within_twice_the_best(make_gradients, n, dim, budget, seed, features):
    gradients, _ = make_gradients(n, 2, dim, seed)
    budget = min(budget, n)
    rows = (gradients.embedding if features == 'embedding' else gradients.dense()).double()
    chosen = select_subset('k-center', gradients, budget, features=features, seed=seed)[0].tolist()
    for step in range(1, budget):
        to_chosen = torch.cdist(rows, rows[chosen[:step]]).min(dim=1).values
        assert to_chosen[chosen[step]] >= to_chosen.max() - 1e-3
    best = min(radius(rows, subset) for subset in itertools.combinations(range(n), budget))
    assert radius(rows, chosen) <= 2 * best + 1e-3


def cosine(rows):
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (1 + unit @ unit.T) / 2


def graph_cut(similar, chosen, lam):
    return similar[chosen].sum() - lam * similar[chosen][:, chosen].sum()


@pytest.mark.parametrize('features', ['embedding', 'gradient'])
@pytest.mark.parametrize('lam', [0.4, 1.0])
def test_milo_stochastic_greedy_is_greedy_where_it_looks_at_all(make_gradients, features, lam):
    gradients, _ = make_gradients(30, 3, 5)
    similar = cosine((gradients.embedding if features == 'embedding' else gradients.dense()).double())
    # with a budget of 4, ln(100) 30 / 4 is more than there are
    chosen = select_subset('milo', gradients, 4, phase='stochastic-greedy', features=features, lam=lam)[0].tolist()
    for step, index in enumerate(chosen):
        values = {i: graph_cut(similar, [*chosen[:step], i], lam).item() for i in range(30) if i not in chosen[:step]}
        assert values[index] >= max(values.values()) - 1e-4


def test_milo_stochastic_greedy_varies_and_stays_good(make_gradients):
    gradients, labels = make_gradients(300, 3, 5)
    options = {'labels': labels, 'phase': 'stochastic-greedy'}
    subsets = [select_subset('milo', gradients, 60, seed=seed, **options)[0] for seed in range(4)]
    assert len({frozenset(subset.tolist()) for subset in subsets}) == 4
    for label in range(3):
        rows = (labels == label).nonzero()[:, 0]
        similar = cosine(gradients.embedding[rows].double())
        gain, chosen = similar.sum(dim=0) - 0.4, []
        for _ in range(20):
            values = (gain - 0.8 * similar[chosen].sum(dim=0)).index_fill(0, torch.tensor(chosen, dtype=torch.int64), -torch.inf)
            chosen.append(int(values.argmax()))
        for subset in subsets:
            mine = torch.searchsorted(rows, subset[labels[subset] == label])
            assert graph_cut(similar, mine, 0.4) >= 0.95 * graph_cut(similar, chosen, 0.4)


def test_milo_importance_is_the_distance_at_inclusion(make_gradients):
    gradients, labels = make_gradients(36, 3, 5)
    found = importance(gradients, labels)
    for label in range(3):
        rows = (labels == label).nonzero()[:, 0]
        distance = 1 - cosine(gradients.embedding[rows].double())
        gains = found[rows]
        first_two = gains.argsort(descending=True)[:2]
        torch.testing.assert_close(gains[first_two[0]], gains[first_two[1]])
        taken = [int(distance.sum(dim=0).argmin())]  # nearest to the mean
        while len(taken) < len(rows):
            nearest = distance[taken].min(dim=0).values.index_fill(0, torch.tensor(taken), -1.0)
            taken.append(int(nearest.argmax()))
            assert gains[taken[-1]].item() == pytest.approx(nearest.max().item(), abs=1e-5)
    gradient_wise = importance(gradients, labels, 'gradient')
    assert not torch.allclose(gradient_wise, found)
    assert ((gradient_wise >= 0) & (gradient_wise <= 1)).all()


def test_milo_draws_in_proportion_to_its_weights(make_gradients):
    """The first of a draw without replacement, and the inclusion of both of two, have known probabilities."""
    gradients, _ = make_gradients(4, 2, 2)
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0])
    weight = [1 + g + g * g / 2 for g in scores.tolist()]
    total, draws = sum(weight), 3000
    firsts, pairs = torch.zeros(4), torch.zeros(4)
    for seed in range(draws):
        chosen, _ = select_subset('milo', gradients, 2, scores=scores, seed=seed)
        firsts[chosen[0]] += 1
        pairs[chosen] += 1
    for i in range(4):
        first = weight[i] / total
        either = first + sum(weight[j] / total * weight[i] / (total - weight[j]) for j in range(4) if j != i)
        for count, probability in ((firsts[i], first), (pairs[i], either)):
            assert abs(count / draws - probability) < 5 * (probability * (1 - probability) / draws) ** 0.5


def test_milo_without_scores_takes_its_importance(make_gradients):
    gradients, labels = make_gradients(40, 2, 3)
    own, _ = select_subset('milo', gradients, 10, labels=labels, seed=3)
    same, _ = select_subset('milo', gradients, 10, labels=labels, seed=3, scores=importance(gradients, labels))
    assert torch.equal(own, same)


def test_farthest_first_ends_in_what_is_left_of_duplicates():
    points = LastLayerGradients(torch.tensor([[0.0], [0.0], [3.0], [0.0]]))
    order, distances = farthest_first(points, 4, 1)
    assert order[:2].tolist() == [1, 2]
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert distances.tolist() == [torch.inf, 9.0, 0.0, 0.0]
    assert unit_length(points).squared_norms().tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize('strategy', ['random', 'glister', 'craig', 'entropy'])
def test_equal_shares_of_the_classes(make_gradients, strategy):
    gradients, _ = make_gradients(40, 4, 3)
    labels = torch.tensor([0] * 20 + [1] * 15 + [2] * 4 + [3])
    gradients = LastLayerGradients(torch.softmax(gradients.error, dim=1) - torch.nn.functional.one_hot(labels, 4), gradients.embedding)
    indices, _ = select_subset(strategy, gradients, 17, labels=labels, class_balance='equal')
    assert torch.bincount(labels[indices]).tolist() == [6, 6, 4, 1]
    with pytest.raises(InputError, match='class_balance: expected selection_type=PerClass beside equal shares'):
        select_subset(strategy, gradients, 17, labels=labels, class_balance='equal', selection_type='Supervised')
    with pytest.raises(InputError, match='labels: missing'):
        select_subset(strategy, gradients, 17, class_balance='equal')


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0, 1))
def test_equal_shares_add_up_and_differ_by_one_where_the_class_goes(counts, share):
    budget = max(1, int(share * sum(counts)))
    shares = _equal_shares(counts, budget)
    assert sum(shares) == budget
    assert all(0 <= share <= count for share, count in zip(shares, counts, strict=True))
    open_ = [share for share, count in zip(shares, counts, strict=True) if share < count]
    assert not open_ or max(open_) - min(open_) <= 1
    assert not open_ or max(shares) <= max(open_) + 1


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'strategy': 'el2n', 'keep': 'best'}, "keep: expected 'highest' or 'lowest', got 'best'"),
        ({'strategy': 'el2n', 'skip': 1.0}, r'skip: expected a number in \[0, 1\), got 1.0'),
        ({'strategy': 'el2n', 'backend': 'cords'}, 'backend: expected torch for strategy el2n, got cords'),
        ({'strategy': 'selcon'}, 'backend: expected cords for strategy selcon, got torch'),
        ({'strategy': 'k-centre'}, 'did you mean .k-center.'),
        ({'strategy': 'herding', 'features': 'pixels'}, 'features: expected'),
        ({'strategy': 'milo', 'phase': 'first'}, 'phase: expected'),
        ({'strategy': 'forgetting'}, 'scores: missing'),
        ({'strategy': 'forgetting', 'scores': torch.zeros(11)}, r'scores: expected one number per sample, a tensor \[12\]'),
        ({'strategy': 'milo', 'scores': torch.full((12,), torch.nan)}, 'scores: .*without NaN'),
        ({'strategy': 'glister', 'class_balance': 'even'}, "class_balance: expected 'proportional' or 'equal', got 'even'"),
    ],
)
def test_bad_input(make_gradients, arguments, message):
    gradients, labels = make_gradients(12, 3, 2)
    with pytest.raises(InputError, match=message) as caught:
        select_subset(**{'gradients': gradients, 'budget': 4, 'labels': labels, **arguments})
    assert '\n' not in str(caught.value)
