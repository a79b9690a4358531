"""The seam: any data path yields the plan's samples, and nothing above it can tell which one runs."""

from collections.abc import Iterator

import pytest
import torch
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset

from composer_effalgos import AdaBatch, InfoBatch, SubsetSelection
from composer_effalgos.plan import BatchReader, EpochPlanner, PlannedDataLoader, Reading, plan_epoch, resume_epoch


class Tensors(BatchReader):
    """The shortest data path there is; notes what it read."""

    def __init__(self, dataset: Dataset, **settings) -> None:
        super().__init__(dataset, **settings)
        self.readings: list[Reading] = []
        self.read: list[int] = []

    def read_batches(self, reading: Reading) -> Iterator[list[torch.Tensor]]:
        self.readings.append(reading)
        for indices in reading.batches:
            self.read.extend(indices.tolist())
            yield [column[indices] for column in self.dataset.tensors]


def indices_of(path, plan, rank, world_size) -> list[list[int]]:
    loader = PlannedDataLoader(path, seed=3, rank=rank, world_size=world_size)
    loader.set_plan(plan, 5)
    return [batch if batch is None else batch[0].tolist() for batch in loader]


@pytest.fixture
def numbers() -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(torch.arange(50), torch.arange(50) % 3)


@pytest.mark.parametrize('world_size', [1, 2, 3])
@pytest.mark.parametrize('batches_done', [0, 2])
def test_paths_read_the_same_samples_and_skip_what_was_trained(numbers, world_size, batches_done):
    plan = plan_epoch(torch.arange(3, 50), None, 4, seed=3, epoch=5, world_size=world_size)
    plan = resume_epoch(plan, batches=batches_done, batch_size=4, world_size=world_size)
    seen = []
    for rank in range(world_size):
        path = Tensors(numbers, batch_size=4, shuffle=True)
        by_path = indices_of(path, plan, rank, world_size)
        assert by_path == indices_of(DataLoader(numbers, batch_size=4, shuffle=True), plan, rank, world_size)
        assert by_path[:batches_done] == [None] * batches_done
        assert path.read == [index for batch in by_path[batches_done:] for index in batch]
        seen += path.read
    assert sorted(seen) == sorted(plan.order[plan.start : plan.num_samples].tolist())


def test_a_reading_says_where_random_numbers_come_from(numbers):
    def reading(rank, epoch, done=0):
        path = Tensors(numbers, batch_size=4)
        loader = PlannedDataLoader(path, seed=3, rank=rank, world_size=2)
        loader.set_plan(
            resume_epoch(
                plan_epoch(torch.arange(50), None, 4, seed=3, epoch=epoch, world_size=2), batches=done, batch_size=4, world_size=2
            ),
            epoch,
        )
        list(loader)
        return path.readings[0]

    assert reading(0, 1).seed == reading(1, 1).seed == reading(0, 1, done=3).seed != reading(0, 2).seed
    seeds = list(reading(0, 1).batch_seeds)
    assert len(set(seeds)) == len(seeds) == 7
    assert not set(seeds) & set(reading(1, 1).batch_seeds)
    assert seeds[3:] == list(reading(0, 1, done=3).batch_seeds)


@pytest.mark.parametrize('drop_last', [False, True])
def test_without_a_plan_a_path_iterates_as_a_data_loader(numbers, drop_last):
    path = Tensors(numbers, batch_size=8, shuffle=True, drop_last=drop_last, seed=4)
    sampler = dist.get_sampler(numbers, shuffle=True, drop_last=drop_last, seed=4)
    loader = DataLoader(numbers, batch_size=8, sampler=sampler, drop_last=drop_last)
    assert len(path) == len(loader)
    for epoch in range(2):
        path.sampler.set_epoch(epoch)
        sampler.set_epoch(epoch)
        assert [batch[0].tolist() for batch in path] == [batch[0].tolist() for batch in loader]
    assert path.readings[0].seed != path.readings[1].seed


@pytest.mark.parametrize(
    'algorithms',
    [
        lambda: [],
        lambda: [InfoBatch(), AdaBatch(interval='2ep', max_batch_size=32)],
        lambda: [SubsetSelection('gradmatch', 0.4, '2ep'), InfoBatch()],
    ],
    ids=['none', 'infobatch+adabatch', 'gradmatch+infobatch'],
)
def test_training_cannot_tell_the_paths_apart(make_trainer, problem, weights_of, algorithms):
    runs = []
    for path in (None, Tensors(problem, batch_size=16, shuffle=True)):
        trainer = make_trainer(algorithms(), train_loader=path, callbacks=[EpochPlanner()])
        trainer.fit()
        runs.append((trainer.recorder.sizes, trainer.recorder.lrs, weights_of(trainer).tolist()))
        assert isinstance(trainer.state.dataloader, PlannedDataLoader)
    assert runs[0] == runs[1]


def test_a_path_serves_several_trainers(make_trainer, problem, weights_of):
    path = Tensors(problem, batch_size=16, shuffle=True)
    first, second = (make_trainer([InfoBatch(delta=1.0)], train_loader=path, max_duration=length) for length in ('3ep', '6ep'))
    first.fit()
    second.fit()
    first.fit(duration='3ep')
    assert weights_of(first).tolist() == weights_of(second).tolist()
