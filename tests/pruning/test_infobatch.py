import math

import pytest
import torch
from composer import Trainer
from composer.core import Callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import InfoBatch, InputError
from composer_effalgos.plan import EpochPlanner


def plan_of(trainer: Trainer) -> EpochPlanner:
    return EpochPlanner.of(trainer.state)


class EpochEnds(Callback):
    """What each epoch trained on, and the scores after it."""

    def __init__(self, algorithm: InfoBatch) -> None:
        self.algorithm, self.samples, self.weights, self.scores = algorithm, [], [], []

    def epoch_end(self, state, logger):
        plan = EpochPlanner.of(state).loader.plan
        self.samples.append(plan.order)
        self.weights.append(torch.ones(len(plan.order)) if plan.weights is None else plan.weights)
        self.scores.append(self.algorithm.scores)


@pytest.fixture
def trained(make_trainer):
    def train(algorithm: InfoBatch, **kwargs) -> EpochEnds:
        ends = EpochEnds(algorithm)
        trainer = make_trainer([algorithm], callbacks=[ends], **kwargs)
        trainer.fit()
        ends.trainer = trainer
        return ends

    return train


def test_prunes_what_the_rule_says_and_everything_after_delta(trained):
    algorithm = InfoBatch(0.5, delta=0.75)
    ends = trained(algorithm, max_duration='8ep')
    for epoch in range(8):
        if epoch in (0, 6, 7):  # no scores yet; after delta
            assert len(ends.samples[epoch]) == 203
            assert (ends.weights[epoch] == 1).all()
            continue
        before = ends.scores[epoch - 1]
        below = before.double() < before.double().mean()
        kept = ends.samples[epoch]
        assert len(kept) == 203 - int(below.sum()) + int(below.sum()) // 2
        assert set((~below).nonzero().flatten().tolist()) <= set(kept.tolist())
        assert torch.equal(ends.weights[epoch], 1.0 + below[kept].float())
        pruned = torch.ones(203, dtype=torch.bool)
        pruned[kept] = False
        assert torch.equal(ends.scores[epoch][pruned], before[pruned])
    assert algorithm.samples_saved == 8 * 203 - sum(map(len, ends.samples)) > 0
    assert int(ends.trainer.state.timestamp.sample) == 8 * 203 - algorithm.samples_saved


@pytest.mark.parametrize(
    ('epochs', 'delta', 'full'), [(3, 0.875, {0, 2}), (10, 0.7, {0, 7, 8, 9}), (4, 0.5, {0, 2, 3}), (3, 1.0, {0}), (2, 0.0, {0, 1})]
)
def test_the_last_share_of_the_run_is_trained_in_full(trained, epochs, delta, full):
    ends = trained(InfoBatch(delta=delta), max_duration=f'{epochs}ep')
    assert {epoch for epoch, samples in enumerate(ends.samples) if len(samples) == 203} == full


def test_scores_are_the_losses_trained_with(make_trainer, problem):
    # with a learning rate of 0 the loss of a sample is the same whenever it is seen
    algorithm = InfoBatch()
    trainer = make_trainer([algorithm], lr=0.0, max_duration='3ep', device_train_microbatch_size=5)
    trainer.fit()
    with torch.no_grad():
        outputs = trainer.state.model.module(problem.tensors[0])
    expected = nn.functional.cross_entropy(outputs, problem.tensors[1], reduction='none')
    assert algorithm.scores.dtype == torch.float32
    assert algorithm.scores.device.type == 'cpu'
    assert torch.allclose(algorithm.scores, expected, atol=1e-6)


@pytest.mark.parametrize('microbatch', [None, 16, 5])
def test_microbatches_do_not_change_the_result(make_trainer, weights_of, microbatch):
    trainer = make_trainer([InfoBatch()], device_train_microbatch_size=microbatch, max_duration='3ep')
    trainer.fit()
    reference = make_trainer([InfoBatch()], max_duration='3ep')
    reference.fit()
    assert torch.allclose(weights_of(trainer), weights_of(reference), atol=1e-5)


def test_ratio_zero_trains_as_without_it(make_trainer, weights_of):
    # same samples in the same batches: a plain loop over the plan's order gives the same weights
    trainer = make_trainer([InfoBatch(prune_ratio=0.0)], max_duration='2ep')
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    module.load_state_dict(trainer.state.model.module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    ends = EpochEnds(trainer.state.algorithms[0])
    trainer.state.callbacks.append(ends)
    trainer.fit()
    inputs, targets = trainer.state.train_dataloader.dataset.tensors
    for order in ends.samples:
        for indices in order.split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs[indices]), targets[indices]).backward()
            optimizer.step()
    reference = torch.cat([v.flatten().double() for v in module.state_dict().values()])
    assert torch.allclose(weights_of(trainer), reference, atol=1e-6)


def test_not_finite_losses_are_kept_and_do_not_poison_the_mean(make_trainer):
    def sometimes_infinite(outputs, batch):
        losses = nn.functional.cross_entropy(outputs, batch[1], reduction='none')
        return torch.where(batch[0][:, 0] > 1.5, torch.full_like(losses, math.nan).detach(), losses)

    algorithm = InfoBatch(per_sample_loss=sometimes_infinite, delta=1.0)
    ends = EpochEnds(algorithm)
    trainer = make_trainer([algorithm], lr=0.0, callbacks=[ends], max_duration='3ep')
    trainer.fit()
    broken = (trainer.state.train_dataloader.dataset.tensors[0][:, 0] > 1.5).nonzero().flatten()
    assert len(broken) > 3
    assert algorithm.scores[broken].isinf().all()
    assert not algorithm.scores.isnan().any()
    for epoch in (1, 2):
        assert set(broken.tolist()) <= set(ends.samples[epoch].tolist())
        assert len(ends.samples[epoch]) < 203


def test_another_data_set_starts_with_no_scores(make_trainer, problem):
    algorithm = InfoBatch(delta=1.0)
    ends = EpochEnds(algorithm)
    trainer = make_trainer([algorithm], callbacks=[ends], max_duration='2ep')
    trainer.fit()
    trainer.fit(duration='1ep')
    assert len(ends.samples[2]) < 203  # the same loader: the scores hold
    other = TensorDataset(*(t[:150] for t in problem.tensors))
    trainer.fit(train_dataloader=DataLoader(other, batch_size=10, shuffle=True), duration='2ep')
    assert len(ends.samples[3]) == 150
    assert len(ends.samples[4]) < 150
    assert len(algorithm.scores) == 150


def test_seeds(trained):
    same = [trained(InfoBatch(seed=s, delta=1.0), lr=0.0, max_duration='2ep').samples[1].sort().values.tolist() for s in (4, 4, 5)]
    assert same[0] == same[1] != same[2]


def test_says_what_it_is_and_does():
    assert repr(InfoBatch(0.25, 0.8, seed=3)) == 'InfoBatch(prune_ratio=0.25, delta=0.8, seed=3)'


def test_given_twice(make_trainer):
    with pytest.raises(InputError, match='InfoBatch is given twice: both decide which samples an epoch leaves out'):
        make_trainer([InfoBatch(), InfoBatch()])


@pytest.mark.parametrize(
    ('arguments', 'name'),
    [
        ({'prune_ratio': 1.0}, 'prune_ratio'),
        ({'prune_ratio': -0.1}, 'prune_ratio'),
        ({'prune_ratio': '0.5'}, 'prune_ratio'),
        ({'delta': 1.1}, 'delta'),
        ({'delta': None}, 'delta'),
        ({'per_sample_loss': 3}, 'per_sample_loss'),
    ],
)
def test_refuses_arguments(arguments, name):
    with pytest.raises(InputError, match=f'^{name}: expected'):
        InfoBatch(**arguments)


def test_another_default_dtype(make_trainer, problem):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        algorithm = InfoBatch(delta=1.0)
        inputs, targets = problem.tensors
        make_trainer([algorithm], dataset=TensorDataset(inputs.double(), targets), max_duration='3ep').fit()
    finally:
        torch.set_default_dtype(before)
    assert algorithm.samples_saved > 0
