import random
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_effalgos.errors import InputError
from composer_effalgos.subset_selection import cords_backend
from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.strategies import STRATEGIES, select_subset

pytest.importorskip('cords')

CASES = [(name, kind, 13) for name, strategy in STRATEGIES.items() for kind in strategy.selection_types]
EXTREMES = [(name, kind, budget) for name, kind in (('glister', 'PerClass'), ('gradmatch', 'PerBatch')) for budget in (1, 40)]


@pytest.mark.parametrize(('strategy', 'selection_type', 'budget'), [*CASES, *EXTREMES])
def test_gives_exactly_the_budget(make_gradients, strategy, selection_type, budget):
    gradients, labels = make_gradients(40, 3, 4)
    options = {'selection_type': selection_type, 'batch_size': 6}
    indices, weights = select_subset(strategy, gradients, budget, labels=labels, backend='cords', **options)
    assert len(indices) == len(indices.unique()) == len(weights) == budget
    assert indices.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert weights.min() >= 0
    assert 0 <= indices.min() <= indices.max() < 40
    again, _ = select_subset(strategy, gradients, budget, labels=labels, backend='cords', **options)
    assert torch.equal(again, indices)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(2, 20),
    share=st.floats(0, 1),
    greedy=st.sampled_from(['Naive', 'Stochastic', 'RGreedy']),
    kind=st.sampled_from(['PerClass', 'PerBatch', 'Supervised']),
    r=st.integers(1, 30),
    duplicates=st.booleans(),
)
def test_glister_never_hangs_and_keeps_the_budget(make_gradients, n, share, greedy, kind, r, duplicates):
    gradients, labels = make_gradients(n, 3, 2)
    if duplicates:
        gradients = gradients.take(torch.zeros(n, dtype=torch.int64))
    budget = max(1, int(share * n))
    indices, _ = select_subset(
        'glister', gradients, budget, labels=labels, backend='cords', selection_type=kind, greedy=greedy, r=r, batch_size=4
    )
    assert len(indices.unique()) == budget


def taylor_greedy(gradients, labels, eta, budget):
    """GLISTER's naive greedy written out with dense gradients and a validation loss that is differentiated at every step."""
    rows, classes = gradients.dense(), gradients.error.shape[1]
    onehot = torch.nn.functional.one_hot(labels, classes)
    logits = (gradients.error + onehot).log()
    chosen = []
    step = torch.zeros(rows.shape[1])
    for _ in range(budget):
        moved = logits - eta * (step[:classes] + gradients.embedding @ step[classes:].view(classes, -1).T)
        now = LastLayerGradients(torch.softmax(moved, dim=1) - onehot, gradients.embedding).mean()
        gains = rows @ now
        gains[chosen] = -torch.inf
        chosen.append(int(gains.argmax()))
        step += rows[chosen[-1]]
    return chosen


def test_glister_differentiates_the_true_validation_loss(make_gradients):
    gradients, labels = make_gradients(30, 4, 5)
    for eta in (0.0, 0.05, 1.0):
        indices, weights = select_subset(
            'glister', gradients, 12, labels=labels, backend='cords', selection_type='Supervised', greedy='Naive', eta=eta
        )
        assert indices.tolist() == taylor_greedy(gradients, labels, eta, 12)
        assert (weights == 1).all()


def test_glister_on_another_loss_keeps_its_validation_gradient(make_gradients):
    gradients, labels = make_gradients(30, 4, 5)
    other = LastLayerGradients(gradients.error * 3 + 0.1, gradients.embedding)
    indices, _ = select_subset('glister', other, 9, labels=labels, backend='cords', selection_type='Supervised', greedy='Naive')
    gains = other.dot(other.mean())
    assert sorted(indices.tolist()) == sorted(gains.topk(9).indices.tolist())


def test_craig_takes_the_greedy_medoids_and_counts_their_clusters(make_gradients):
    gradients, labels = make_gradients(25, 2, 3)
    indices, weights = select_subset('craig', gradients, 8, labels=labels, backend='cords')
    for label in (0, 1):
        rows = (labels == label).nonzero()[:, 0]
        distance = torch.cdist(gradients.dense()[rows], gradients.dense()[rows]).square()
        budget = int((labels[indices] == label).sum())
        nearest = distance.new_full((len(rows),), float(distance.max()))
        for _ in range(budget):
            value = torch.minimum(nearest[:, None], distance).sum(dim=0)
            nearest = torch.minimum(nearest, distance[:, value.argmin()])
        mine = labels[indices] == label
        chosen = torch.searchsorted(rows, indices[mine])
        # The value of the greedy set; the set itself is not unique where samples tie.
        torch.testing.assert_close(distance[:, chosen].min(dim=1).values.sum(), nearest.sum())
        sizes = torch.bincount(distance[:, chosen].argmin(dim=1), minlength=budget)
        assert weights[mine].tolist() == sizes.tolist()


def test_gradmatch_weights_reduce_the_residual(make_gradients):
    gradients, labels = make_gradients(60, 3, 6)
    indices, weights = select_subset('gradmatch', gradients, 15, labels=labels, backend='cords', selection_type='Supervised', lam=0.0)
    residual = gradients.dense()[indices].T @ weights - gradients.sum()
    random_indices, random_weights = select_subset('random', gradients, 15, seed=1)
    by_chance = gradients.dense()[random_indices].T @ random_weights * 4 - gradients.sum()
    assert residual.norm() < 0.5 * by_chance.norm()


def test_leaves_nothing_behind(make_gradients):
    gradients, labels = make_gradients(30, 3, 4)
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), np.geterr()
    for strategy in ('glister', 'gradmatch', 'graph-cut'):
        select_subset(strategy, gradients, 8, labels=labels, backend='cords')
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    assert np.geterr() == states[3]
    assert not any(name.startswith('cords.selectionstrategies') for name in sys.modules)
    assert torch.is_grad_enabled()


def test_missing_package_names_the_command(make_gradients, monkeypatch):
    cords_backend._cords_modules.cache_clear()
    monkeypatch.setattr(cords_backend.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match=re.escape('pip install --no-deps cords==0.0.4')) as caught:
        select_subset('glister', make_gradients(9, 3, 2)[0], 3, backend='cords')
    assert '\n' not in str(caught.value)
