"""What every algorithm of the table has to hold to."""

import os
import re
from pathlib import Path
from typing import Any

import over_ranks
import pytest
import torch
from algorithm_settings import SETTINGS, classes
from composer.models import ComposerModel
from composer.optim import LinearScheduler
from filelock import FileLock
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler

from composer_effalgos import ESLM, AdaBatch, InputError, LinUpper, Pruning
from composer_effalgos.plan import EpochPlanner

SAMPLES = 203


@pytest.fixture(params=SETTINGS)
def row(request: pytest.FixtureRequest) -> str:
    return request.param


class Seen(Dataset):
    """The samples of a data set, noting which were read."""

    def __init__(self, dataset: Dataset, keyed: bool = False) -> None:
        self.dataset, self.keyed, self.read = dataset, keyed, set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.read.add(index)
        sample = self.dataset[index]
        return dict(zip(('inputs', 'labels'), sample, strict=True)) if self.keyed else sample

    @property
    def targets(self) -> list[int]:
        return [int(self.dataset[index][1]) for index in range(len(self))]


# ---------------------------------------------------------------------- training


@pytest.fixture(scope='module')
def plain_lrs() -> list[float]:
    """What each epoch's learning rate begins with in the run without an algorithm; filled by the first test that needs it."""
    return []


def test_trains(row, start, make_trainer, weights_of, plain_lrs):
    arguments = {'max_duration': '6ep', 'schedulers': LinearScheduler()}
    if not plain_lrs:
        plain = make_trainer([], **arguments)
        plain.fit()
        plain_lrs[:] = [lrs[0] for lrs in plain.recorder.lrs]
    trainer = start(row, SAMPLES, **arguments)
    algorithms = list(trainer.state.algorithms)
    before = weights_of(trainer)
    trainer.fit()
    assert torch.isfinite(weights_of(trainer)).all()
    assert not torch.equal(before, weights_of(trainer))
    assert int(trainer.state.timestamp.epoch) == 6
    sizes = trainer.recorder.sizes
    samples = sum(map(sum, sizes))
    assert samples == int(trainer.state.timestamp.sample)
    takes_all = [isinstance(algorithm, (AdaBatch, LinUpper, ESLM)) for algorithm in algorithms]
    assert samples == 6 * SAMPLES if all(takes_all) else samples < 6 * SAMPLES
    if any(isinstance(algorithm, AdaBatch) for algorithm in algorithms):
        assert len({epoch[0] for epoch in sizes}) > 1
    else:  # an epoch begins with the learning rate of the run on everything
        assert [lrs[0] for lrs in trainer.recorder.lrs] == pytest.approx(plain_lrs)
    if len(algorithms) == 1 and isinstance(algorithms[0], Pruning):
        assert algorithms[0].samples_saved == 6 * SAMPLES - samples
    for algorithm in algorithms:
        assert type(algorithm).__name__ in repr(algorithm)


def test_is_repeatable(row, start, weights_of):
    runs = []
    for _ in range(2):
        trainer = start(row, 67, max_duration='3ep', schedulers=LinearScheduler())
        trainer.fit()
        runs.append(weights_of(trainer))
    assert torch.equal(*runs)


# ---------------------------------------------------------------------- fit again


def test_fit_again_goes_on(row, start, weights_of):
    trainer = start(row, SAMPLES, max_duration='2ep', schedulers=LinearScheduler())
    trainer.fit()
    trainer.fit(duration='2ep')
    assert int(trainer.state.timestamp.epoch) == 4
    assert len(trainer.recorder.sizes) == 4
    assert len(trainer.state.algorithms) == len(SETTINGS[row].algorithms(SAMPLES))
    assert sum(isinstance(callback, EpochPlanner) for callback in trainer.state.callbacks) == 1
    assert torch.isfinite(weights_of(trainer)).all()


def test_fit_again_on_other_data(row, start):
    """Nothing that is known of the first data names samples of the second."""
    everything, _ = SETTINGS[row].problem(180)
    other = Seen(Subset(everything, range(120, 180)))
    trainer = start(row, 80, max_duration='2ep', schedulers=LinearScheduler())
    trainer.fit()
    loader = DataLoader(other, batch_size=16, shuffle=True)
    if row == 'rule rho':
        with pytest.raises(InputError, match='expected one number for each of 60 training samples, got 80'):
            trainer.fit(train_dataloader=loader, duration='3ep')
        return
    trainer.fit(train_dataloader=loader, duration='3ep')
    assert other.read <= set(range(60))
    assert int(trainer.state.timestamp.epoch) == 5


# ---------------------------------------------------------------------- odd loaders


class Keyed(ComposerModel):
    """Takes batches that are mappings."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(8, 3)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.net(batch['inputs'])

    def loss(self, outputs: torch.Tensor, batch: Any, reduction: str = 'mean') -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, batch['labels'], reduction=reduction)


PART = range(0, SAMPLES, 2)
# what the loader is given beside the data, and what the trainer is
ODD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    'drop_last': ({'shuffle': True, 'drop_last': True}, {}),
    'not shuffled': ({}, {}),
    'in microbatches': ({'shuffle': True}, {'device_train_microbatch_size': 3}),
    'a sampler over a part': ({'sampler': SubsetRandomSampler(PART)}, {}),
    'one batch': ({'shuffle': True, 'batch_size': 512}, {}),
    'mappings': ({'shuffle': True}, {}),
    'workers': ({'shuffle': True, 'num_workers': 1}, {}),
}
REFUSED = {('rule rho', 'a sampler over a part'): 'rule.irreducible: expected one number for each of 102 training samples, got 203'}


@pytest.mark.parametrize(
    ('row', 'kind'),
    [
        (row, kind)
        for number, row in enumerate(SETTINGS)
        for place, kind in enumerate(ODD)
        if row in ('infobatch', 'all') or (place + number) % 2 == 0 or (row, kind) in REFUSED
    ],
)
def test_odd_loaders(row, kind, start, weights_of):
    """Every kind trains, on no other samples than the loader gives, or is refused in one line: some rows with all, the others with half."""
    of_loader, of_trainer = ODD[kind]
    if kind == 'mappings' and SETTINGS[row].problem is not classes:
        pytest.skip('its batches are mappings as it is')
    data = Seen(SETTINGS[row].problem(SAMPLES)[0], keyed=kind == 'mappings')
    loader = DataLoader(data, **{'batch_size': 16, **of_loader})
    model = {'model': Keyed()} if kind == 'mappings' else {}
    trainer = start(row, SAMPLES, train_loader=loader, max_duration='3ep', schedulers=LinearScheduler(), **model, **of_trainer)
    if (row, kind) in REFUSED:
        with pytest.raises(InputError, match=re.escape(REFUSED[row, kind])):
            trainer.fit()
        return
    trainer.fit()
    allowed = set(PART if 'sampler' in of_loader else range(SAMPLES))
    assert data.read <= allowed
    assert data.read or kind == 'workers'  # which note it in processes of their own
    assert all(0 < sum(sizes) <= len(allowed) for sizes in trainer.recorder.sizes)
    assert torch.isfinite(weights_of(trainer)).all()


# ---------------------------------------------------------------------- ranks


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory, forked) -> list[dict[str, dict]]:
    """What every row came to on each of two ranks, from one launch that all workers of pytest-xdist share."""
    alone = 'PYTEST_XDIST_WORKER' not in os.environ
    folder = tmp_path_factory.mktemp('ranks') if alone else tmp_path_factory.getbasetemp().parent / 'ranks'
    folder.mkdir(exist_ok=True)
    with FileLock(folder / 'lock'):
        if not (folder / 'ranks.pt').exists():
            status, said = forked(str(Path(over_ranks.__file__)), str(folder), ranks=2)
            assert status == 0, said[-6000:]
    return torch.load(folder / 'ranks.pt', weights_only=False)


@pytest.mark.distributed
def test_two_ranks_train_as_one(row, two_ranks):
    first, second = (rank[row] for rank in two_ranks)
    assert torch.equal(first['model'], second['model'])
    assert first['lrs'] == second['lrs']
    assert first['batches'] == second['batches']
    for mine, theirs in zip(first['orders'], second['orders'], strict=True):
        assert not set(mine) & set(theirs)
    for mine, theirs in zip(first['scores'], second['scores'], strict=True):
        assert torch.equal(mine.nan_to_num(-1), theirs.nan_to_num(-1))  # NaN: never trained on
    if SETTINGS[row].measures_ranks:
        return
    alone = over_ranks.train(row)
    assert first['batches'] == alone['batches']
    assert first['lrs'] == alone['lrs']
    for mine, theirs, whole in zip(first['orders'], second['orders'], alone['orders'], strict=True):
        assert (mine, theirs) == (whole[::2], whole[1::2])  # one order, dealt out
    for mine, theirs, whole in zip(first['weights'], second['weights'], alone['weights'], strict=True):
        assert mine == pytest.approx(whole[::2], abs=1e-4)
        assert theirs == pytest.approx(whole[1::2], abs=1e-4)
    for mine, whole in zip(first['scores'], alone['scores'], strict=True):
        assert torch.allclose(mine, whole, atol=1e-4, equal_nan=True)
    assert torch.allclose(first['model'], alone['model'], atol=1e-4)
