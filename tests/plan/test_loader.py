import multiprocessing
import os

import numpy as np
import pytest
import torch
from composer import Callback
from composer.utils import dist
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from composer_effalgos import InfoBatch, InputError, LinUpper
from composer_effalgos.plan import PlannedDataLoader, plan_epoch


class Noisy(Dataset):
    """(index, process id, random numbers of all three generators)."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        import random

        return index, os.getpid(), torch.rand(()), np.random.rand(), random.random()


def planned(loader, **kwargs) -> PlannedDataLoader:
    return PlannedDataLoader(loader, seed=3, **kwargs)


def epoch_of(loader: PlannedDataLoader, epoch: int, kept=None, batch_size=8):
    kept = torch.arange(loader.num_samples) if kept is None else kept
    loader.set_plan(plan_epoch(kept, None, batch_size, seed=3, epoch=epoch), epoch)
    return list(loader)


def test_yields_the_plan():
    loader = planned(DataLoader(Noisy(), batch_size=8))
    kept = torch.tensor([1, 5, 7, 30, 39])
    batches = epoch_of(loader, 0, kept, batch_size=2)
    assert len(loader) == len(batches) == 3
    assert torch.cat([b[0] for b in batches]).tolist() == loader.plan.order.tolist()
    assert sorted(loader.plan.order.tolist()) == kept.tolist()


def test_workers_survive_changes_of_subset_weights_and_batch_size():
    loader = planned(DataLoader(Noisy(), batch_size=8, num_workers=2, persistent_workers=True))
    pids = []
    for epoch, (kept, batch_size) in enumerate([(None, 8), (torch.arange(0, 40, 2), 8), (torch.arange(13), 3), (None, 16)]):
        pids.append({pid.item() for batch in epoch_of(loader, epoch, kept, batch_size) for pid in batch[1]})
    reading = {pid.item() for batch in loader.read(range(10), 4) for pid in batch[1]}
    assert pids[0] == pids[1] == pids[2] == pids[3] == reading
    assert len(reading) == 2
    assert os.getpid() not in reading


class Epochs(Dataset):
    """Samples that are the number of the epoch, which a callback sets."""

    epoch = 0

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return torch.full((8,), float(self.epoch)), index % 3


@pytest.mark.parametrize('persistent', [False, True])
def test_workers_see_the_dataset_as_in_plain_composer(make_trainer, persistent):
    def seen(*algorithms):
        dataset, found = Epochs(), []

        class SetEpoch(Callback):
            def epoch_start(self, state, logger):
                dataset.epoch = int(state.timestamp.epoch)

            def batch_start(self, state, logger):
                found.append(state.batch[0][0, 0].item())

        loader = DataLoader(dataset, batch_size=16, num_workers=1, shuffle=True, persistent_workers=persistent)
        make_trainer(algorithms, train_loader=loader, callbacks=[SetEpoch()], max_duration='3ep').fit()
        return found

    assert seen() == seen(LinUpper(burn_in=None)) == seen(InfoBatch(prune_ratio=0)) == ([0] * 6 if persistent else [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize('persistent', [False, True])
@pytest.mark.parametrize('duration', ['2ep', '3ba'])
def test_workers_end_with_the_epoch_as_in_plain_composer(make_trainer, persistent, duration):
    def alive(*algorithms):
        others, found = set(multiprocessing.active_children()), []

        class Count(Callback):
            def epoch_end(self, state, logger):
                found.append(len(set(multiprocessing.active_children()) - others))

        loader = DataLoader(Epochs(), batch_size=16, num_workers=1, shuffle=True, persistent_workers=persistent)
        trainer = make_trainer(algorithms, train_loader=loader, callbacks=[Count()], max_duration=duration)
        trainer.fit()
        return [*found, len(set(multiprocessing.active_children()) - others)]

    assert alive(InfoBatch()) == alive() == ([1] if persistent else [0]) * (3 if duration == '2ep' else 2)


def test_augmentation_is_the_same_with_any_number_of_workers_and_history():
    def numbers(batches):
        return [[column.tolist() for column in (b[0], *b[2:])] for b in batches]

    alone = planned(DataLoader(Noisy(), batch_size=8))
    two = planned(DataLoader(Noisy(), batch_size=8, num_workers=2))
    epoch_of(two, 0)  # a past that the other loader does not have
    assert numbers(epoch_of(alone, 1)) == numbers(epoch_of(two, 1))
    assert numbers(epoch_of(alone, 1)) != numbers(epoch_of(alone, 2))
    assert numbers(alone.read(range(10), 4)) == numbers(two.read(range(10), 4))


def test_training_generators_are_untouched():
    for workers in (0, 1):
        loader = planned(DataLoader(Noisy(), batch_size=8, num_workers=workers))
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()
        epoch_of(loader, 0)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == np.random.get_state()[1].tolist()


class Counting(Noisy):
    def __init__(self):
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def test_batches_trained_before_a_resume_are_not_read():
    from composer_effalgos.plan import resume_epoch

    whole = planned(DataLoader(Noisy(), batch_size=8))
    batches = epoch_of(whole, 4)
    dataset = Counting()
    loader = planned(DataLoader(dataset, batch_size=8))
    rest = resume_epoch(whole.plan, batches=3, batch_size=8, world_size=1)
    loader.set_plan(rest, 4)
    resumed = list(loader)
    assert len(loader) == len(resumed) == 5
    assert resumed[:3] == [None, None, None]
    assert len(dataset.read) == 16
    for one, other in zip(batches[3:], resumed[3:], strict=True):
        assert one[0].tolist() == other[0].tolist()
        assert one[2].tolist() == other[2].tolist()


def test_getitems_and_attributes_reach_the_data_set():
    class Batched(TensorDataset):
        def __getitems__(self, indices):
            self.asked = indices
            return [(self.tensors[0][i] * 10,) for i in indices]

    dataset = Batched(torch.arange(20.0))
    loader = planned(DataLoader(dataset, batch_size=5))
    batches = epoch_of(loader, 0, batch_size=5)
    assert torch.cat([b[0] for b in batches]).sort().values.tolist() == [i * 10.0 for i in range(20)]
    assert len(dataset.asked) == 5
    assert loader.dataset is dataset


@pytest.mark.parametrize(
    ('loader', 'message'),
    [
        ([torch.zeros(3)], 'DataLoader'),
        (DataLoader(Noisy(), batch_size=None), 'batch_sampler'),
        (DataLoader(Noisy(), batch_size=4, sampler=WeightedRandomSampler([1.0] * 40, 40)), 'WeightedRandomSampler'),
        (DataLoader(Noisy(), batch_size=4, sampler=RandomSampler(Noisy(), replacement=True)), 'replacement'),
        (
            DataLoader(Noisy(), batch_size=41, drop_last=True),
            'one whole batch with drop_last, got 40 samples for batch_size 41',
        ),
    ],
)
def test_refuses_what_it_cannot_plan(loader, message):
    with pytest.raises(InputError, match=message):
        planned(loader)


def test_refuses_loaders_with_an_iteration_of_their_own():
    class Own(DataLoader):
        def __iter__(self):
            yield from super().__iter__()

    with pytest.raises(InputError, match='expected a DataLoader that iterates as PyTorch does, got Own'):
        planned(Own(Noisy(), batch_size=4))


def _remember(worker: int) -> None:
    torch.utils.data.get_worker_info().dataset.seen = worker + 1


class Remembering(Noisy):
    seen = 0

    def __getitem__(self, index):
        return index, self.seen


def test_worker_init_fn_finds_the_users_data_set():
    loader = planned(DataLoader(Remembering(), batch_size=8, num_workers=1, worker_init_fn=_remember))
    assert {seen.item() for batch in epoch_of(loader, 0) for seen in batch[1]} == {1}


def test_refuses_iterable_data_sets():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from range(10)

    with pytest.raises(InputError, match='expected a map-style dataset'):
        planned(DataLoader(Stream(), batch_size=2))


def test_shuffles_as_the_users_sampler_did():
    assert planned(DataLoader(Noisy(), batch_size=4, shuffle=True)).shuffle
    assert not planned(DataLoader(Noisy(), batch_size=4)).shuffle
    assert planned(DataLoader(Noisy(), batch_size=4, sampler=dist.get_sampler(Noisy(), shuffle=True))).shuffle
    assert not planned(DataLoader(Noisy(), batch_size=4, sampler=dist.get_sampler(Noisy()))).shuffle


def test_full_epoch():
    assert (planned(DataLoader(Noisy(), batch_size=12)).full_samples, planned(DataLoader(Noisy(), batch_size=12)).full_batches) == (40, 4)
    dropping = planned(DataLoader(Noisy(), batch_size=12, drop_last=True))
    assert (dropping.full_samples, dropping.full_batches) == (36, 3)
    limited = planned(DataLoader(Noisy(), batch_size=12))
    limited.limit(2)
    assert (limited.full_samples, limited.full_batches) == (24, 2)
