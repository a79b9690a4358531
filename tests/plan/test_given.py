"""AdaBatch alone on loaders whose samples have no numbers, or that have an order of their own."""

import itertools

import pytest
import torch
from composer.core import Callback
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler, WeightedRandomSampler

from composer_effalgos import AdaBatch, InfoBatch, InputError, SubsetSelection

streaming = pytest.importorskip('streaming', reason='needs mosaicml-streaming')


class Stream(IterableDataset):
    """A dataset's samples in an order of their own in every epoch, shared out over workers."""

    def __init__(self, dataset, sized: bool = True) -> None:
        self.dataset, self.epochs, self.sized = dataset, 0, sized

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epochs)
        self.epochs += 1
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        yield from (self.dataset[i] for i in torch.randperm(len(self.dataset), generator=generator).tolist()[worker::workers])


class Sized(Stream):
    def __len__(self) -> int:
        return len(self.dataset)


class Backwards(Sampler):
    def __init__(self, source) -> None:
        self.source = source

    def __iter__(self):
        return iter(range(len(self.source) - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.source)


class Circular(Backwards):
    """Composer ends its epochs after as many batches as its length says."""

    def __iter__(self):
        return itertools.cycle(super().__iter__())

    def __len__(self) -> int:
        return 40


class Pairs(BatchSampler):
    """Batches of neighbours."""

    def __iter__(self):
        starts = list(range(0, 203, 16))
        return (list(range(start, min(start + 16, 203))) for start in [starts[i] for i in torch.randperm(12).tolist()] + starts[12:])


class LastMerged(BatchSampler):
    """The remainder joins the last batch."""

    def __iter__(self):
        *batches, last = super().__iter__()
        return iter([*batches, [*last, *range(len(self) * 16, 203)]])


class Wrapping(DataLoader):
    def __iter__(self):
        for x, y in super().__iter__():
            yield x * 2, y


class Batches:
    """Not a DataLoader."""

    batch_size = 16

    def __init__(self, dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return 13

    def __iter__(self):
        x, y = self.dataset.tensors
        for start in range(0, 203, 16):
            yield x[start : start + 16], y[start : start + 16]


@pytest.fixture
def streaming_dataset(problem, tmp_path):
    folder = tmp_path / 'remote'
    with streaming.MDSWriter(out=str(folder), columns={'x': 'ndarray:float32:8', 'y': 'int'}, size_limit=1104) as out:
        for x, y in problem:
            out.write({'x': x.numpy(), 'y': int(y)})
    numbers = itertools.count()

    class Samples(streaming.StreamingDataset):
        def __getitem__(self, at):
            sample = super().__getitem__(at)
            return torch.from_numpy(sample['x'].copy()), torch.tensor(sample['y'])

    return lambda **options: Samples(remote=str(folder), local=str(tmp_path / f'local{next(numbers)}'), batch_size=16, **options)


@pytest.fixture
def loader_of(problem, streaming_dataset):
    def make(kind: str):
        return {
            'weighted': lambda: DataLoader(problem, 16, sampler=WeightedRandomSampler(torch.arange(203.0) + 1, 150)),
            'own generator': lambda: DataLoader(
                problem, 16, sampler=WeightedRandomSampler(torch.arange(203.0) + 1, 150, generator=torch.Generator().manual_seed(5))
            ),
            'own sampler': lambda: DataLoader(problem, 16, sampler=Backwards(problem), num_workers=2),
            'endless sampler': lambda: DataLoader(problem, 16, sampler=Circular(problem)),
            'own batch sampler': lambda: DataLoader(problem, batch_sampler=Pairs(SequentialSampler(problem), 16, False)),
            'with replacement': lambda: DataLoader(  # draws by the piece, as it is read
                problem, 16, sampler=RandomSampler(problem, True, generator=torch.Generator().manual_seed(5))
            ),
            'some of them': lambda: DataLoader(problem, 16, sampler=RandomSampler(problem, num_samples=100)),
            'iterable': lambda: DataLoader(Sized(problem), 16),
            'iterable, workers': lambda: DataLoader(Sized(problem), 16, num_workers=2),
            'iterable, drop_last': lambda: DataLoader(Sized(problem), 16, drop_last=True),
            'streaming': lambda: DataLoader(streaming_dataset(shuffle=True), 16),
            'streaming, workers': lambda: streaming.StreamingDataLoader(streaming_dataset(shuffle=True), batch_size=16, num_workers=2),
            'streaming, drop_last': lambda: DataLoader(streaming_dataset(shuffle=True), 16, drop_last=True),
            'streaming, some': lambda: DataLoader(streaming_dataset(shuffle=True, epoch_size=300), 16),
            'own iteration': lambda: Wrapping(problem, 16, shuffle=True),
            'iterable of batches': lambda: Batches(problem),
        }[kind]()

    return make


KINDS = [
    'weighted',
    'own generator',
    'own sampler',
    'own batch sampler',
    'some of them',
    'iterable',
    'iterable, workers',
    'iterable, drop_last',
    'streaming',
    'streaming, workers',
    'streaming, drop_last',
    'streaming, some',
    'own iteration',
    'iterable of batches',
]


class Seen(Callback):
    """Notes the first number of every sample in each batch."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.epochs: list[list[float]] = []

    def batch_start(self, state, logger):
        self.batches.append(state.batch[0][:, 0].tolist())

    def epoch_end(self, state, logger):
        self.epochs.append(self.samples[sum(map(len, self.epochs)) :])

    @property
    def samples(self) -> list[float]:
        return list(itertools.chain.from_iterable(self.batches))


@pytest.fixture
def train(make_trainer, weights_of):
    def run(algorithms, loader, **arguments):
        torch.manual_seed(3)
        module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Dropout(0.3), torch.nn.Linear(16, 3))
        seen = Seen()
        arguments = {'max_duration': '3ep', **arguments}
        if loader.batch_size is None:  # Composer then wants to be told
            arguments.setdefault('device_train_microbatch_size', 16)
        trainer = make_trainer(
            algorithms, train_loader=loader, module=module, callbacks=[seen, *arguments.pop('callbacks', [])], **arguments
        )
        trainer.fit()
        return seen, weights_of(trainer), trainer

    return run


@pytest.mark.parametrize('kind', [*KINDS, 'endless sampler'])
def test_without_growth_it_is_plain_composer(train, loader_of, kind):
    plain, plain_weights, _ = train([], loader_of(kind))
    ours, weights, _ = train([AdaBatch(2, '50ep')], loader_of(kind))
    assert ours.batches == plain.batches
    assert torch.equal(weights, plain_weights)


def grown(loader_samples: int, drop_last: bool) -> list[int]:
    """Sizes of the batches of two epochs that grow at batch 3 and 7."""
    sizes: list[int] = []
    for _ in range(2):
        left = loader_samples
        while left > 0:
            size = 16 if len(sizes) < 3 else 32 if len(sizes) < 7 else 64
            if left < size and drop_last:
                break
            sizes.append(min(size, left))
            left -= size
    return sizes


@pytest.mark.parametrize('kind', KINDS)
def test_growth_at_the_very_batch(train, loader_of, kind):
    one = train([], loader_of(kind), max_duration='1ep')[0].samples
    ours = train([AdaBatch(2, milestones=['3ba', '7ba'])], loader_of(kind), max_duration='2ep')[0]
    sizes = [len(batch) for batch in ours.batches]
    if 'workers' not in kind or 'streaming' in kind:
        whole = {'weighted': 150, 'own generator': 150, 'some of them': 100, 'streaming, some': 300}.get(kind, 203)
        assert sizes == grown(whole, 'drop_last' in kind)
        common = min(len(one), whole - 64)
        assert ours.samples[:common] == one[:common]  # the very same order
    else:
        # the two workers' shares of 102 and 101 end in a batch each that is not full; the epoch ends after as many as its length says
        assert sizes[:6] == [16, 16, 16, 32, 32, 32]
    if 'drop_last' not in kind and kind not in ('weighted', 'own generator', 'streaming, some'):
        assert all(len(set(epoch)) == len(epoch) for epoch in ours.epochs)  # none twice


class Stop(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def batch_end(self, state, logger):
        if int(state.timestamp.batch) == self.batch:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    'kind', ['weighted', 'own sampler', 'own batch sampler', 'iterable', 'iterable, workers', 'streaming, workers', 'streaming']
)
def test_resumed_within_an_epoch(train, loader_of, weights_of, kind, tmp_path):
    """Also where it is not known beforehand when the batch grows."""

    def policy(progress):
        return (progress.batch > 4) + (progress.batch > 8)

    def run(folder, **arguments):
        saving = {'save_folder': str(tmp_path / folder), 'save_interval': '1ba', 'save_filename': '{batch}.pt'}
        return train([AdaBatch(2, policy=policy)], loader_of(kind), **saving, **arguments)

    whole, weights, _ = run('whole')
    with pytest.raises(KeyboardInterrupt):
        run('stopped', callbacks=[Stop(7)])
    resumed, resumed_weights, _ = run('resumed', load_path=str(tmp_path / 'stopped' / '6.pt'))
    assert resumed.batches == whole.batches[6:]
    assert torch.equal(resumed_weights, weights)
    final = [torch.load(tmp_path / folder / '8.pt', weights_only=False)['state'] for folder in ('whole', 'resumed')]
    plans = [state['callbacks']['EpochPlanner']['plan'] for state in final]
    assert torch.equal(plans[0]['sizes'][:8], plans[1]['sizes'][:8])
    assert final[0]['dataset_state'] == final[1]['dataset_state']


@pytest.mark.parametrize('kind', ['own generator', 'with replacement', 'own batch sampler', 'iterable', 'iterable of batches', 'streaming'])
def test_resumed_at_the_end_of_an_epoch(train, loader_of, kind, tmp_path):
    """Where a sampler's generator or a dataset's count of epochs is not in the checkpoint."""

    def run(folder, **arguments):
        saving = {'save_folder': str(tmp_path / folder), 'save_interval': '1ep', 'save_filename': '{epoch}.pt'}
        return train([AdaBatch(2, '2ep')], loader_of(kind), **saving, **arguments)

    whole, weights, _ = run('whole')
    resumed, resumed_weights, _ = run('resumed', load_path=str(tmp_path / 'whole' / '2.pt'))
    assert resumed.samples == whole.epochs[2]
    assert torch.equal(resumed_weights, weights)


@pytest.mark.parametrize('duration', ['20ba', '400sp'])
def test_a_stream_without_a_length(train, problem, duration):
    loader = DataLoader(Stream(problem), 16)
    plain = train([], DataLoader(Stream(problem), 16), max_duration=duration)
    ours = train([AdaBatch(2, '500ba')], loader, max_duration=duration)
    assert ours[0].batches == plain[0].batches
    assert torch.equal(ours[1], plain[1])
    seen, _, trainer = train([AdaBatch(2, '5ba')], DataLoader(Stream(problem), 16), max_duration=duration)
    assert [len(batch) for batch in seen.batches][:7] == [16] * 5 + [32] * 2
    assert len(set(seen.samples[:203])) == 203
    with pytest.raises(ValueError, match='infinite dataloader'):
        trainer.fit(duration='1ep')


def test_a_stream_in_epochs_of_some_batches(train, problem):
    arguments = {'train_subset_num_batches': 5, 'max_duration': '2ep'}
    seen, _, _ = train([AdaBatch(2, '5ba')], DataLoader(Stream(problem), 16), **arguments)
    assert [len(batch) for batch in seen.batches] == [16] * 5 + [32] * 5


def test_a_stream_longer_than_it_is_planned_ahead(train, problem):
    seen, _, _ = train([AdaBatch(2, '700ba')], DataLoader(Endless(), 1), max_duration='720ba')
    assert [len(batch) for batch in seen.batches] == [1] * 700 + [2] * 20


class Endless(IterableDataset):
    def __iter__(self):
        return ((torch.full((8,), float(n)), n % 3) for n in itertools.count())


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (
            lambda data: DataLoader(data, batch_size=None),
            'expected a batch_size, of the DataLoader or as an attribute of DataLoader, got None',
        ),
        (lambda data: DataLoader(data, batch_sampler=[[0, 1], [2]]), 'expected a batch_sampler with the attribute batch_size, got list'),
        (
            lambda data: DataLoader(data, batch_sampler=LastMerged(SequentialSampler(data), 16, True)),
            'expected batches of 16, its batch_size, from batch_sampler LastMerged, only the last one smaller, got one of 27',
        ),
        (lambda data: DataLoader(data, 16, sampler=iter(range(9))), 'expected a sampler with __len__'),
    ],
)
def test_refused_in_one_line(train, problem, make, message):
    with pytest.raises(InputError, match=message) as refusal:
        train([AdaBatch()], make(problem), device_train_microbatch_size=16, max_duration='9ba')
    assert '\n' not in str(refusal.value)


def test_a_growth_that_would_tear_batches_apart(train, loader_of):
    for kind in ('own batch sampler', 'iterable of batches'):
        with pytest.raises(InputError, match='expected a multiple of it as the batch size, got 24'):
            train([AdaBatch(1.5, '2ba')], loader_of(kind))


@pytest.mark.parametrize('kind', ['weighted', 'iterable', 'own batch sampler', 'own iteration'])
def test_who_needs_numbers_says_so(train, loader_of, kind):
    with pytest.raises(InputError, match='InfoBatch needs sample numbers; AdaBatch, LinUpper and ESLM do not'):
        train([InfoBatch(), AdaBatch()], loader_of(kind))
    with pytest.raises(InputError, match=r'SubsetSelection.* needs sample numbers'):
        train([SubsetSelection('random', 0.5)], loader_of(kind))
