"""Batches of one sample: where they come from, and how an epoch does without them."""

import pytest
import torch
from composer.models import ComposerClassifier
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from composer_effalgos import AdaBatch, Pruning, SubsetSelection
from composer_effalgos.plan import PlannedDataLoader
from composer_effalgos.plan.singles import has_single, leave_out, spread, unpruned_has_single


def rank_parts(sizes: list[int], world_size: int, microbatch: int | None) -> list[int]:
    """What each rank trains on at a time, by dealing the samples out."""
    parts, start = [], 0
    for size in sizes:
        for rank in range(world_size):
            share = torch.arange(start, start + size)[rank::world_size]
            parts += [len(part) for part in share.split(microbatch or size)]
        start += size
    return parts


@given(st.lists(st.integers(4, 40), min_size=1, max_size=5), st.integers(1, 3), st.none() | st.integers(2, 9))
def test_what_has_a_single_is_found_and_spread_over_the_last_two_batches(sizes, world_size, microbatch):
    sizes = [size * world_size for size in sizes[:-1]] + sizes[-1:]
    assert has_single(sizes, world_size, microbatch) == (1 in rank_parts(sizes, world_size, microbatch))
    after = spread(sizes, world_size, microbatch)
    assert sum(after) == sum(sizes)
    assert after[:-2] == sizes[:-2]
    assert all(size % world_size == 0 for size in after[:-1])
    assert max(after) <= max(sizes)
    if len(sizes) > 1 and has_single(after[-2:], world_size, microbatch):  # no other cut does better
        assert after == sizes
        for first in range(world_size, sum(sizes[-2:]), world_size):
            pair = [first, sum(sizes[-2:]) - first]
            assert max(pair) > max(sizes) or 1 in rank_parts(pair, world_size, microbatch)


@given(st.integers(6, 60), st.integers(2, 9), st.integers(1, 3), st.booleans(), st.none() | st.integers(2, 4))
def test_the_unpruned_epoch_is_a_data_loaders(num_samples, batch_size, world_size, drop_last, microbatch):
    data = TensorDataset(torch.arange(num_samples))
    sampler = DistributedSampler(data, world_size, 0, drop_last=drop_last)
    parts = [
        len(part)
        for (batch,) in DataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=drop_last)
        for part in batch.split(microbatch or batch_size)
    ]
    assert unpruned_has_single(num_samples, batch_size, world_size, drop_last=drop_last, microbatch=microbatch) == (1 in parts)


def test_each_sample_is_left_out_as_often_as_any_other():
    kept, weights = torch.arange(3, 13), torch.arange(3.0, 13.0)
    counts = torch.zeros(13)
    for seed in range(4000):
        samples, factors = leave_out(kept, weights, 2, torch.Generator().manual_seed(seed))
        assert len(samples) == 8
        assert (samples.diff() > 0).all()
        assert torch.equal(samples.float(), factors)
        counts[samples] += 1
    assert ((counts[3:] - 3200).abs() < 5 * (4000 * 0.8 * 0.2) ** 0.5).all()


def normed(momentum: float = 0.1) -> ComposerClassifier:
    torch.manual_seed(0)
    return ComposerClassifier(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=momentum), nn.Linear(8, 3)), num_classes=3)


@pytest.fixture
def even(problem) -> TensorDataset:
    """202 samples, so that batches of 2 come out even."""
    return TensorDataset(*(column[:202] for column in problem.tensors))


ALGORITHMS = {
    'random': lambda: [Pruning('random', delta=1.0)],  # keeps 21
    'infobatch': lambda: [Pruning('infobatch', delta=1.0)],
    'subset': lambda: [SubsetSelection('random', 0.5)],
    'subset, pruned': lambda: [SubsetSelection('random', 0.5), Pruning('random', prune_ratio=0.3, delta=1.0)],  # keeps 15
    'growing': lambda: [AdaBatch(1.5, '1ep'), Pruning('random', prune_ratio=0.3, delta=1.0)],
}


@pytest.mark.parametrize(('batch_size', 'microbatch'), [(2, None), (4, 2), (16, 6)])
@pytest.mark.parametrize('case', ALGORITHMS)
def test_batch_norm_trains_wherever_the_plain_run_does(make_trainer, problem, case, batch_size, microbatch):
    if case == 'growing' and batch_size == 4:
        pytest.skip('grows to 9 samples, in microbatches of 2')
    data = TensorDataset(*(column[:42] for column in problem.tensors))
    arguments = {'dataset': data, 'batch_size': batch_size, 'max_duration': '4ep', 'device_train_microbatch_size': microbatch}
    make_trainer(model=normed(), **arguments).fit()
    trainer = make_trainer(ALGORITHMS[case](), model=normed(), **arguments)
    trainer.fit()
    samples = sum(map(sum, trainer.recorder.sizes))
    assert samples == int(trainer.state.timestamp.sample)
    pruned = [algorithm for algorithm in trainer.state.algorithms if isinstance(algorithm, Pruning)]
    if pruned and not case.startswith('subset'):
        assert pruned[0].samples_saved == 4 * 42 - samples


def test_one_sample_less_where_that_is_enough_and_none_elsewhere(problem, even):
    def trained(data, kept, batch_size=2, **arguments):
        loader = PlannedDataLoader(DataLoader(data, batch_size=batch_size, shuffle=True, **arguments), seed=1)
        return loader.plan_epoch(torch.arange(kept), None, batch_size, 3, even=False)

    assert len(trained(even, 101).kept) == 100
    assert len(trained(even, 100).kept) == 100
    assert trained(even, 101).sizes == (2,) * 50
    assert not torch.equal(trained(even, 101).kept, torch.arange(100))  # drawn
    assert len(trained(problem, 101).kept) == 101  # 203 samples in twos: the plain run has such a batch too
    assert len(trained(even, 101, batch_size=3).kept) == 101
    assert len(trained(even, 101, batch_size=1).kept) == 101
    assert len(trained(even, 101, drop_last=True).kept) == 101  # which are trained on in 50 batches


@pytest.mark.parametrize('kept', range(4, 40))
def test_no_rank_is_left_with_one_sample(kept):
    data = TensorDataset(torch.arange(40))
    for rank in range(2):
        sampler = DistributedSampler(data, 2, rank)
        loader = PlannedDataLoader(DataLoader(data, batch_size=2, sampler=sampler), seed=1, rank=rank, world_size=2)
        plan = loader.plan_epoch(torch.arange(kept), torch.arange(float(kept)), 2, 0, even=False)
        assert 1 not in rank_parts(list(plan.sizes), 2, None)
        assert kept - len(plan.kept) == loader.surplus(kept, 2, even=False) == kept % 4
        assert torch.equal(plan.kept.float(), plan.kept_weights)
