import pytest
import torch
from composer.algorithms import EMA
from composer.core import Callback, get_precision_context
from composer.optim import LinearScheduler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import InfoBatch, InputError, SubsetSelection
from composer_effalgos import functional as ef
from composer_effalgos.plan import EpochPlanner, stream_seed
from composer_effalgos.subset_selection import last_layer_gradients


class Subsets(Callback):
    """What each epoch could train on and did train on."""

    def __init__(self):
        self.candidates, self.trained, self.weights, self.metrics = [], [], [], []

    def epoch_end(self, state, logger):
        plan = EpochPlanner.of(state)
        self.candidates.append(plan.selectors.candidates)
        self.trained.append(plan.loader.plan.order.sort().values)
        self.weights.append(plan.loader.plan.weights)
        self.metrics.append(plan.loader.metrics)


@pytest.fixture
def fit(make_trainer):
    def run(*algorithms, **kwargs) -> Subsets:
        subsets = Subsets()
        trainer = make_trainer(algorithms, callbacks=[subsets], **kwargs)
        trainer.fit()
        subsets.trainer = trainer
        return subsets

    return run


@pytest.mark.parametrize('backend', ['torch', 'cords'])
@pytest.mark.parametrize(
    'strategy',
    [
        'glister',
        'gradmatch',
        'craig',
        'facility-location',
        'graph-cut',
        'sum-redundancy',
        'saturated-coverage',
        'random',
        'adaptive-random',
    ],
)
def test_every_strategy_trains_on_exactly_the_budget(fit, strategy, backend):
    algorithm = SubsetSelection(strategy, 0.3, '2ep', backend=backend)
    subsets = fit(algorithm, max_duration='3ep')
    assert [len(set(t.tolist())) for t in subsets.trained] == [61] * 3
    assert torch.equal(subsets.trained[0], subsets.trained[1])
    assert torch.equal(subsets.trained[1], subsets.trained[2]) == (strategy == 'random')
    assert algorithm.weights.mean().item() == pytest.approx(1, rel=1e-5)
    assert (algorithm.weights >= 0).all()
    assert [metrics.selection_seconds > 0 for metrics in subsets.metrics] == [True, False, strategy != 'random']
    if strategy in ('glister', 'random', 'adaptive-random'):
        assert subsets.weights[0] is None
    assert sum(sum(sizes) for sizes in subsets.trainer.recorder.sizes) == 3 * 61


def test_selects_by_the_gradients_of_the_model_as_it_is(make_trainer, problem):
    """The subset is what ``ef.select_subset`` picks from gradients computed by hand, in the run's precision, at every selection."""
    algorithm = SubsetSelection('gradmatch', 0.25, '1ep')
    trainer = make_trainer([algorithm], max_duration='2ep')
    picked = []

    class Check(Callback):
        def epoch_start(self, state, logger):
            batches = DataLoader(problem, batch_size=50)
            with get_precision_context(state.precision):
                gradients, labels = last_layer_gradients(
                    state.model, batches, lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1], reduction='none')
                )
            generator = torch.Generator().manual_seed(stream_seed(state.rank_zero_seed, 11, int(state.timestamp.epoch)))
            indices, _ = ef.select_subset('gradmatch', gradients, 51, labels=labels, generator=generator)
            picked.append((set(indices.tolist()), set(algorithm.indices.tolist())))
            assert state.model.training

    trainer.state.callbacks.append(Check())
    trainer.fit()
    for expected, found in picked:
        assert len(expected & found) >= 0.95 * 51  # batches of another size: the last bits of the gradients differ


def test_warm_start_trains_on_everything_first(fit):
    subsets = fit(SubsetSelection('glister', 0.3, '2ep', kappa=0.4), max_duration='5ep')
    assert [len(t) for t in subsets.trained] == [203, 203, 61, 61, 61]
    assert [metrics.selection_seconds > 0 for metrics in subsets.metrics] == [False, False, True, False, True]


def test_weights_multiply_with_infobatch(fit):
    subset, infobatch = SubsetSelection('gradmatch', 0.5, '10ep'), InfoBatch(0.5, delta=1.0)
    subsets = fit(subset, infobatch, max_duration='3ep')
    for trained, weights in list(zip(subsets.trained, subsets.weights, strict=True))[1:]:
        assert set(trained.tolist()) < set(subset.indices.tolist())
        assert weights.max() > 1
    plan = EpochPlanner.of(subsets.trainer.state).loader.plan
    by_index = dict(zip(subset.indices.tolist(), subset.weights.tolist(), strict=True))
    factors = torch.tensor(
        [w / by_index[i] if by_index[i] else 1.0 for i, w in zip(plan.order.tolist(), plan.weights.tolist(), strict=True)]
    )
    assert all(any(f == pytest.approx(v, rel=1e-4) for v in (1.0, 2.0)) for f in factors.tolist())
    assert set(factors.round().tolist()) == {1.0, 2.0}


def test_weights_enter_the_loss(make_trainer, problem):
    """Against a plain loop over the plan's order and weights."""
    algorithm = SubsetSelection('craig', 0.4, '10ep')
    trainer = make_trainer([algorithm], max_duration='1ep')
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    module.load_state_dict(trainer.state.model.module.state_dict())
    trainer.fit()
    plan = EpochPlanner.of(trainer.state).loader.plan
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    for indices, weights in zip(plan.order.split(plan.sizes), plan.weights.split(plan.sizes), strict=True):
        optimizer.zero_grad()
        inputs, targets = problem.tensors[0][indices], problem.tensors[1][indices]
        (nn.functional.cross_entropy(module(inputs), targets, reduction='none') * weights).mean().backward()
        optimizer.step()
    for a, b in zip(module.parameters(), trainer.state.model.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_validation_gradients(fit, problem):
    held_out = DataLoader(TensorDataset(*(t[:40] for t in problem.tensors)), batch_size=16, shuffle=True)
    subsets = [fit(SubsetSelection('glister', 0.3, val_dataloader=v, greedy='Naive'), max_duration='1ep') for v in (None, held_out)]
    assert [len(s.trained[0]) for s in subsets] == [61, 61]
    assert not torch.equal(subsets[0].trained[0], subsets[1].trained[0])


def test_selection_leaves_training_as_it_was(make_trainer, weights_of):
    """A selection of everything trains as no selection: modes, generators and batch statistics are untouched."""
    module = [nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 3)) for _ in range(2)]
    module[1].load_state_dict(module[0].state_dict())
    plain = make_trainer([InfoBatch(prune_ratio=0)], module=module[0], max_duration='3ep', schedulers=LinearScheduler())
    plain.fit()
    subset = SubsetSelection('glister', 1.0, '1ep')
    selecting = make_trainer([subset, InfoBatch(prune_ratio=0)], module=module[1], max_duration='3ep', schedulers=LinearScheduler())
    selecting.fit()
    assert torch.equal(weights_of(plain), weights_of(selecting))


def test_a_selection_that_fails_leaves_the_last_good_subset_with_one_warning(make_trainer, monkeypatch):
    from composer_effalgos.subset_selection import sources

    algorithm, calls = SubsetSelection('glister', 0.3, '1ep'), []

    def once(*arguments, **options):
        calls.append(arguments)
        if len(calls) > 1:
            raise RuntimeError('out of luck')
        return ef.select_subset(*arguments, **options)

    monkeypatch.setattr(sources, 'select_subset', once)
    subsets = Subsets()
    trainer = make_trainer([algorithm], callbacks=[subsets], max_duration='3ep')
    with pytest.warns(UserWarning, match='SubsetSelection') as caught:
        trainer.fit()
    messages = [str(w.message) for w in caught if 'SubsetSelection' in str(w.message)]
    assert messages == ['SubsetSelection: the selection at epoch 1 failed (out of luck); keeping the previous subset']
    assert len(calls) == 3
    assert torch.equal(subsets.trained[0], subsets.trained[2])


def test_the_first_selection_failing_stops_the_run(make_trainer):
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        module[0].weight[0, 0] = torch.nan
    with pytest.raises(InputError, match='gradients'):
        make_trainer([SubsetSelection('glister', 0.3)], module=module).fit()


def test_no_final_linear_layer(make_trainer, problem):
    module = nn.Sequential(nn.Unflatten(1, (8, 1, 1)), nn.Conv2d(8, 3, 1), nn.Flatten())
    with pytest.raises(InputError, match='expected a linear layer'):
        make_trainer([SubsetSelection('glister', 0.3)], module=module).fit()
    make_trainer([SubsetSelection('random', 0.3)], module=module, max_duration='1ep').fit()


def test_saving_a_checkpoint_does_not_change_the_selection(fit, tmp_path):
    # EMA leaves its average in the model when a checkpoint is saved; the training weights select all the same
    plain, saving = (
        fit(SubsetSelection('glister', 0.3, '1ep'), EMA(half_life='2ba'), max_duration='3ep', **arguments)
        for arguments in ({}, {'save_folder': str(tmp_path), 'save_interval': '1ep'})
    )
    for one, other in zip(plain.trained, saving.trained, strict=True):
        assert torch.equal(one, other)


def test_another_data_set_is_selected_from_anew(make_trainer, problem):
    algorithm = SubsetSelection('glister', 0.5, '10ep')
    trainer = make_trainer([algorithm], max_duration='1ep')
    trainer.fit()
    first = algorithm.indices
    trainer.fit(duration='1ep')
    assert torch.equal(algorithm.indices, first)
    other = TensorDataset(*(t[:100] for t in problem.tensors))
    trainer.fit(train_dataloader=DataLoader(other, batch_size=10, shuffle=True), duration='1ep')
    assert len(algorithm.indices) == 50
    assert algorithm.indices.max() < 100


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'strategy': 'glistr'}, '^strategy: .*glistr.*did you mean .glister'),
        ({'backend': 'numpy'}, 'backend'),
        ({'fraction': 0}, '^fraction: expected'),
        ({'fraction': 1.5}, '^fraction: expected'),
        ({'select_every': '100ba'}, '^select_every: expected'),
        ({'kappa': 1.0}, '^kappa: expected'),
        ({'selection_type': 'PerSample'}, 'selection_type'),
        ({'val_dataloader': [1]}, '^val_dataloader: expected'),
        ({'etta': 0.1}, '^etta: .*did you mean .eta'),
        ({'linear_layer': 'yes'}, '^linear_layer: expected'),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        SubsetSelection(**arguments)


def test_refuses_less_than_one_batch_before_training(make_trainer):
    with pytest.raises(
        InputError, match=r'fraction: expected at least one batch of 16 samples, got 10 \(0.05 of 203\); use a fraction of at least 0.0788'
    ):
        make_trainer([SubsetSelection('glister', 0.05, kappa=0.5)]).fit()


def test_given_twice(make_trainer):
    with pytest.raises(InputError, match='twice'):
        make_trainer([SubsetSelection(), SubsetSelection('random')])


def test_says_what_it_is():
    assert repr(SubsetSelection('gradmatch', 0.2, lam=0.1)).startswith(
        "SubsetSelection(strategy='gradmatch', fraction=0.2, select_every='20ep'"
    )
    assert 'lam=0.1' in repr(SubsetSelection('gradmatch', 0.2, lam=0.1))


class WithToken(nn.Module):
    """Owns a parameter beside its layers, as a vision transformer does."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8))
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs + self.token).relu())


def test_models_whose_containers_own_parameters(fit):
    subsets = fit(SubsetSelection('glister', 0.3), module=WithToken(), max_duration='1ep')
    assert len(subsets.trained[0]) == 61
