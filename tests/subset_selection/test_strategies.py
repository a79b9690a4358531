import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch.nn.functional import one_hot

from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.selection import _shares, check_options, select_subset
from composer_effalgos.subset_selection.strategies import STRATEGIES, kernels
from composer_effalgos.subset_selection.strategies.gradmatch import matching_pursuit
from composer_effalgos.utils.errors import InputError

CASES = [(name, kind) for name, strategy in STRATEGIES.items() if 'torch' in strategy.backends for kind in strategy.selection_types]
FUNCTIONS = ('facility-location', 'graph-cut', 'sum-redundancy', 'saturated-coverage')


@pytest.fixture(scope='module')
def has_cords():
    pytest.importorskip('cords')


def similarity(rows):
    distance = torch.cdist(rows, rows).square()
    return distance.max() - distance


def value(function, similar, chosen):
    """The set functions, written out as their definitions have them."""
    between = similar[chosen]
    if function == 'facility-location':
        return between.max(dim=0).values.sum()
    if function == 'graph-cut':
        return between.sum() - between[:, chosen].sum()
    if function == 'sum-redundancy':
        return -between[:, chosen].sum()
    return torch.minimum(between.sum(dim=0), 0.1 * similar.sum(dim=0)).sum()


def shortfall(function, similar, chosen):
    """The most that any step gained less than the best step open to it, trying every sample."""
    worst, before = 0.0, torch.tensor(0.0)
    for step, index in enumerate(chosen):
        prefix = chosen[:step]
        rest = [i for i in range(len(similar)) if i not in prefix]
        gains = {i: value(function, similar, [*prefix, i]) - before for i in rest}
        worst = max(worst, float(max(gains.values()) - gains[index]))
        before = before + gains[index]
    return worst


def residual(gradients, indices, weights, target, lam=0.0):
    rows = gradients.dense()[indices].double()
    return (rows.T @ weights.double() - target.double()).square().sum() + lam * weights.double().square().sum()


@settings(max_examples=60)
@given(
    case=st.sampled_from(CASES),
    n=st.integers(1, 30),
    share=st.floats(0, 1),
    classes=st.integers(1, 4),
    dim=st.none() | st.integers(1, 5),
    batch_size=st.integers(1, 9),
    greedy=st.sampled_from(['Naive', 'Stochastic', 'RGreedy']),
    optimizer=st.sampled_from(['lazy', 'naive', 'stochastic']),
    seed=st.integers(0, 99),
    shape=st.sampled_from(['random', 'duplicates', 'zero']),
    validation=st.booleans(),
)
def test_exact_budget_whatever_the_case(
    make_gradients, case, n, share, classes, dim, batch_size, greedy, optimizer, seed, shape, validation
):
    strategy, selection_type = case
    gradients, labels = make_gradients(n, classes, dim, seed)
    if shape == 'duplicates':
        gradients, labels = gradients.take(torch.arange(n) // 3), labels[torch.arange(n) // 3]
    elif shape == 'zero':
        gradients = LastLayerGradients(torch.zeros_like(gradients.error), gradients.embedding)
    options = {'greedy': greedy, 'optimizer': optimizer}
    options = {name: choice for name, choice in options.items() if hasattr(STRATEGIES[strategy].options, name)}
    if hasattr(STRATEGIES[strategy].options, 'scores'):
        options['scores'] = torch.arange(n) % 5
    if validation:  # one class alone: the others are missing
        options['val_gradients'], options['val_labels'] = gradients.take(labels == labels[0]), labels[labels == labels[0]]
        if hasattr(STRATEGIES[strategy].options, 'valid'):
            options['valid'] = True
    budget = max(1, int(share * n))
    arguments = {'labels': labels, 'selection_type': selection_type, 'batch_size': batch_size, 'seed': seed, **options}
    indices, weights = select_subset(strategy, gradients, budget, **arguments)
    assert indices.shape == weights.shape == (budget,)
    assert len(indices.unique()) == budget
    assert indices.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert indices.min() >= 0
    assert indices.max() < n
    assert weights.min() >= 0
    assert weights.isfinite().all()
    again = select_subset(strategy, gradients, budget, **arguments)
    assert torch.equal(again[0], indices)
    assert torch.equal(again[1], weights)


def taylor_greedy(gradients, labels, eta, budget, validation, validation_labels):
    """GLISTER's naive greedy with dense gradients and a validation loss that is differentiated at every step."""
    rows, classes = gradients.dense(), gradients.error.shape[1]
    onehot = one_hot(validation_labels, classes)
    logits = (validation.error + onehot).log()
    chosen: list[int] = []
    step = torch.zeros(rows.shape[1])
    for _ in range(budget):
        moved = logits - eta * (step[:classes] + validation.embedding @ step[classes:].view(classes, -1).T)
        gains = rows @ LastLayerGradients(torch.softmax(moved, dim=1) - onehot, validation.embedding).mean()
        gains[chosen] = -torch.inf
        chosen.append(int(gains.argmax()))
        step += rows[chosen[-1]]
    return chosen


@pytest.mark.parametrize('eta', [0.0, 0.05, 1.0])
def test_glister_equals_greedy_by_definition(make_gradients, eta):
    gradients, labels = make_gradients(40, 4, 5)
    validation, validation_labels = make_gradients(21, 4, 5, seed=1)
    options = {'val_gradients': validation, 'val_labels': validation_labels, 'eta': eta, 'labels': labels, 'selection_type': 'Supervised'}
    expected = taylor_greedy(gradients, labels, eta, 15, validation, validation_labels)
    assert select_subset('glister', gradients, 15, greedy='Naive', **options)[0].tolist() == expected
    # A random sample that holds everything is no sample: with a budget of 4 stochastic greedy looks at all.
    assert select_subset('glister', gradients, 4, greedy='Stochastic', **options)[0].tolist() == expected[:4]
    by_class, weights = select_subset('glister', gradients, 12, greedy='Naive', **{**options, 'selection_type': 'PerClass'})
    for label in range(4):
        rows, validation_rows = (labels == label).nonzero()[:, 0], validation_labels == label
        own = taylor_greedy(
            gradients.take(rows), labels[rows], eta, 3, validation.take(validation_rows), validation_labels[validation_rows]
        )
        assert by_class[labels[by_class] == label].tolist() == rows[own].tolist()
    assert (weights == 1).all()


@pytest.mark.usefixtures('has_cords')
@pytest.mark.parametrize('selection_type', ['PerClass', 'PerBatch', 'Supervised'])
@pytest.mark.parametrize('greedy', ['Naive', 'RGreedy'])
def test_glister_equals_cords(make_gradients, selection_type, greedy):
    gradients, labels = make_gradients(96, 3, 8)
    validation, validation_labels = make_gradients(48, 3, 8, seed=1)
    options = {'val_gradients': validation, 'val_labels': validation_labels, 'labels': labels, 'batch_size': 8, 'eta': 0.1, 'r': 7}
    ours, theirs = (
        select_subset('glister', gradients, 32, backend=backend, selection_type=selection_type, greedy=greedy, **options)[0]
        for backend in ('torch', 'cords')
    )
    assert ours.tolist() == theirs.tolist()


@settings(max_examples=30)
@given(
    n=st.integers(1, 20), classes=st.integers(1, 3), dim=st.integers(1, 8), lam=st.sampled_from([0.0, 0.5, 5.0]), seed=st.integers(0, 999)
)
def test_gradmatch_without_a_limit_is_non_negative_least_squares(make_gradients, n, classes, dim, lam, seed):
    gradients, _ = make_gradients(n, classes, dim, seed)
    validation, _ = make_gradients(7, classes, dim, seed + 1)
    target = validation.sum()
    indices, weights = matching_pursuit(
        gradients.dot(target),
        gradients.squared_norms(),
        lambda item: gradients.take(item).gram(gradients)[0],
        float(target.square().sum()),
        n,
        lam=lam,
        eps=0,
    )
    rows = np.vstack([gradients.dense().T.double().numpy(), lam**0.5 * np.eye(n)])
    best, _ = nnls(rows, np.concatenate([target.double().numpy(), np.zeros(n)]))
    optimum = residual(gradients, torch.arange(n), torch.from_numpy(best), target, lam)
    assert len(indices.unique()) == len(indices) <= n
    assert (weights > 0).all()
    assert optimum - 1e-6 <= residual(gradients, indices, weights, target, lam) <= optimum + 1e-4 * target.square().sum()


@pytest.mark.usefixtures('has_cords')
@pytest.mark.parametrize('selection_type', ['PerClass', 'PerBatch', 'PerClassPerGradient', 'Supervised'])
@pytest.mark.parametrize('lam', [0.0, 0.5])
def test_gradmatch_matches_no_worse_than_cords(make_gradients, selection_type, lam):
    for seed in range(3):
        gradients, labels = make_gradients(120, 3, 12, seed)
        errors = []
        for backend in ('torch', 'cords'):
            indices, weights = select_subset(
                'gradmatch', gradients, 24, labels=labels, backend=backend, selection_type=selection_type, batch_size=8, lam=lam, eps=0
            )
            if selection_type == 'PerBatch':
                target = torch.stack([gradients.take(rows).mean() for rows in torch.arange(120).split(8)]).sum(dim=0)
                errors.append(residual(gradients, indices, weights / 8, target, 8 * lam))
                continue
            total = 0.0
            for label in range(3) if selection_type != 'Supervised' else [None]:
                mine = torch.ones_like(indices, dtype=torch.bool) if label is None else labels[indices] == label
                part = gradients
                if selection_type == 'PerClassPerGradient':
                    part = LastLayerGradients(gradients.error[:, label : label + 1], gradients.embedding)
                target = part.sum() if label is None else part.take(labels == label).sum()
                total += residual(part, indices[mine], weights[mine], target, lam)
            errors.append(total)
        assert errors[0] <= 1.001 * errors[1]


def test_gradmatch_with_one_sample_takes_the_best_aligned(make_gradients):
    gradients, _ = make_gradients(30, 3, 5)
    rows, target = gradients.dense(), gradients.sum()
    indices, weights = select_subset('gradmatch', gradients, 1, selection_type='Supervised', lam=0.0)
    assert int(indices) == int((rows @ target).argmax())
    torch.testing.assert_close(weights[0], rows[indices[0]] @ target / rows[indices[0]].square().sum())


@settings(max_examples=40)
@given(function=st.sampled_from(FUNCTIONS), n=st.integers(2, 14), budget=st.integers(1, 8), seed=st.integers(0, 999), dim=st.integers(1, 4))
def test_submodular_greedy_by_definition(make_gradients, function, n, budget, seed, dim):
    gradients, _ = make_gradients(n, 2, dim, seed)
    gradients, budget = LastLayerGradients(gradients.error.double(), gradients.embedding.double()), min(budget, n)
    similar = similarity(gradients.dense())
    indices, weights = select_subset(function, gradients, budget)
    assert shortfall(function, similar, indices.tolist()) <= 1e-5 * similar.sum()
    assert weights.sum() == n
    nearest = similar[indices].max(dim=0).values
    for position, index in enumerate(indices):  # a cluster holds no one who is nearer to another
        assert weights[position] <= (similar[index] >= nearest - 1e-4).sum()


@pytest.mark.parametrize('function', ['facility-location', 'saturated-coverage'])
def test_monotone_functions_keep_the_greedy_guarantee(make_gradients, function):
    gradients, _ = make_gradients(12, 2, 3)
    similar = similarity(gradients.dense())
    best = max(value(function, similar, list(subset)) for subset in itertools.combinations(range(12), 3))
    assert value(function, similar, select_subset(function, gradients, 3)[0]) >= (1 - np.exp(-1)) * best
    one = max(value(function, similar, [i]) for i in range(12))
    torch.testing.assert_close(value(function, similar, select_subset(function, gradients, 1)[0]), one)


@pytest.mark.usefixtures('has_cords')
@pytest.mark.parametrize(('strategy', 'selection_type'), [case for case in CASES if case[0] in (*FUNCTIONS, 'craig')])
def test_kernel_strategies_are_no_worse_than_cords(make_gradients, strategy, selection_type):
    gradients, labels = make_gradients(60, 3, 6)
    rows = gradients.dense().double()
    values = []
    for backend in ('torch', 'cords'):
        indices, weights = select_subset(
            strategy, gradients, 15, labels=labels, backend=backend, selection_type=selection_type, batch_size=5
        )
        if selection_type == 'PerBatch':
            values.append(value('facility-location', similarity(rows.view(12, 5, -1).mean(dim=1)), (indices // 5).unique()))
        elif strategy == 'craig' and selection_type == 'Supervised':
            values.append(value('facility-location', similarity(rows), indices))
        else:
            function = 'facility-location' if strategy == 'craig' else strategy
            total = 0.0
            for label in range(3):
                of_class = (labels == label).nonzero()[:, 0]
                chosen = torch.searchsorted(of_class, indices[labels[indices] == label])
                if len(chosen):
                    total += value(function, similarity(rows[of_class]), chosen)
            values.append(total)
            assert weights.sum() == 60
    assert values[0] >= values[1] - 0.001 * abs(values[1])


@pytest.mark.parametrize('strategy', ['craig', *FUNCTIONS])
def test_kernels_in_blocks_give_the_same(make_gradients, strategy, monkeypatch):
    gradients, labels = make_gradients(90, 3, 6)
    whole = select_subset(strategy, gradients, 12, labels=labels)
    monkeypatch.setattr(kernels, 'KERNEL_BYTES', 0)
    monkeypatch.setattr(kernels, 'BLOCK_BYTES', 4 * 30 * 4)
    blocked = select_subset(strategy, gradients, 12, labels=labels)
    assert torch.equal(blocked[0], whole[0])
    assert torch.equal(blocked[1], whole[1])


def test_batch_mean_gram_in_blocks(make_gradients, monkeypatch):
    for dim in (None, 4):
        gradients, _ = make_gradients(23, 5, dim)
        means = torch.stack([gradients.take(rows).mean() for rows in torch.arange(23).split(4)])
        torch.testing.assert_close(kernels.batch_mean_gram(gradients, 4), means @ means.T)
        monkeypatch.setattr(kernels, 'BLOCK_BYTES', 1)
        torch.testing.assert_close(kernels.batch_mean_gram(gradients, 4), means @ means.T)


def taylor_fall(gradients, labels, chosen, eta, validation, validation_labels):
    """GLISTER's objective: the fall of the validation loss in first order, summed over the picks, the gradient taken anew at each."""
    rows, onehot = gradients.dense().double(), one_hot(validation_labels, gradients.error.shape[1])
    logits, step, total = (validation.error + onehot).double().log(), torch.zeros(rows.shape[1], dtype=torch.float64), 0.0
    classes, embedding = gradients.error.shape[1], validation.embedding.double()
    for index in chosen:
        moved = logits - eta * (step[:classes] + embedding @ step[classes:].view(classes, -1).T)
        gradient = LastLayerGradients(torch.softmax(moved, dim=1) - onehot, embedding).mean()
        total += float(rows[index] @ gradient)
        step += rows[index]
    return total


@pytest.mark.usefixtures('has_cords')
@pytest.mark.parametrize('greedy', ['Stochastic', 'RGreedy', 'Naive'])
def test_glister_gains_no_less_than_cords(make_gradients, greedy):
    falls: dict[str, list[float]] = {'torch': [], 'cords': []}
    for seed in range(4):
        gradients, labels = make_gradients(150, 3, 6, seed)
        validation, validation_labels = make_gradients(45, 3, 6, seed + 50)
        options = {'val_gradients': validation, 'val_labels': validation_labels, 'labels': labels, 'eta': 0.05, 'seed': seed}
        for backend, found in falls.items():
            indices, _ = select_subset(
                'glister', gradients, 30, backend=backend, greedy=greedy, r=10, selection_type='Supervised', **options
            )
            found.append(taylor_fall(gradients, labels, indices.tolist(), 0.05, validation, validation_labels))
    ours, theirs = (np.array(falls[backend]) for backend in ('torch', 'cords'))
    if greedy != 'Stochastic':  # where each looks at random candidates of its own, on average alone
        assert (ours >= 0.999 * theirs).all()
    assert ours.mean() >= 0.999 * theirs.mean()


def test_tiny_cases_by_brute_force(make_gradients):
    """Where greedy is exact: GLISTER whose gradient stays, GradMatch on gradients at right angles, facility location of one."""
    gradients, labels = make_gradients(9, 3, 2)
    gains = gradients.dot(gradients.mean())
    for budget in (1, 3, 8):
        best = max(itertools.combinations(range(9), budget), key=lambda subset: gains[list(subset)].sum())
        indices, _ = select_subset('glister', gradients, budget, labels=labels, eta=0.0, greedy='Naive', selection_type='Supervised')
        assert sorted(indices.tolist()) == list(best)
    orthogonal = LastLayerGradients(torch.diag(torch.tensor([3.0, 1.0, 4.0, 1.5, 2.0, 0.5])))
    target = orthogonal.sum()
    for budget in (1, 2, 4):

        def least(subset):
            rows = orthogonal.error[list(subset)].T.numpy()
            return nnls(rows, target.numpy())[1]

        best = min(itertools.combinations(range(6), budget), key=least)
        indices, weights = select_subset('gradmatch', orthogonal, budget, lam=0.0, eps=0.0, selection_type='Supervised')
        assert sorted(indices.tolist()) == list(best)
        assert float(residual(orthogonal, indices, weights, target)) ** 0.5 == pytest.approx(least(best), rel=1e-4)


def test_stochastic_greedy_comes_close(make_gradients):
    gradients, _ = make_gradients(200, 3, 6)
    similar = similarity(gradients.dense())
    lazy, stochastic = (
        value('facility-location', similar, select_subset('craig', gradients, 20, optimizer=optimizer)[0])
        for optimizer in ('lazy', 'stochastic')
    )
    assert stochastic > 0.98 * lazy
    assert not torch.equal(*(select_subset('craig', gradients, 20, optimizer='stochastic', seed=seed)[0] for seed in (1, 2)))


@pytest.mark.parametrize(('strategy', 'selection_type'), CASES)
def test_never_writes_the_gradients_out_and_leaves_the_generators_alone(make_gradients, strategy, selection_type, monkeypatch):
    gradients, labels = make_gradients(50, 3, 6)
    monkeypatch.setattr(LastLayerGradients, 'dense', lambda self: pytest.fail('the N x C(D + 1) matrix was built'))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    scores = {'scores': torch.arange(50)} if strategy == 'forgetting' else {}
    select_subset(strategy, gradients, 10, labels=labels, selection_type=selection_type, batch_size=4, **scores)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])


def test_bias_gradients_alone(make_gradients):
    gradients, labels = make_gradients(40, 3, 6)
    for strategy in ('glister', 'gradmatch', 'craig'):
        ours = select_subset(strategy, gradients, 8, labels=labels, linear_layer=False)
        bias = select_subset(strategy, gradients.without_embedding(), 8, labels=labels)
        assert torch.equal(ours[0], bias[0])
        assert torch.equal(ours[1], bias[1])


def test_if_convex_compares_embeddings(make_gradients):
    gradients, labels = make_gradients(40, 3, 6)
    ours = select_subset('craig', gradients, 8, labels=labels, if_convex=True)
    features = select_subset('craig', LastLayerGradients(gradients.embedding), 8, labels=labels, num_classes=3)
    assert torch.equal(ours[0], features[0])


def test_random_draws_uniformly_and_anew_with_another_seed(make_gradients):
    gradients, labels = make_gradients(10, 2, 2)
    counts = torch.zeros(10)
    for seed in range(500):
        indices, weights = select_subset('adaptive-random', gradients, 4, seed=seed)
        counts[indices] += 1
        assert (weights == 1).all()
    assert (counts - 200).abs().max() < 5 * (500 * 0.4 * 0.6) ** 0.5
    stratified, _ = select_subset('random', gradients, 4, labels=labels, selection_type='PerClass')
    assert torch.bincount(labels[stratified]).tolist() == [2, 2]
    generator = torch.Generator().manual_seed(7)
    first, second = (select_subset('random', gradients, 4, generator=generator)[0] for _ in range(2))
    assert first.tolist() != second.tolist()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0, 1))
def test_shares_add_up_and_follow_the_classes(counts, share):
    budget = max(1, int(share * sum(counts)))
    shares = _shares(counts, budget)
    assert sum(shares) == budget
    assert all(0 <= share <= count for share, count in zip(shares, counts, strict=True))
    if budget >= len(counts):
        assert min(shares) >= 1
    if all(budget * count >= sum(counts) for count in counts):
        assert all(abs(share - budget * count / sum(counts)) < 1 for share, count in zip(shares, counts, strict=True))


def test_a_class_of_one_and_a_class_without_validation(make_gradients):
    gradients, _ = make_gradients(30, 4, 3)
    labels = torch.tensor([0] * 15 + [1] * 14 + [3])
    validation, _ = make_gradients(8, 4, 3, seed=2)
    for strategy in ('glister', 'gradmatch', 'craig', 'graph-cut'):
        indices, _ = select_subset(strategy, gradients, 6, labels=labels, val_gradients=validation, val_labels=torch.tensor([0, 2] * 4))
        assert 29 in indices.tolist()
        assert torch.bincount(labels[indices]).tolist() == [3, 2, 0, 1]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'strategy': 'glistr'}, 'strategy: expected a strategy of backend torch, got .glistr.; did you mean .glister.'),
        ({'strategy': 'best'}, r'strategy: expected .*, got .best.; known: (?!.*(fixedweight|adapweights|selcon)).*glister'),
        ({'strategy': 'best', 'backend': 'cords'}, 'known: (?!.*(el2n|milo)).*glister.*selcon'),
        ({'strategy': 'selcon'}, 'backend: expected cords for strategy selcon, got torch'),
        ({'backend': 'numpy'}, 'backend'),
        ({'budget': 0}, 'budget: expected a whole number of samples from 1 to 12, got 0'),
        ({'budget': 13}, 'budget: expected .*, got 13'),
        ({'budget': 2.5}, 'budget'),
        ({'budget': True}, 'budget'),
        ({'etta': 1.0}, 'etta: unknown option of strategy glister; did you mean .eta.'),
        ({'optimizer': 'lazy'}, 'optimizer: unknown option of strategy glister'),
        ({'eta': -1.0}, 'eta'),
        ({'eta': 'fast'}, 'eta'),
        ({'eta': 1e300}, r'eta: expected a number in \[0, 1e\+12\], got 1e\+300'),
        ({'strategy': 'gradmatch', 'eps': 1e300}, 'eps: expected'),
        ({'strategy': 'gradmatch', 'lam': 1e300}, 'lam: expected'),
        ({'r': 0}, 'r: expected a whole number at least 1, got 0'),
        ({'r': 2.0}, 'r: expected a whole number at least 1, got 2.0'),
        ({'greedy': 'naive'}, 'did you mean .Naive.'),
        ({'selection_type': 'perclass'}, 'did you mean .PerClass.'),
        ({'selection_type': 'PerClassPerGradient'}, 'selection_type'),
        ({'selection_type': 'PerBatch'}, 'batch_size: missing'),
        ({'strategy': 'craig', 'optimizer': 'two-stage'}, 'optimizer'),
        ({'strategy': 'gradmatch', 'valid': True}, 'val_gradients: missing'),
        ({'strategy': 'gradmatch', 'lam': float('nan')}, 'lam'),
        ({'strategy': 'gradmatch', 'v1': 1}, 'v1'),
        ({'labels': None, 'selection_type': 'PerClass'}, 'labels: missing'),
        ({'labels': torch.zeros(11, dtype=torch.int64)}, 'labels: expected class indices'),
        ({'labels': torch.zeros(12)}, 'labels: expected class indices'),
        ({'labels': torch.full((12,), 3)}, 'labels: expected 0 to 2, got 3 to 3'),
        ({'labels': torch.full((12,), -1)}, 'labels: expected 0 to 2, got -1'),
        ({'seed': -1}, 'seed'),
        ({'seed': 1, 'generator': torch.Generator()}, 'generator'),
        ({'gradients': torch.zeros(12, 3)}, 'gradients: expected LastLayerGradients, got Tensor'),
        ({'val_gradients': LastLayerGradients(torch.zeros(4, 3))}, 'val_gradients: expected .*, got 4 of 3 numbers'),
        ({'linear_layer': False, 'val_gradients': LastLayerGradients(torch.zeros(4, 3))}, 'val_labels: missing'),
    ],
)
def test_bad_input(make_gradients, arguments, message):
    gradients, labels = make_gradients(12, 3, 2)
    call = {'strategy': 'glister', 'gradients': gradients, 'budget': 4, 'labels': labels, **arguments}
    with pytest.raises(InputError, match=message) as caught:
        select_subset(**call)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
def test_gradients_that_are_not_finite(make_gradients, bad):
    gradients, labels = make_gradients(12, 3, 2)
    error, embedding = gradients.error.clone(), gradients.embedding.clone()
    error[7, 1] = bad
    with pytest.raises(InputError, match=r'gradients\.error: expected .* sample 7'):
        select_subset('glister', LastLayerGradients(error, embedding), 4, labels=labels)
    embedding[5, 0] = bad
    broken = LastLayerGradients(gradients.error, embedding)
    with pytest.raises(InputError, match=r'val_gradients\.embedding: expected .* sample 5'):
        select_subset('glister', gradients, 4, labels=labels, val_gradients=broken, val_labels=labels)


@pytest.mark.gpu
@pytest.mark.parametrize(('strategy', 'selection_type'), CASES)
def test_the_device_makes_no_difference(make_gradients, strategy, selection_type):
    gradients, labels = make_gradients(80, 4, 6)
    options = {'selection_type': selection_type, 'batch_size': 8}
    if strategy == 'forgetting':
        options['scores'] = torch.arange(80) % 7
    indices, weights = select_subset(strategy, gradients, 20, labels=labels, **options)
    on_device = select_subset(strategy, gradients.to('cuda'), 20, labels=labels.to('cuda'), **options)
    assert on_device[0].is_cuda
    assert on_device[1].is_cuda
    assert torch.equal(on_device[0].cpu(), indices)
    torch.testing.assert_close(on_device[1].cpu(), weights, rtol=1e-3, atol=1e-3)


def test_gradmatch_gives_a_class_without_validation_samples_the_weight_of_the_others():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    errors = torch.randn(400, 4, generator=generator) * 0.05 + torch.eye(4)[labels]
    gradients = LastLayerGradients(errors, torch.randn(400, 6, generator=generator).abs())
    held_out = (labels < 3).nonzero()[:, 0][:30]
    indices, weights = select_subset(
        'gradmatch', gradients, 40, labels=labels, valid=True, val_gradients=gradients.take(held_out), val_labels=labels[held_out]
    )
    by_class = torch.zeros(4).index_add_(0, labels[indices], weights)
    assert by_class.max() < 2 * by_class.min()


def test_check_options_fills_in_the_defaults():
    settings_ = check_options('gradmatch', valid=True)
    assert settings_.lam == 0.5
    assert settings_.valid is True
    assert settings_.selection_type is None
