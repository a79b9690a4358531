"""Loaders whose samples have no numbers, in batches of other sizes."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from composer_effalgos import InputError
from composer_effalgos.plan.streams import BatchStream, WorkerStream, put_together


class Shares(IterableDataset):
    """Numbers; worker ``w`` has ``sizes[w]`` of them, from ``100 w`` on. With random numbers beside each where ``noisy``."""

    def __init__(self, sizes, noisy=False) -> None:
        self.sizes, self.noisy, self.epochs = sizes, noisy, 0

    def __iter__(self):
        self.epochs += 1
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for number in range(100 * worker, 100 * worker + self.sizes[worker]):
            yield (number, torch.rand(()).item(), np.random.rand(), random.random()) if self.noisy else number


def in_turns(shares, sizes, drop_last):
    """What is read from the workers' shares in batches of the sizes given, nothing ahead: straight-line."""
    left = [list(range(100 * worker, 100 * worker + size)) for worker, size in enumerate(shares)]
    batches, ended, turn = [], set(), 0
    while len(ended) < len(left) and len(batches) < len(sizes):
        worker, size = turn % len(left), sizes[len(batches)]
        turn += 1
        batch, left[worker] = left[worker][:size], left[worker][size:]
        if batch and not (drop_last and len(batch) < size):
            batches.append(batch)
        else:
            ended.add(worker)
    return batches


def read(stream, sizes, epoch=0, changes=()):
    """Batches as lists; ``sizes`` is known beforehand up to each place in ``changes``, where the rest comes to light."""
    known = list(sizes)
    batches = []
    for place in changes:
        known[place:] = [known[min(place, len(known)) - 1]] * (len(known) - place)

    def size_of(batch):
        return known[batch] if batch < len(known) else None

    for batch in stream.read(epoch, size_of):
        batches.append(batch if isinstance(batch, list) else batch.tolist())
        if len(batches) in changes:
            known[len(batches) :] = sizes[len(batches) :]
    return batches


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('drop_last', [False, True])
def test_at_its_own_batch_size_it_is_the_data_loader(workers, drop_last):
    loader = DataLoader(Shares([19, 9]), batch_size=4, num_workers=workers, drop_last=drop_last)
    assert read(WorkerStream(loader, 1), [4] * 50) == [batch.tolist() for batch in loader]


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=1),
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.booleans(),
    st.sets(st.integers(1, 11), max_size=3),
)
def test_sizes_change_at_the_very_batch(shares, sizes, drop_last, changes):
    stream = WorkerStream(DataLoader(Shares(shares), batch_size=3, drop_last=drop_last), 1)
    for epoch in range(2):
        assert read(stream, sizes, epoch, sorted(changes)) == in_turns(shares, sizes, drop_last)


@settings(max_examples=12)
@given(
    st.lists(st.integers(0, 40), min_size=2, max_size=3),
    st.lists(st.integers(1, 9), min_size=1, max_size=20),
    st.booleans(),
    st.sets(st.integers(1, 19), max_size=3),
    st.integers(1, 3),
    st.booleans(),
)
def test_whatever_workers_have_read_ahead(shares, sizes, drop_last, changes, prefetch, persistent):
    loader = DataLoader(
        Shares(shares),
        batch_size=3,
        drop_last=drop_last,
        num_workers=len(shares),
        prefetch_factor=prefetch,
        persistent_workers=persistent,
    )
    stream = WorkerStream(loader, 1)
    for epoch in range(2):
        assert read(stream, sizes, epoch, sorted(changes)) == in_turns(shares, sizes, drop_last)


def collate_noisily(samples):
    return [(*sample, torch.rand(()).item()) for sample in samples]


@pytest.mark.parametrize('workers', [0, 2])
def test_random_numbers_depend_on_the_epoch_alone(workers):
    """Neither on what was read ahead in vain nor on the training's, which they leave alone."""

    def batches(changes, epoch):
        loader = DataLoader(Shares([20, 15], noisy=True), batch_size=3, num_workers=workers, collate_fn=collate_noisily)
        before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        found = read(WorkerStream(loader, 1), [3, 3, 3, 5, 5, 2, 2, 2, 2, 2, 2], epoch, changes)
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1], before[2]) == (np.random.get_state()[1].tolist(), random.getstate())
        torch.rand(7)
        return found

    assert batches([], 0) == batches([3, 5], 0)
    assert batches([], 0) != batches([], 1)


def test_whole_batches():
    class Batches:
        batch_size = 2

        def __iter__(self):
            return (torch.arange(start, min(start + 2, 9)) for start in range(0, 9, 2))

    assert read(BatchStream(Batches()), [2, 4, 4]) == [[0, 1], [2, 3, 4, 5], [6, 7, 8]]
    with pytest.raises(InputError, match='makes batches of 2 by itself, expected a multiple of it as the batch size, got 3'):
        read(BatchStream(Batches()), [2, 3])


def test_put_together():
    one, two = torch.arange(6).view(3, 2), torch.arange(4).view(2, 2)
    assert torch.equal(put_together([one, two]), torch.cat([one, two]))
    pair = put_together([(one, ['a', 'b', 'c']), (two, ['d', 'e'])])
    assert torch.equal(pair[0], torch.cat([one, two]))
    assert pair[1] == ['a', 'b', 'c', 'd', 'e']
    mapping = put_together([{'x': one, 'y': {'z': one}, 'name': 'n'}, {'x': two, 'y': {'z': two}, 'name': 'n'}])
    assert torch.equal(mapping['y']['z'], torch.cat([one, two]))
    assert mapping['name'] == 'n'
    assert put_together([['a', 'b'], ['c']]) == ['a', 'b', 'c']
    for batches in (
        [one, torch.zeros(2, 3)],
        [one, two.float()],
        [object(), object()],
        [{'n': 1}, {'n': 2}],
        [torch.tensor(1), torch.tensor(2)],
    ):
        with pytest.raises(InputError, match='expected batches that can be concatenated'):
            put_together(batches)


def test_the_parts_of_composer_put_together_again():
    from composer.core.data_spec import default_split_batch

    for batch in (
        torch.arange(10),
        {'a': torch.arange(10), 'b': list('abcdefghij')},
        [torch.arange(10), torch.rand(10, 2)],
        list('abcdefghij'),
    ):
        again = put_together(list(default_split_batch(batch, 3)))
        flat, flat_again = (torch.utils._pytree.tree_leaves(item) for item in (batch, again))
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in itertools.zip_longest(flat, flat_again))
