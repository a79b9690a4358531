"""A ``StreamingDataset`` of mosaicml-streaming under the plan."""

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch
from composer.core import Callback
from torch.utils.data import DataLoader

from composer_effalgos import AdaBatch, InfoBatch, InputError, SubsetSelection
from composer_effalgos.plan import PlannedDataLoader, plan_epoch

streaming = pytest.importorskip('streaming')


class Fetched(streaming.Stream):
    """Notes which shards are fetched, by any process."""

    def prepare_shard(self, shard):
        with (Path(self.local) / 'fetched.txt').open('a') as file:
            file.write(f'{shard.raw_data.basename}\n')
        return super().prepare_shard(shard)


class Pairs(streaming.StreamingDataset):
    """Pairs as ``TensorDataset`` gives them."""

    def __getitem__(self, at):
        sample = super().__getitem__(at)
        return torch.from_numpy(sample['x'].copy()), torch.tensor(sample['y'])


@pytest.fixture
def remote(problem, tmp_path) -> str:
    """``problem`` in shards of 20 samples, the last of 3."""
    folder = tmp_path / 'remote'
    with streaming.MDSWriter(out=str(folder), columns={'x': 'ndarray:float32:8', 'y': 'int'}, size_limit=1104) as out:
        for x, y in problem:
            out.write({'x': x.numpy(), 'y': int(y)})
    return str(folder)


@pytest.fixture
def stream(remote, tmp_path):
    numbers = itertools.count()

    def make(**options) -> Pairs:
        options = {'batch_size': 16, 'shuffle': True, **options}
        return Pairs(streams=[Fetched(remote=remote, local=str(tmp_path / f'local{next(numbers)}'))], **options)

    return make


def planned(dataset, *, workers: int = 0, loader=DataLoader) -> PlannedDataLoader:
    return PlannedDataLoader(loader(dataset, batch_size=16, num_workers=workers), seed=3)


def epoch_of(loader: PlannedDataLoader, epoch: int, **options):
    kept = torch.arange(loader.num_samples)
    starts, block = loader.shard_starts, loader.shuffle_block
    loader.set_plan(
        plan_epoch(kept, None, 16, seed=3, epoch=epoch, shuffle=loader.shuffle, shard_starts=starts, shuffle_block=block, **options), epoch
    )
    return list(loader)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('kind', [DataLoader, streaming.StreamingDataLoader])
def test_every_sample_once_and_no_shard_fetched_twice(stream, problem, workers, kind):
    dataset = stream(shuffle_block_size=30)
    loader = planned(dataset, workers=workers, loader=kind)
    assert loader.num_samples == len(loader.dataset) == 203
    for epoch in (0, 1):
        batches = epoch_of(loader, epoch)
        order = loader.plan.order
        assert order.sort().values.tolist() == list(range(203))
        assert torch.equal(torch.cat([x for x, _ in batches]), problem.tensors[0][order])
        assert torch.equal(torch.cat([y for _, y in batches]), problem.tensors[1][order])
        # two shards of 20 make a block of 30 or more; each block is read to its end before the next
        shards = [list(group) for _, group in itertools.groupby((order // 20).tolist(), key=_block_of((order // 20).tolist()))]
        assert sum(len(set(shard)) for shard in shards) == 11
        assert any(len(set(shard)) == 2 and shard != sorted(shard) for shard in shards)
    fetched = Counter((Path(dataset.streams[0].local) / 'fetched.txt').read_text().split())
    assert sorted(fetched.values()) == [1] * 11


def _block_of(shards: list[int]):
    """Which run of the order a shard belongs to: runs overlap in no shard."""
    last = {shard: place for place, shard in enumerate(shards)}
    block, end, blocks = 0, 0, {}
    for place, shard in enumerate(shards):
        if place > end:
            block += 1
        end = max(end, last[shard])
        blocks[shard] = block
    return blocks.__getitem__


def algorithms_of(kind: str) -> list:
    return {
        'InfoBatch': lambda: [InfoBatch(delta=1.0)],
        'SubsetSelection': lambda: [SubsetSelection('gradmatch', 0.5, '1ep')],
        'all three': lambda: [InfoBatch(delta=1.0), AdaBatch(2, '1ep'), SubsetSelection('gradmatch', 0.5, '2ep')],
    }[kind]()


@pytest.mark.parametrize('kind', ['InfoBatch', 'SubsetSelection', 'all three'])
def test_trains_as_on_a_map_style_dataset(make_trainer, weights_of, stream, problem, kind):
    runs = []
    # by default a StreamingDataset mixes some 262,144 samples: all there are
    for loader in (
        streaming.StreamingDataLoader(stream(), batch_size=16, num_workers=2),
        DataLoader(stream(shuffle=False), batch_size=16),
        DataLoader(problem, batch_size=16, shuffle=True),
        DataLoader(problem, batch_size=16),
    ):
        trainer = make_trainer(algorithms_of(kind), train_loader=loader, max_duration='3ep')
        trainer.fit()
        runs.append(weights_of(trainer))
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], runs[3])


class Stop(Callback):
    def batch_end(self, state, logger):
        if int(state.timestamp.batch) == 10:
            raise KeyboardInterrupt


def test_resumed_within_an_epoch(make_trainer, weights_of, stream, tmp_path):
    """Composer saves where a StreamingDataset is in its own order, which is not the plan's."""

    def fit(folder: str, **arguments):
        torch.manual_seed(1)
        return make_trainer(
            algorithms_of('all three'),
            train_loader=streaming.StreamingDataLoader(stream(), batch_size=16),
            max_duration='4ep',
            module=torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(16, 3)),
            save_folder=str(tmp_path / folder),
            save_interval='3ba',
            save_filename='{batch}.pt',
            **arguments,
        )

    whole = fit('whole')
    whole.fit()
    stopped = fit('stopped', callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    assert int(stopped.state.timestamp.batch_in_epoch) > 0
    resumed = fit('resumed', load_path=str(tmp_path / 'stopped' / '9.pt'))
    resumed.fit()
    assert torch.equal(weights_of(whole), weights_of(resumed))
    saved = [torch.load(tmp_path / folder / '12.pt', weights_only=False)['state']['dataset_state'] for folder in ('whole', 'resumed')]
    assert saved[0] == saved[1]


@pytest.mark.parametrize(
    ('weights', 'message'),
    [
        ([{'repeat': 2}], 'reads every sample once an epoch'),
        ([{'choose': 100}], 'reads every sample once an epoch'),
        ([{'proportion': 0.8}, {'proportion': 0.2}], 'reads every sample once an epoch'),
    ],
)
def test_refuses_streams_that_read_other_than_once(remote, tmp_path, weights, message):
    streams = [streaming.Stream(remote=remote, local=str(tmp_path / f'local{i}'), **weight) for i, weight in enumerate(weights)]
    with pytest.raises(InputError, match=message):
        planned(streaming.StreamingDataset(streams=streams, batch_size=16))


@pytest.mark.parametrize(
    ('options', 'message'), [({'epoch_size': 100}, 'once an epoch'), ({'batching_method': 'stratified'}, 'batching_method')]
)
def test_refuses_options_that_a_plan_replaces(stream, options, message):
    with pytest.raises(InputError, match=message):
        planned(stream(**options))


def test_refuses_a_stream_that_iterates_by_itself(remote, tmp_path):
    class Packed(streaming.StreamingDataset):
        def __iter__(self):
            yield from super().__iter__()

    with pytest.raises(InputError, match=r'expected a map-style dataset .*, got Packed'):
        planned(Packed(remote=remote, local=str(tmp_path / 'local'), batch_size=16))
