"""What can go wrong, for every strategy on every backend that has it: the right answer, or one clear line."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

from composer_effalgos import InputError, SubsetSelection
from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.selection import select_subset
from composer_effalgos.subset_selection.strategies import STRATEGIES

SLOW = {('craig', 'cords'), ('facility-location', 'cords')}  # ten seconds each; graph-cut takes the same path through cords
CASES = [(name, backend) for name, strategy in STRATEGIES.items() for backend in strategy.backends if (name, backend) not in SLOW]
N, CLASSES = 24, 3


@pytest.fixture(params=CASES, ids=lambda case: '-'.join(case))
def pick(request, make_gradients):
    """``pick(budget, ...)`` selects with the strategy at hand and holds the answer against its contract."""
    strategy, backend = request.param
    if backend == 'cords':
        pytest.importorskip('cords')
    spec = STRATEGIES[strategy]
    gradients, labels = make_gradients(N, CLASSES, 4)

    def run(budget, gradients=gradients, labels=labels, **options):
        options = {'backend': backend, **options}
        if hasattr(spec.options, 'scores'):
            options['scores'] = torch.arange(len(gradients)) % 4
        if hasattr(spec.options, 'valid'):
            options['valid'] = 'val_gradients' in options
        if spec.targets:  # of a regression
            options['delta'] = 1e4
            gradients = LastLayerGradients(gradients.error[:, :1], gradients.embedding)
            if 'val_gradients' in options:
                val = options['val_gradients']
                options['val_gradients'] = LastLayerGradients(val.error[:, :1], val.embedding)
                options['val_labels'] = options['val_labels'].float()
            labels = labels.float()
        indices, weights = select_subset(strategy, gradients, budget, labels=labels, **options)
        assert len(indices) == len(indices.unique()) == len(weights) == budget
        assert 0 <= int(indices.min()) <= int(indices.max()) < len(gradients)
        assert (weights >= 0).all()
        assert weights.isfinite().all()
        return indices

    run.spec, run.gradients, run.labels = spec, gradients, labels
    run.by_class = spec.selection_types[0] == 'PerClass'
    return run


def test_a_budget_of_one_and_of_all(pick):
    if pick.spec.targets:
        with pytest.raises(InputError, match=r'^budget: expected at least 2 for selcon'):
            pick(1)
    else:
        pick(1)
    assert sorted(pick(N).tolist()) == list(range(N))


def test_a_class_of_one_sample(pick, make_gradients):
    labels = torch.tensor([0] * 12 + [1] * 11 + [2])
    error = torch.softmax(pick.gradients.error, dim=1) - nn.functional.one_hot(labels, CLASSES)
    indices = pick(6, LastLayerGradients(error, pick.gradients.embedding), labels)
    if pick.by_class:
        assert N - 1 in indices.tolist()
        assert torch.bincount(labels[indices]).tolist() == [3, 2, 1]


def test_a_class_missing_from_validation(pick):
    rows = (pick.labels != 1).nonzero()[:5, 0]
    pick(7, val_gradients=pick.gradients.take(rows), val_labels=pick.labels[rows])


def test_duplicate_samples(pick):
    first = torch.zeros(N, dtype=torch.int64)
    pick(9, pick.gradients.take(first), pick.labels[first])
    pairs = torch.arange(N) // 2
    pick(9, pick.gradients.take(pairs), pick.labels[pairs])


@pytest.mark.parametrize('nothing', ['error', 'embedding', 'both'])
def test_gradients_that_are_all_zero(pick, nothing):
    error = pick.gradients.error * (nothing == 'embedding')
    pick(9, LastLayerGradients(error, pick.gradients.embedding * (nothing == 'error')))


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite(pick, value):
    for part in ('error', 'embedding'):
        factors = {'error': pick.gradients.error.clone(), 'embedding': pick.gradients.embedding.clone()}
        factors[part][7, 0] = value
        with pytest.raises(InputError, match=rf'^gradients\.{part}: expected finite values, got another for sample 7'):
            pick(9, LastLayerGradients(**factors))


def test_labels_outside_the_range(pick):
    if pick.spec.targets:
        pytest.skip('a regression has no classes')
    for wrong in (-1, CLASSES):
        labels = pick.labels.clone()
        labels[4] = wrong
        with pytest.raises(InputError, match=r'^labels: expected 0 to 2, got '):
            pick(9, labels=labels)


@pytest.mark.parametrize(('strategy', 'backend'), [(name, strategy.backends[0]) for name, strategy in STRATEGIES.items()])
def test_no_linear_layer_in_training(make_trainer, strategy, backend):
    module = nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 3, 1), nn.Flatten())
    options = {'kappa': 0.5} if strategy == 'forgetting' else {'delta': 1.0} if strategy == 'selcon' else {}
    trainer = make_trainer([SubsetSelection(strategy, 0.3, backend=backend, **options)], module=module, max_duration='2ep')
    if strategy in ('random', 'adaptive-random', 'forgetting'):
        trainer.fit()
        return
    with pytest.raises(InputError, match='expected a linear layer'):
        trainer.fit()


@pytest.mark.parametrize('strategy', ['glister', 'gradmatch', 'craig', 'el2n', 'entropy', 'herding', 'milo'])
def test_no_linear_layer_but_bias_gradients(make_trainer, strategy):
    module = nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 3, 1), nn.Flatten())
    algorithm = SubsetSelection(strategy, 0.3, linear_layer=False, kappa=0.5)
    make_trainer([algorithm], module=module, max_duration='2ep').fit()
    assert len(algorithm.indices) == 61


@pytest.mark.parametrize('change', [lambda items: items * 2, lambda items: items[1:]], ids=['doubles', 'drops'])
def test_a_collate_function_that_changes_the_number_of_samples(make_trainer, problem, change):
    loader = DataLoader(problem, batch_size=16, collate_fn=lambda items: default_collate(change(items)))
    with pytest.raises(InputError, match=r'train_dataloader: expected 203 samples, got \d+; collate_fn or'):
        make_trainer([SubsetSelection('glister', 0.5)], train_loader=loader).fit()
