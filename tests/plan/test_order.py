"""Batches whose samples are in another order than planned: scores would go to the wrong samples."""

import dataclasses

import pytest
import torch
from composer.algorithms import SAM
from composer.core import Algorithm, DataSpec, Event
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from composer_effalgos import AdaBatch, InfoBatch, InputError, LinUpper, SubsetSelection
from composer_effalgos.plan import PlannedDataLoader
from composer_effalgos.plan.order import check_collate, keeps_order

INPUTS = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(INPUTS, (INPUTS[:, 0] > 0).long())
SAMPLES = [DATA[index] for index in range(9)]


class Sentences(Dataset):
    """Sequences of many lengths."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {'ids': torch.arange(1, 3 + index * 7 % 11), 'label': index % 3}


def padded(samples):
    ids = nn.utils.rnn.pad_sequence([sample['ids'] for sample in samples], batch_first=True)
    return {'ids': ids, 'mask': (ids > 0).long(), 'labels': torch.tensor([sample['label'] for sample in samples])}


def by_length(samples):
    return padded(sorted(samples, key=lambda sample: len(sample['ids']), reverse=True))


def emptied(samples):
    return default_collate([samples.pop(0) for _ in range(len(samples))])  # changes what it is given


def mixed(samples):
    inputs, labels = default_collate(samples)
    return 0.7 * inputs + 0.3 * inputs[torch.randperm(len(inputs))], labels


def masked(samples):
    ids = torch.stack([(sample[0] * 100).long() for sample in samples])
    return {'input_ids': ids.masked_fill(torch.rand(ids.shape) < 0.15, 0), 'mask': torch.ones_like(ids)}


def pairs(samples):
    inputs, labels = default_collate(samples)
    return {'inputs': inputs - inputs.mean(dim=0), 'same': labels[:, None] == labels, 'row': torch.arange(len(labels))}


def shuffled(samples):
    return default_collate([samples[index] for index in torch.randperm(len(samples))])


def shuffled_by(generator):
    return lambda samples: default_collate([samples[index] for index in torch.randperm(len(samples), generator=generator)])


def noisy(samples):
    inputs, _ = default_collate(samples)
    return {'inputs': inputs + torch.randn_like(inputs), 'times': torch.rand(len(inputs))}


KEEP = {
    'default': default_collate,
    'changes its samples': emptied,
    'mixes at random': mixed,
    'masks at random': masked,
    'pairs': pairs,
    'noise': noisy,
}
LOSE = {
    'sorted': lambda samples: default_collate(sorted(samples, key=lambda sample: float(sample[0][0]))),
    'reversed': lambda samples: default_collate(samples[::-1]),
    'halves exchanged': lambda samples: default_collate(samples[len(samples) // 2 :] + samples[: len(samples) // 2]),
    'next': lambda samples: default_collate(samples[1:] + samples[:1]),
    'first two exchanged': lambda samples: default_collate([samples[1], samples[0], *samples[2:]]),
    'shuffled': shuffled,
    'shuffled by its own generator': shuffled_by(torch.Generator().manual_seed(0)),
    'shuffled and mixed': lambda samples: mixed([samples[index] for index in torch.randperm(len(samples))]),
    'sorted and mixed': lambda samples: mixed(sorted(samples, key=lambda sample: float(sample[0][0]))),
    'samples along the second dimension': lambda samples: default_collate(samples)[0][:, : len(samples)].T,
}


def holds(collate, size, seed=0):
    samples = SAMPLES[:size]
    return keeps_order(collate, samples, size, lambda some, order: [some[index] for index in order], seed)


@pytest.mark.parametrize('size', [3, 8, 9])
@pytest.mark.parametrize('name', KEEP)
def test_what_keeps_the_order(name, size):
    before = torch.get_rng_state()
    assert all(holds(KEEP[name], size, seed) for seed in range(10))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('size', [3, 8])
@pytest.mark.parametrize('name', LOSE)
def test_what_does_not(name, size):
    found = [holds(LOSE[name], size, seed) for seed in range(10)]
    # what is drawn anew for every batch may happen to leave three samples where they are
    assert not any(found) if not name.startswith('shuffled') else sum(found) <= 10 - size


def test_alike_samples_tell_nothing():
    same = [SAMPLES[0]] * 5
    assert keeps_order(lambda samples: mixed(samples[::-1]), same, 5, lambda some, order: [some[index] for index in order], 0)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_collate_function_that_sorts_is_refused_where_position_counts(make_trainer, workers):
    loader = DataLoader(Sentences(), batch_size=8, collate_fn=by_length, num_workers=workers)
    planned = PlannedDataLoader(loader, seed=1)
    planned.set_plan(planned.plan_epoch(None, None, 8, 0, even=False), 0)
    assert len(list(planned)) == 5  # nobody asks for positions
    planned.by_position = True
    with pytest.raises(InputError, match=r'^collate_fn: expected row i of each tensor to belong to sample i, got another order, ') as said:
        list(planned)
    assert '\n' not in str(said.value)
    loader = DataLoader(Sentences(), batch_size=8, collate_fn=padded, num_workers=workers)
    planned = PlannedDataLoader(loader, seed=1)
    planned.by_position = True
    planned.set_plan(planned.plan_epoch(None, None, 8, 0, even=False), 0)
    assert [len(batch['ids']) for batch in planned] == [8] * 5


class Together(TensorDataset):
    """Reads the samples of a batch at once, in the order of the file or as they are asked for."""

    def __init__(self, by_file):
        super().__init__(torch.arange(40.0))
        self.by_file = by_file

    def __getitems__(self, indices):
        return [self[index] for index in (sorted(indices) if self.by_file else indices)]


@pytest.mark.parametrize('wrap', [lambda dataset: dataset, lambda dataset: Subset(dataset, range(39, -1, -1))], ids=['itself', 'subset'])
def test_a_dataset_that_sorts_the_samples_of_a_batch_is_refused_where_position_counts(wrap):
    for by_file in (False, True):
        planned = PlannedDataLoader(DataLoader(wrap(Together(by_file)), batch_size=8, shuffle=True), seed=1)
        planned.by_position = True
        planned.set_plan(planned.plan_epoch(None, None, 8, 0, even=False), 0)
        if by_file:
            with pytest.raises(InputError, match=r'^dataset\.__getitems__: expected row i of each tensor to belong to sample i'):
                list(planned)
        else:
            assert sorted(torch.cat([batch[0] for batch in planned]).tolist()) == list(range(40))


def sorting(samples):
    return default_collate(sorted(samples, key=lambda sample: float(sample[0][0])))


def test_who_counts_by_position(make_trainer):
    def fit(*algorithms):
        make_trainer(algorithms, train_loader=DataLoader(DATA, batch_size=8, shuffle=True, collate_fn=sorting), max_duration='2ep').fit()

    for algorithm in (InfoBatch(), SubsetSelection('gradmatch', 0.5, select_every='1ep')):
        with pytest.raises(InputError, match=r'^collate_fn: expected row i'):
            fit(algorithm)
    fit(AdaBatch(2, '1ep'), SubsetSelection('random', 0.5))
    fit(LinUpper(burn_in=None))


def test_random_numbers_of_a_collate_function_are_those_of_the_batch():
    orders = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        loader = PlannedDataLoader(DataLoader(DATA, batch_size=8, collate_fn=mixed, num_workers=workers), seed=1)
        loader.set_plan(loader.plan_epoch(None, None, 8, 0, even=False), 0)
        orders.append(torch.cat([inputs for inputs, _ in loader]))
    assert torch.equal(*orders)


def sort_batch(batch):
    order = batch[0][:, 0].argsort()
    return [batch[0][order], batch[1][order]]


def noise(batch):
    return [batch[0] + torch.randn_like(batch[0]), batch[1]]


@pytest.mark.parametrize('where', ['batch_transforms', 'microbatch_transforms'])
@pytest.mark.parametrize('microbatch', [None, 4])
def test_transforms_of_a_data_spec(make_trainer, where, microbatch):
    def fit(transform, algorithms=()):
        torch.manual_seed(0)
        spec = DataSpec(DataLoader(DATA, batch_size=8, shuffle=True), **{where: transform})
        trainer = make_trainer(algorithms, train_loader=spec, max_duration='1ep', device_train_microbatch_size=microbatch)
        trainer.fit()
        return trainer

    with pytest.raises(InputError, match=r'^train_dataloader: transforms of the DataSpec: expected row i of each'):
        fit(sort_batch, [InfoBatch()])
    fit(sort_batch, [AdaBatch(2, '1ep')])
    fit(noise, [InfoBatch()])
    fit(lambda batch: [2 * batch[0], batch[1]], [InfoBatch()])


def named(samples):
    inputs, labels = default_collate(samples)
    return {'x': inputs, 'labels': labels}


class Named(ComposerClassifier):
    """A classifier of batches that are mappings."""

    def __init__(self):
        super().__init__(nn.Linear(8, 2), num_classes=2)

    def get_metrics(self, is_train):
        return {}

    def forward(self, batch):
        return self.module(batch['x'])

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch['labels'])


def taken(batch, order):
    return {key: value[order] for key, value in batch.items()}


def sort_in_place(batch):
    order = batch['x'][:, 0].argsort()
    for key in batch:
        batch[key] = batch[key][order]
    return batch


def sort_content(batch):
    order = batch['x'][:, 0].argsort()
    for value in batch.values():
        value.copy_(value[order])
    return batch


def scale_in_place(batch):
    batch['x'] *= 2
    return batch


def strided(batch, size):
    count = -(-len(batch['labels']) // size)
    return [taken(batch, slice(number, None, count)) for number in range(count)]


def last_reversed(batch, size):
    first, *rest = in_order(batch, size)
    return [first, *(taken(part, torch.arange(len(part['labels'])).flip(0)) for part in rest)]


def in_order(batch, size):
    return [taken(batch, slice(start, start + size)) for start in range(0, len(batch['labels']), size)]


class Changing(Algorithm):
    """Changes the batch at some events."""

    def __init__(self, **changes):
        self.changes = {Event[name]: change for name, change in changes.items()}

    def match(self, event, state):
        return event in self.changes

    def apply(self, event, state, logger):
        self.changes[event](state)


def by_first_column(state):
    state.batch = taken(state.batch, state.batch['x'][:, 0].argsort())


def by_first_column_in_place(state):
    sort_content(state.batch)


@pytest.fixture
def score_errors(make_trainer):
    """How far scores are from the true losses, with a learning rate of 0."""

    def fit(changing=None, *, factor=1.0, microbatch=None, dataset=DATA, more=(), **spec):
        loader = DataSpec(DataLoader(dataset, batch_size=8, shuffle=True, collate_fn=named), **spec)
        ours, model = InfoBatch(), Named()
        algorithms = [ours, *more, *([] if changing is None else [changing])]
        settings = {'max_duration': '1ep', 'lr': 0.0, 'device_train_microbatch_size': microbatch}
        make_trainer(algorithms, model=model, train_loader=loader, **settings).fit()
        inputs, labels = (torch.stack(list(column)) for column in zip(*map(dataset.__getitem__, range(len(dataset))), strict=True))
        true = nn.functional.cross_entropy(model.module(factor * inputs), labels, reduction='none')
        return (ours.scores - true).abs().max().item()

    return fit


@pytest.mark.parametrize('microbatch', [None, 4])
def test_transforms_in_place(score_errors, microbatch):
    for transform in (sort_in_place, sort_content):
        with pytest.raises(InputError, match=r'^train_dataloader: transforms of the DataSpec: expected row i of each'):
            score_errors(batch_transforms=transform, microbatch=microbatch)
    assert score_errors(batch_transforms=scale_in_place, factor=2, microbatch=microbatch) < 1e-5


def test_split_batch_of_a_data_spec(score_errors):
    for transform in ({}, {'batch_transforms': scale_in_place}):
        for split in (strided, last_reversed):
            with pytest.raises(InputError, match=r'^train_dataloader: split_batch of the DataSpec: expected row i of each'):
                score_errors(split_batch=split, microbatch=3, **transform)
        assert score_errors(split_batch=in_order, microbatch=3, factor=2 if transform else 1, **transform) < 1e-5
    assert score_errors(split_batch=strided, microbatch=8) < 1e-5


@pytest.mark.parametrize('microbatch', [None, 3])
@pytest.mark.parametrize('event', ['AFTER_DATALOADER', 'BATCH_START', 'BEFORE_FORWARD'])
def test_algorithms_that_permute_the_batch(score_errors, event, microbatch):
    for change in (by_first_column, by_first_column_in_place):
        with pytest.raises(InputError, match=r'^algorithms: Changing: expected row i of each tensor'):
            score_errors(Changing(**{event: change}), microbatch=microbatch)
    with pytest.raises(InputError, match=r'^algorithms: Changing: expected row i of each tensor'):
        score_errors(Changing(**{event: by_first_column}), microbatch=microbatch, batch_transforms=scale_in_place)


def test_algorithms_that_change_the_content(score_errors):
    def scale(state):
        state.batch['x'] = 2 * state.batch['x']

    assert score_errors(Changing(AFTER_DATALOADER=scale), factor=2) < 1e-5
    exchanged = []

    def exchange(state):  # as CutMix, if the box covers all that is not margin
        exchanged.append(state.batch['x'])
        state.batch['x'] = state.batch['x'].roll(1, 0)

    score_errors(Changing(BEFORE_FORWARD=exchange))
    assert len(exchanged) == 5
    alike = TensorDataset(INPUTS, torch.ones(40, dtype=torch.int64))
    score_errors(Changing(BEFORE_FORWARD=exchange), dataset=alike)

    def other_labels(state):
        state.batch['labels'] = state.batch['labels'].flip(0)

    score_errors(Changing(AFTER_DATALOADER=other_labels))


@pytest.mark.parametrize('microbatch', [None, 3])
def test_an_algorithm_that_sorts_the_inputs_and_restores_the_outputs(score_errors, microbatch):
    orders = []

    def sort(state):
        orders.append(state.batch['x'][:, 0].argsort())
        state.batch['x'] = state.batch['x'][orders[-1]]

    def restore(state):
        state.outputs = state.outputs[orders[-1].argsort()]

    assert score_errors(Changing(BEFORE_FORWARD=sort, AFTER_FORWARD=restore), microbatch=microbatch) < 1e-5


def test_repeated_passes_over_a_batch(score_errors):
    assert score_errors(more=[SAM(rho=1e-7)], microbatch=3) < 1e-5


class Counting:
    """Makes batches that depend on how many it has made."""

    calls = 0

    def __call__(self, samples):
        self.calls += 1
        return torch.stack(samples) * self.calls


def test_the_check_leaves_a_collate_function_with_a_state_as_it_is():
    collate = Counting()
    check_collate(collate, [torch.full((2,), float(index)) for index in range(4)], 4, seed=0)
    assert collate.calls == 0


class Sorting(ComposerClassifier):
    """Sorts its samples, as a model of sequences may, and does not put them back."""

    where = 'key'

    def get_metrics(self, is_train):
        return {}

    def forward(self, batch):
        order = batch['x'][:, 0].argsort()
        outputs = self.module(batch['x'][order])
        if self.where == 'key':
            batch['labels'] = batch['labels'][order]
        elif self.where == 'in place':
            batch['labels'].copy_(batch['labels'][order])
        else:
            outputs = outputs[order.argsort()]
        return outputs

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch['labels'])


@pytest.mark.parametrize('where', ['key', 'in place', 'undone'])
def test_a_model_that_sorts_its_batch(make_trainer, where):
    class Named(Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return {'x': torch.randn(8, generator=torch.Generator().manual_seed(index)), 'labels': index % 3}

    model = Sorting(torch.nn.Linear(8, 3), num_classes=3)
    model.where = where
    trainer = make_trainer([InfoBatch()], dataset=Named(), model=model, max_duration='1ep')
    if where == 'undone':
        trainer.fit()
        return
    with pytest.raises(InputError, match=r'^model: expected forward\(\) to keep the order of the rows of the batch'):
        trainer.fit()


@dataclasses.dataclass
class Sample:
    inputs: torch.Tensor
    label: int


class Objects(Dataset):
    """Samples that only their own collate function understands, and whose == has no truth value."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return Sample(INPUTS[index], index % 2)


def test_samples_may_be_objects(make_trainer, weights_of):
    def collate(samples):
        return torch.stack([sample.inputs for sample in samples]), torch.tensor([sample.label for sample in samples])

    plain, ours = (
        make_trainer(algorithms, train_loader=DataLoader(Objects(), 8, collate_fn=collate), max_duration='3ep')
        for algorithms in ([], [InfoBatch(prune_ratio=0)])
    )
    plain.fit()
    ours.fit()
    assert torch.equal(weights_of(plain), weights_of(ours))
