"""The plan as part of a run: checkpoints, later fits and loaders, subsets of batches."""

import gc
import itertools
import warnings
from collections import Counter

import pytest
import torch
from composer import DataSpec
from composer.core import Callback
from composer.optim import LinearScheduler
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset

from composer_effalgos import AdaBatch, InfoBatch, InputError, LinUpper, SubsetSelection
from composer_effalgos.plan import EpochPlanner


def all_three():
    return [InfoBatch(delta=1.0), AdaBatch(2, '2ep', lr_factor=0.75), SubsetSelection('gradmatch', 0.8, '2ep')]


@pytest.fixture
def save(make_trainer, tmp_path):
    """Trains for a while and gives one of the checkpoints, counted from the first."""

    def run(algorithms, interval: str, number: int, **kwargs) -> str:
        trainer = make_trainer(
            algorithms, save_folder=str(tmp_path / 'saved'), save_interval=interval, save_filename='{epoch}-{batch}.pt', **kwargs
        )
        trainer.fit()
        return str(sorted((tmp_path / 'saved').glob('[0-9]*.pt'), key=lambda path: int(path.stem.split('-')[1]))[number])

    return run


class Save(Callback):
    """Saves a checkpoint from a user's own callback, once."""

    def __init__(self, path, event: str, when):
        setattr(self, event, self._save)
        self.path, self.when, self.trainer, self.batch = str(path), when, None, None

    def _save(self, state, logger):
        if self.batch is None and self.when(state):
            self.batch = int(state.timestamp.batch)
            self.trainer.save_checkpoint(self.path)


MOMENTS = {
    'end of an epoch': ('epoch_end', lambda state: state.timestamp.epoch == 2),
    'within an epoch': ('batch_end', lambda state: state.timestamp.epoch == 1 and state.timestamp.batch_in_epoch == 3),
    'last batch': ('batch_end', lambda state: state.timestamp.epoch == 1 and state.timestamp.batch_in_epoch == state.dataloader_len),
}


@pytest.mark.parametrize('passed', [False, True], ids=['', 'planner passed'])
@pytest.mark.parametrize('kind', ['composer', 'torch'])
@pytest.mark.parametrize('moment', MOMENTS)
def test_a_callback_that_saves_at_the_end_of_a_batch_or_epoch(make_trainer, tmp_path, weights_of, kind, moment, passed):
    def run(callbacks=(), **load):
        schedule = {'schedulers': LinearScheduler()} if kind == 'composer' else {'scheduler_of': lambda o: ExponentialLR(o, 0.95)}
        algorithms = [InfoBatch(delta=1.0)]
        return make_trainer(algorithms, callbacks=callbacks, max_duration='4ep', step_schedulers_every_batch=True, **schedule, **load)

    save = Save(tmp_path / 'saved.pt', *MOMENTS[moment])
    whole = save.trainer = run([save, EpochPlanner()] if passed else [save])
    whole.fit()
    (path,) = tmp_path.iterdir()
    resumed = run(load_path=str(path))
    resumed.fit()
    lrs = [lr for epoch in whole.recorder.lrs for lr in epoch][save.batch :]
    assert [lr for epoch in resumed.recorder.lrs for lr in epoch] == lrs
    assert torch.equal(weights_of(whole), weights_of(resumed))
    callbacks = torch.load(path, weights_only=False)['state']['callbacks']
    assert set(callbacks) == {'Recorder', 'Save', 'EpochPlanner'}
    assert (callbacks['EpochPlanner']['plan'] is None) == (moment == 'end of an epoch')


def test_callbacks_prepare_an_epoch_before_it_is_planned(make_trainer, problem):
    class Half(Sampler):
        first = 0

        def __iter__(self):
            return iter(range(self.first, self.first + 96))

        def __len__(self):
            return 96

    class Prepare(Callback):
        def __init__(self):
            self.sampler, self.seen, self.lengths = Half(), [], []

        def epoch_start(self, state, logger):
            self.sampler.first = 48 * int(state.timestamp.epoch)
            self.lengths.append(int(state.dataloader_len))

        def batch_start(self, state, logger):
            self.seen.append(state.batch[0])

    runs = []
    for algorithms in ([], [AdaBatch(2, '9ep')]):
        prepare = Prepare()
        loader = DataLoader(problem, batch_size=16, sampler=prepare.sampler)
        make_trainer(algorithms, train_loader=loader, callbacks=[prepare], max_duration='3ep').fit()
        runs.append(prepare)
    assert torch.equal(*(torch.cat(run.seen) for run in runs))
    assert runs[0].lengths == runs[1].lengths == [6, 6, 6]


def test_a_checkpoint_of_another_data_set_is_refused(make_trainer, save, problem):
    path = save([InfoBatch()], '2ep', 0, max_duration='2ep')
    smaller = TensorDataset(*(t[:150] for t in problem.tensors))
    trainer = make_trainer([InfoBatch()], dataset=smaller, load_path=path, max_duration='4ep')
    with pytest.raises(InputError, match='load_path: the checkpoint was saved with a training set of 203 samples, this one has 150'):
        trainer.fit()
    make_trainer([InfoBatch()], dataset=smaller, load_path=path, load_weights_only=True, max_duration='1ep').fit()


def test_a_checkpoint_of_a_run_without_us(make_trainer, save):
    path = save([], '2ep', 0, schedulers=LinearScheduler())
    full = make_trainer(schedulers=LinearScheduler())
    full.fit()
    trainer = make_trainer(all_three(), schedulers=LinearScheduler(), load_path=path)
    trainer.fit()
    factors = [0.75, 0.75, 0.75**2, 0.75**2]
    expected = [factor * epoch[0] for factor, epoch in zip(factors, full.recorder.lrs[2:], strict=True)]
    assert [epoch[0] for epoch in trainer.recorder.lrs] == pytest.approx(expected, rel=1e-6)


def test_a_checkpoint_within_an_epoch_of_a_run_without_us_is_refused(make_trainer, save):
    path = save([], '5ba', 0, max_duration='1ep')
    with pytest.raises(InputError, match='saved within an epoch by a run without these algorithms'):
        make_trainer([InfoBatch()], load_path=path).fit()


def test_our_checkpoints_go_on_without_us(make_trainer, save):
    path = save(all_three(), '2ep', 0, max_duration='2ep')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer = make_trainer(load_path=path, max_duration='3ep')
    trainer.fit()
    assert [sum(sizes) for sizes in trainer.recorder.sizes] == [203]


def test_a_resume_that_would_train_on_finished_batches_again_is_refused(make_trainer, save):
    trainer = make_trainer([InfoBatch()], load_path=save([InfoBatch()], '5ba', 3), spin_dataloaders=False)
    gc.collect()
    gc.freeze()  # as in scripts that keep the collector off what they have built: the Trainer is found all the same
    with pytest.raises(InputError, match=r'^spin_dataloaders: expected True for a run that continues within an epoch, got False'):
        trainer.fit()


@pytest.mark.parametrize('number', [1, 6, 9, 13])
def test_resuming_within_this_process(make_trainer, save, weights_of, number):
    whole = make_trainer(all_three(), schedulers=LinearScheduler(), max_duration='5ep')
    whole.fit()
    path = save(all_three(), '2ba', number, schedulers=LinearScheduler(), max_duration='5ep')
    resumed = make_trainer(all_three(), schedulers=LinearScheduler(), max_duration='5ep', load_path=path)
    resumed.fit()
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert resumed.state.algorithms[0].samples_saved == whole.state.algorithms[0].samples_saved
    assert torch.equal(resumed.state.algorithms[2].indices, whole.state.algorithms[2].indices)


def test_checkpoints_at_epoch_ends_are_small(make_trainer, save):
    path = save([InfoBatch()], '1ep', 0, max_duration='1ep')
    (plan,) = [v for k, v in torch.load(path, weights_only=False)['state']['callbacks'].items() if k == 'EpochPlanner']
    assert plan['plan'] is None


def test_workers_survive_the_run(make_trainer, problem):
    class Watch(Callback):
        def __init__(self):
            self.epochs = []

        def epoch_end(self, state, logger):
            loader = state.train_dataloader
            self.epochs.append({worker.pid for worker in loader._path._inner._iterator._workers})

    watch = Watch()
    loader = DataLoader(problem, 16, shuffle=True, num_workers=2, persistent_workers=True)
    trainer = make_trainer(all_three(), train_loader=loader, callbacks=[watch], max_duration='5ep')
    trainer.fit()
    trainer.fit(duration='1ep')
    assert len(watch.epochs) == 6
    assert all(pids == watch.epochs[0] for pids in watch.epochs)
    assert len(watch.epochs[0]) == 2


def test_some_batches_an_epoch(make_trainer):
    trainer = make_trainer([InfoBatch(delta=1.0)], train_subset_num_batches=4, schedulers=LinearScheduler(), max_duration='5ep')
    trainer.fit()
    assert [len(sizes) for sizes in trainer.recorder.sizes] == [4] * 5
    plain = make_trainer(train_subset_num_batches=4, schedulers=LinearScheduler(), max_duration='5ep')
    plain.fit()
    assert [e[0] for e in trainer.recorder.lrs] == pytest.approx([e[0] for e in plain.recorder.lrs], rel=1e-6)


def test_some_batches_an_epoch_in_a_later_fit(make_trainer):
    trainer = make_trainer([InfoBatch(delta=1.0)], max_duration='2ep')
    trainer.fit()
    trainer.fit(duration='2ep', train_subset_num_batches=3)
    assert [len(sizes) for sizes in trainer.recorder.sizes][2:] == [3, 3]


class Numbers(IterableDataset):
    def __init__(self, problem):
        self.problem = problem

    def __iter__(self):
        return iter(self.problem)


class Counted(Numbers):
    def __len__(self):
        return len(self.problem)


LOADERS = {
    'shuffled': lambda problem: DataLoader(problem, batch_size=16, shuffle=True),
    'own order': lambda problem: DataLoader(problem, batch_size=16, sampler=range(202, -1, -1)),
    'stream': lambda problem: DataLoader(Numbers(problem), batch_size=16),
    'stream with a length': lambda problem: DataLoader(Counted(problem), batch_size=16),
}


@pytest.mark.parametrize(
    ('loader', 'limits'),
    [(loader, (3, 6, None, 50, 2)) for loader in LOADERS] + [(loader, (None, 6, 13)) for loader in LOADERS if loader != 'stream'],
)
@pytest.mark.filterwarnings('ignore')
def test_another_number_of_batches_in_every_fit(make_trainer, problem, loader, limits):
    lengths = []
    for algorithms in ([], [LinUpper(burn_in=None)]):
        trainer = make_trainer(algorithms, train_loader=LOADERS[loader](problem))
        for limit in limits:
            trainer.fit(duration='2ep', **({} if limit is None else {'train_subset_num_batches': limit}))
        trainer.eval(DataLoader(problem, batch_size=50))
        trainer.fit(duration='3ba', train_subset_num_batches=5)
        trainer.fit(duration='2ep')
        lengths.append([len(sizes) for sizes in trainer.recorder.sizes])
    assert lengths[1] == lengths[0]


def test_more_batches_than_the_last_pruned_epoch_had(make_trainer):
    trainer = make_trainer([InfoBatch(prune_ratio=0.95, delta=0.5)], max_duration='6ep')
    trainer.fit(duration='3ep')
    last = len(trainer.recorder.sizes[-1])
    assert last < 9
    trainer.fit(duration='3ep', train_subset_num_batches=9)
    assert [len(sizes) for sizes in trainer.recorder.sizes[3:]] == [9, 9, 9]


def test_another_loader_within_an_epoch(make_trainer, problem):
    trainer = make_trainer(all_three(), max_duration='5ba')
    trainer.fit()
    trainer.fit(train_dataloader=DataLoader(problem, batch_size=10, shuffle=True), duration='30ba')
    assert int(trainer.state.timestamp.batch) == 35


def test_the_same_data_in_another_loader_within_an_epoch_goes_on(make_trainer, problem):
    trainer = make_trainer([InfoBatch()], max_duration='5ba')
    trainer.fit()
    before = EpochPlanner.of(trainer.state).loader.plan.order
    trainer.fit(train_dataloader=DataLoader(problem, batch_size=16, shuffle=True), duration='8ba')
    assert torch.equal(EpochPlanner.of(trainer.state).loader.plan.order, before)
    assert sum(trainer.recorder.sizes[0]) == 203
    assert not trainer.state.algorithms[0].scores.isnan().any()


class Interrupt(Callback):
    def batch_end(self, state, logger):
        if int(state.timestamp.batch) == 20:
            raise KeyboardInterrupt


def test_fit_again_after_an_interrupt(make_trainer, weights_of):
    whole = make_trainer(all_three(), max_duration='3ep')
    whole.fit()
    trainer = make_trainer(all_three(), max_duration='3ep', callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.fit()
    assert torch.equal(weights_of(whole), weights_of(trainer))
    assert torch.equal(*(t.state.algorithms[0].scores.nan_to_num(-1) for t in (whole, trainer)))


def test_an_epoch_weighted_by_others_is_refused(make_trainer, save):
    path = save([InfoBatch(delta=1.0)], '20ba', 0, max_duration='3ep')
    for algorithm in (AdaBatch(2, '9ep'), SubsetSelection('random', 0.5)):
        with pytest.raises(InputError, match='weighted by algorithms that this run does not have'):
            make_trainer([algorithm], load_path=path).fit()


def test_another_fraction_on_resume(make_trainer, save):
    path = save([SubsetSelection('random', 0.3)], '1ep', 0, max_duration='1ep')
    trainer = make_trainer([SubsetSelection('random', 0.6)], load_path=path, max_duration='2ep')
    trainer.fit()
    assert [sum(sizes) for sizes in trainer.recorder.sizes] == [122]


def test_evaluation_within_an_epoch(make_trainer, problem, weights_of):
    runs = []
    for arguments in ({}, {'eval_dataloader': DataLoader(problem, batch_size=50), 'eval_interval': '3ba'}):
        trainer = make_trainer(all_three(), max_duration='3ep', **arguments)
        trainer.fit()
        runs.append(trainer)
    assert runs[0].recorder.sizes == runs[1].recorder.sizes
    assert torch.equal(*map(weights_of, runs))
    accuracy = runs[1].state.eval_metrics['eval']['MulticlassAccuracy'].compute()
    assert 0.3 < accuracy <= 1


def test_data_specs_keep_their_transforms(make_trainer, problem):
    trainer = make_trainer([InfoBatch(delta=1.0)], max_duration='1ep')
    seen = []

    def double(batch):
        seen.append(len(batch[1]))
        return batch[0] * 2, batch[1]

    spec = DataSpec(DataLoader(problem, batch_size=20, shuffle=True), batch_transforms=double)
    trainer.fit(train_dataloader=spec, duration='2ep')
    # some samples of batches 1, 2, 4, ... go through it again, in several orders
    assert not Counter(itertools.chain(*trainer.recorder.sizes)) - Counter(seen)


def test_samples_that_are_counted_otherwise_are_refused_where_the_plan_counts_them(make_trainer, problem):
    def train(algorithm, **arguments):
        loader = DataSpec(DataLoader(problem, 16, shuffle=True), get_num_samples_in_batch=lambda batch: 2 * len(batch[0]))
        trainer = make_trainer([algorithm], train_loader=loader, **{'max_duration': '2ep'} | arguments)
        trainer.fit()
        return trainer

    for algorithm in (AdaBatch(2, milestones=['0.5dur']), LinUpper(burn_in='0.5dur')):
        with pytest.raises(InputError, match=r'^train_dataloader: expected the number of dataset items .*, 16 in this batch, got 32'):
            train(algorithm)
    assert sum(map(sum, train(InfoBatch(delta=1.0)).recorder.sizes)) < 2 * 203  # counts nothing


def test_one_plan_a_run_found_again_in_later_fits(make_trainer, problem):
    trainer = make_trainer(all_three(), max_duration='2ep')
    trainer.fit()
    plan = EpochPlanner.of(trainer.state)
    loader = plan.loader
    assert loader.dataset is problem
    trainer.fit(duration='1ep')
    assert plan.loader is loader
    trainer.fit(duration='1ep', train_dataloader=DataLoader(problem, batch_size=10, shuffle=True))
    assert plan.loader is not loader
    assert [c for c in trainer.state.callbacks if isinstance(c, EpochPlanner)] == [plan]


def test_after_the_run_the_state_has_the_loader_that_was_given(make_trainer, problem):
    given = DataLoader(problem, batch_size=16, shuffle=True)
    trainer = make_trainer([InfoBatch(prune_ratio=0.9, delta=1.0)], train_loader=given, max_duration='5ba')
    trainer.fit()
    assert trainer.state.train_dataloader is given  # within an epoch too
    trainer.fit(duration='3ep')
    assert min(sum(sizes) for sizes in trainer.recorder.sizes) < 150
    assert trainer.state.train_dataloader is given
    another = make_trainer([], train_loader=trainer.state.train_dataloader, max_duration='1ep')
    another.fit()
    assert [sum(sizes) for sizes in another.recorder.sizes] == [203]
    trainer.fit(duration='1ep')
    assert trainer.state.train_dataloader is given


@pytest.mark.parametrize(
    'algorithm', [InfoBatch(delta=1.0), AdaBatch(2, '1ep'), SubsetSelection('random', 0.5)], ids=lambda a: type(a).__name__
)
def test_a_dataset_smaller_than_a_batch(make_trainer, algorithm):
    trainer = make_trainer([algorithm], batch_size=300, max_duration='3ep', schedulers=LinearScheduler())
    trainer.fit()
    plain = make_trainer(batch_size=300, max_duration='3ep', schedulers=LinearScheduler())
    plain.fit()
    sizes = [sum(epoch) for epoch in trainer.recorder.sizes]
    assert sizes[0] == (102 if isinstance(algorithm, SubsetSelection) else 203)
    assert [len(epoch) for epoch in trainer.recorder.sizes] == [1, 1, 1]
    if not isinstance(algorithm, AdaBatch):
        assert trainer.recorder.lrs == plain.recorder.lrs
    else:
        assert sizes == [203, 203, 203]


def test_refusals_at_the_start(make_trainer, problem):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(*problem.tensors, strict=True)

    trainer = make_trainer([InfoBatch()])
    with pytest.raises(InputError, match='expected a map-style dataset'):
        trainer.fit(train_dataloader=DataLoader(Stream(), batch_size=8), duration='10ba')
    for algorithm in (InfoBatch(), AdaBatch(), SubsetSelection('random', 0.5)):
        with pytest.raises(InputError, match=r'expected at least one whole batch with drop_last, got .* for batch_size 300 on 1 rank'):
            make_trainer([algorithm], batch_size=300, drop_last=True).fit()
    other = make_trainer([InfoBatch()])
    other.fit()
    with pytest.raises(InputError, match="another run's planned loader"):
        make_trainer([InfoBatch()]).fit(train_dataloader=other.state.dataloader)


def test_a_compiled_model_sees_two_sizes_a_growth_stage(make_trainer):
    """Under ``torch.compile(dynamic=False)``, which gives up after eight."""
    compiled = []

    def backend(graph, inputs):
        compiled.append([tuple(item.shape) for item in inputs if isinstance(item, torch.Tensor)])
        return graph.forward

    def fit(callbacks):
        torch.compiler.reset()
        compiled.clear()
        algorithms = [InfoBatch(0.5, delta=1.0), AdaBatch(2, '10ep', max_batch_size=32)]
        compiling = {'backend': backend, 'dynamic': False}
        trainer = make_trainer(algorithms, callbacks=callbacks, max_duration='20ep', compile_config=compiling)
        trainer.fit()
        return trainer, {size for sizes in trainer.recorder.sizes for size in sizes}

    _, without = fit([])
    trainer, sizes = fit([EpochPlanner(tail='half')])
    assert sizes == {16, 8, 32}  # of 16 and 8, then of 32 and 16
    assert len(compiled) == len(sizes) < 8 < len(without)
    kept = [len(EpochPlanner.of(trainer.state).loader.plan.kept), sum(trainer.recorder.sizes[-1])]
    assert 0 <= kept[0] - kept[1] < 16  # fewer than half a batch are left out
    assert sum(trainer.recorder.sizes[0]) == 200  # 12 x 16 + 8, of 203
    with pytest.raises(InputError, match="tail: expected 'shared' or 'half', got 'none'"):
        EpochPlanner(tail='none')
