"""Which samples are read: those that plain Composer reads with the same loader, or the loader is refused."""

import pytest
import torch
from composer.core import Callback
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from composer_effalgos import AdaBatch, InfoBatch, InputError, SubsetSelection
from composer_effalgos.plan import PlannedDataLoader, plan_epoch


class Numbers(Dataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return range(self.size)[index]


def sampler_over(kind: str, dataset: Dataset, part: int, chosen: list[int], rank: int, world_size: int):
    if kind == 'indices':
        return SubsetRandomSampler(chosen)
    if kind.startswith('distributed'):
        source = Subset(dataset, range(part))
        return DistributedSampler(source, world_size, rank, shuffle='shuffled' in kind, drop_last='dropping' in kind)
    return {'random': RandomSampler, 'sequential': SequentialSampler}[kind](range(part))


KINDS = ['random', 'sequential', 'indices', 'distributed', 'distributed shuffled', 'distributed dropping']


def read(loader) -> set[int]:
    return {number for batch in loader for number in batch.tolist()}


@given(st.data(), st.sampled_from(KINDS), st.integers(1, 40), st.integers(1, 12))
def test_the_samples_that_the_loader_reads(data, kind, size, batch_size):
    part = data.draw(st.integers(1, size))
    chosen = data.draw(st.permutations(range(size)))[:part]
    world_size = data.draw(st.integers(1, min(4, part))) if kind.startswith('distributed') else 1
    dataset = Numbers(size)
    plain, planned = set(), set()
    for rank in range(world_size):
        sampler = sampler_over(kind, dataset, part, chosen, rank, world_size)
        if data.draw(st.booleans()) and world_size == 1:
            loader = DataLoader(dataset, batch_sampler=BatchSampler(sampler, batch_size, drop_last=False))
        else:
            loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler)
        plain |= read(loader)
        mine = PlannedDataLoader(loader, seed=1, rank=rank, world_size=world_size)
        kept = torch.arange(mine.num_samples)
        mine.set_plan(plan_epoch(kept, None, batch_size, seed=1, epoch=0, world_size=world_size, shuffle=mine.shuffle), 0)
        planned |= read(mine)
        # the dataset of the planned loader gives its samples by their number
        names = kept if mine.indices is None else mine.indices
        assert [mine.dataset[number] for number in kept.tolist()] == names.tolist()
        assert read(mine.read(range(mine.num_samples), 3)) == set(names.tolist())
    assert planned == plain


class ByLength(DistributedSampler):
    """As transformers' DistributedLengthGroupedSampler, which has no attribute ``shuffle``."""

    def __init__(self, dataset):
        self.dataset, self.num_replicas, self.rank = dataset, 1, 0

    def __iter__(self):
        return iter(range(10))


class Backwards(RandomSampler):
    def __iter__(self):
        return iter(range(39, -1, -1))


class Chunks(BatchSampler):
    def __iter__(self):
        yield [1, 2, 3]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'sampler': ByLength(Numbers(40))}, 'expected a sampler of PyTorch, got ByLength'),
        ({'sampler': Backwards(Numbers(40))}, 'expected a sampler of PyTorch, got Backwards'),
        ({'batch_sampler': Chunks(SequentialSampler(range(40)), 3, False)}, 'expected batch_size, got batch_sampler Chunks'),
        ({'sampler': RandomSampler(range(40), num_samples=10)}, 'without replacement or num_samples.*Subset'),
        ({'sampler': SequentialSampler(range(41))}, 'over the 40 samples, got SequentialSampler over 41'),
        ({'sampler': SubsetRandomSampler([1, 1, 2])}, 'expected a SubsetRandomSampler of distinct numbers from 0 to 39'),
        ({'sampler': SubsetRandomSampler([-1, 2])}, 'expected a SubsetRandomSampler of distinct numbers from 0 to 39'),
        ({'sampler': DistributedSampler(range(40), 2, 0)}, 'expected the DistributedSampler of rank 0 of 1, got that of rank 0 of 2'),
    ],
)
def test_refused_in_one_line(arguments, message):
    if 'batch_sampler' not in arguments:
        arguments['batch_size'] = 4
    with pytest.raises(InputError, match=message) as refusal:
        PlannedDataLoader(DataLoader(Numbers(40), **arguments), seed=1)
    assert '\n' not in str(refusal.value)


class Trained(Callback):
    """Notes the first number of every sample that was trained on, which names it in ``problem``."""

    def __init__(self) -> None:
        self.seen: set[float] = set()

    def batch_start(self, state, logger):
        self.seen |= set(state.batch[0][:, 0].tolist())


@pytest.mark.parametrize(
    'algorithms',
    [
        lambda: [],
        lambda: [InfoBatch(delta=1.0)],
        lambda: [AdaBatch(2, '1ep')],
        lambda: [SubsetSelection('random', 1.0)],
        lambda: [SubsetSelection('gradmatch', 1.0), InfoBatch(0.2), AdaBatch(2, '1ep')],
    ],
)
@pytest.mark.parametrize('kind', ['random', 'sequential', 'indices', 'distributed shuffled'])
def test_held_out_samples_are_never_trained_on(make_trainer, problem, kind, algorithms):
    chosen = torch.randperm(203)[:150].tolist()
    sampler = sampler_over(kind, problem, 150, chosen, 0, 1)
    trained = Trained()
    loader = DataLoader(problem, batch_size=16, sampler=sampler)
    trainer = make_trainer(algorithms(), train_loader=loader, callbacks=[trained], max_duration='3ep')
    trainer.fit()
    numbers = sorted(chosen) if kind == 'indices' else range(150)
    assert trained.seen == set(problem.tensors[0][list(numbers), 0].tolist())


@pytest.mark.parametrize('drop_last', [False, True])
@pytest.mark.parametrize(
    'algorithm',
    [lambda: InfoBatch(delta=1.0), lambda: SubsetSelection('random', 0.5), lambda: AdaBatch(2, '2ep')],
    ids=['prune', 'select', 'grow'],
)
def test_a_batch_sampler_trains_as_batch_size_does(make_trainer, weights_of, problem, algorithm, drop_last):
    runs = []
    for arguments in (
        {'batch_size': 32, 'shuffle': True, 'drop_last': drop_last},
        {'batch_sampler': BatchSampler(RandomSampler(problem), 32, drop_last)},
    ):
        trainer = make_trainer([algorithm()], train_loader=DataLoader(problem, **arguments), max_duration='3ep')
        trainer.fit()
        runs.append(trainer)
    assert runs[0].recorder.sizes == runs[1].recorder.sizes
    assert runs[0].recorder.microbatches == runs[1].recorder.microbatches
    assert torch.equal(*map(weights_of, runs))
