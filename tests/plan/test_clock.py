import math
import warnings

import pytest
import torch
from composer.core import Time
from composer.optim import (
    ConstantScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingScheduler,
    CosineAnnealingWarmRestartsScheduler,
    CosineAnnealingWithWarmupScheduler,
    ExponentialScheduler,
    LinearScheduler,
    LinearWithWarmupScheduler,
    MultiStepScheduler,
    MultiStepWithWarmupScheduler,
    PolynomialScheduler,
    PolynomialWithWarmupScheduler,
    StepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

from composer_effalgos import AdaBatch, InfoBatch, LinUpper, SubsetSelection
from composer_effalgos.plan import EpochPlanner, split_batches
from composer_effalgos.plan.clock import virtual_batch

COMPOSER_SCHEDULES = [
    StepScheduler('2ep', 0.5),
    MultiStepScheduler(['2ep', '0.75dur'], 0.1),
    MultiStepScheduler(['30ba', '600sp'], 0.1),
    PolynomialScheduler(t_max='1000sp', power=2),
    ConstantScheduler(0.5, '0.5dur'),
    LinearScheduler(1.0, 0.1),
    ExponentialScheduler(0.9),
    CosineAnnealingScheduler(),
    CosineAnnealingWarmRestartsScheduler('2ep'),
    PolynomialScheduler(2),
    MultiStepWithWarmupScheduler('1ep', ['2ep', '4ep']),
    ConstantWithWarmupScheduler('10ba'),
    LinearWithWarmupScheduler('1ep'),
    CosineAnnealingWithWarmupScheduler('1ep', '1dur'),
    PolynomialWithWarmupScheduler('0.25dur'),
]
TORCH_SCHEDULES = {
    'one cycle': (lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=6 * 13), True),
    'cosine by batch': (lambda o: lr_scheduler.CosineAnnealingLR(o, 6 * 13), True),
    'lambda by batch': (lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)), True),
    'cosine by epoch': (lambda o: lr_scheduler.CosineAnnealingLR(o, 6), False),
    'steps by epoch': (lambda o: lr_scheduler.MultiStepLR(o, [2, 4]), False),
    'sequence': (
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o, 0.1, total_iters=13), lr_scheduler.CosineAnnealingLR(o, 65)], milestones=[13]
        ),
        True,
    ),
}


def all_three():
    return [InfoBatch(0.5, 0.8), AdaBatch(2, '2ep'), SubsetSelection('random', 0.6)]


def name(schedule) -> str:
    return type(schedule).__name__


def assert_same_schedule(full, planned) -> None:
    """The same learning rate at every epoch boundary and at the end, in fewer batches."""
    assert sum(map(len, planned.recorder.lrs)) < sum(map(len, full.recorder.lrs))
    firsts = [(a[0], b[0]) for a, b in zip(full.recorder.lrs, planned.recorder.lrs, strict=True)]
    assert [b for _, b in firsts] == pytest.approx([a for a, _ in firsts], rel=1e-6)
    assert lr_of(planned) == pytest.approx(lr_of(full), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize('schedule', COMPOSER_SCHEDULES, ids=name)
def test_composer_schedules_keep_the_time_of_the_full_run(make_trainer, schedule):
    trainers = [make_trainer(algorithms, schedulers=schedule) for algorithms in ([], all_three())]
    for trainer in trainers:
        trainer.fit()
    assert_same_schedule(*trainers)


@pytest.mark.parametrize(
    'algorithm', [lambda: InfoBatch(0.6), lambda: AdaBatch(2, '2ep'), lambda: AdaBatch(2, '20ba')], ids=['prune', 'grow', 'ramp']
)
def test_each_algorithm_keeps_the_time_of_the_full_run(make_trainer, algorithm):
    trainers = [make_trainer(a, schedulers=CosineAnnealingWithWarmupScheduler('1ep', '1dur')) for a in ([], [algorithm()])]
    for trainer in trainers:
        trainer.fit()
    assert_same_schedule(*trainers)


@pytest.mark.parametrize('schedule', TORCH_SCHEDULES)
def test_pytorch_schedulers_keep_the_time_of_the_full_run(make_trainer, schedule):
    make, by_batch = TORCH_SCHEDULES[schedule]
    trainers = [make_trainer(a, scheduler_of=make, step_schedulers_every_batch=by_batch) for a in ([], all_three())]
    for trainer in trainers:
        trainer.fit()
    assert_same_schedule(*trainers)


def lr_of(trainer) -> float:
    return trainer.state.optimizers[0].param_groups[0]['lr']


@given(st.integers(1, 200), st.integers(1, 400))
def test_virtual_batches(planned, full):
    full = max(planned, full)
    times = [virtual_batch(16 * b, 16 * (planned - 1), full) for b in range(planned)]
    assert times == sorted(set(times))
    assert times[-1] == full - 1
    assert times[0] == 0 or planned == 1
    if planned == full:
        assert times == list(range(full))


@given(st.integers(1, 200), st.integers(1, 400))
def test_virtual_batches_of_a_longer_epoch(full, more):
    planned = full + more
    times = [virtual_batch(16 * b, 16 * (planned - 1), full, None) for b in range(planned)]
    assert times.count(full - 1) == 1 or full == 1
    assert times == sorted(times)
    assert set(times) == set(range(full))


SMALL_BATCHES = {
    'halved': '0:8',
    'a ramp': {'start': 4, 'stop': 16, 'increment': 4, 'over': '64sp'},
    'halved, then doubled': '0:8 1ep:32',
}


@pytest.mark.parametrize('schedule', SMALL_BATCHES.values(), ids=SMALL_BATCHES)
def test_batches_smaller_than_the_loaders_share_the_steps_of_the_schedule(make_trainer, problem, schedule):
    trainers = []
    for algorithms in ([], [AdaBatch(schedule=schedule)]):
        data = TensorDataset(*(t[:128] for t in problem.tensors))
        trainer = make_trainer(algorithms, dataset=data, max_duration='2ep', schedulers=LinearWithWarmupScheduler('2ba'))
        trainer.fit()
        trainers.append(trainer)
    plain, small = (trainer.recorder for trainer in trainers)
    assert len(small.lrs[0]) > len(plain.lrs[0]) == 8
    assert [lrs[0] for lrs in small.lrs] == pytest.approx([lrs[0] for lrs in plain.lrs])
    assert lr_of(trainers[1]) == pytest.approx(lr_of(trainers[0]), abs=1e-9)
    assert small.lrs[0][-1] == pytest.approx(plain.lrs[0][-1])
    assert sorted(set(small.lrs[0])) == pytest.approx(sorted(set(plain.lrs[0])))  # every value, none skipped
    top = small.lrs[0].index(max(small.lrs[0]))
    assert small.lrs[0] == sorted(small.lrs[0][:top]) + sorted(small.lrs[0][top:], reverse=True)
    for batch, lr in enumerate(small.lrs[0]):  # within a step of what the plain run has after as many samples
        there = sum(small.sizes[0][:batch]) // 16
        near = plain.lrs[0][max(0, there - 1) : there + 2]
        assert min(near) - 1e-9 <= lr <= max(near) + 1e-9
    if set(small.sizes[0]) == {8}:
        assert small.lrs[0] == pytest.approx([lr for lr in plain.lrs[0] for _ in range(2)])


@given(st.integers(40, 3000), st.integers(2, 130), st.integers(1, 4), st.floats(0.3, 1), st.integers(1, 4))
def test_an_epoch_takes_the_steps_of_the_full_one(n, batch_size, world, kept, growth):
    full = split_batches(n, batch_size, world)
    sizes = split_batches(int(kept * n), lambda b, s: batch_size * (growth if s > n // 3 else 1), world)
    if not full or not sizes:
        return
    before, steps, where = 0, 0, []
    for number, size in enumerate(sizes):
        where.append(virtual_batch(before, sum(sizes[:-1]), len(full), len(sizes) - number))
        steps += 1 + max(0, where[-1] - steps)  # the trainer's own and what the clock adds
        before += size
    assert steps == len(full)
    assert where == sorted(where)
    assert where[-1] == len(full) - 1


@pytest.mark.parametrize('algorithm', [lambda: InfoBatch(prune_ratio=0), InfoBatch, lambda: AdaBatch(interval='99ep')])
def test_one_cycle_is_not_stepped_past_its_end(make_trainer, algorithm):
    # 361 samples in batches of 18: one is left over, and the last two batches have 8 and 11
    data = TensorDataset(torch.randn(361, 8, generator=torch.Generator().manual_seed(0)), torch.arange(361) % 3)
    trainer = make_trainer(
        [algorithm()],
        dataset=data,
        batch_size=18,
        max_duration='3ep',
        scheduler_of=lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=63),
        step_schedulers_every_batch=True,
    )
    trainer.fit()
    assert trainer.state.schedulers[0].last_epoch == 63


def test_a_second_fit_goes_on_where_the_full_run_would(make_trainer):
    lrs = []
    for algorithms in ([], [InfoBatch(0.6, delta=1.0)]):
        trainer = make_trainer(algorithms, schedulers=CosineAnnealingScheduler(t_max='10ep'), max_duration='5ep')
        trainer.fit()
        trainer.fit(duration='3ep')
        trainer.fit(duration='2ep', schedulers=LinearScheduler(t_max='10ep'))
        lrs.append([epoch[0] for epoch in trainer.recorder.lrs] + [lr_of(trainer)])
    assert lrs[1] == pytest.approx(lrs[0], rel=1e-6, abs=1e-9)
    assert len([c for c in trainer.state.callbacks if isinstance(c, EpochPlanner)]) == 1


@pytest.mark.parametrize('durations', [('3ba', '1ep'), ('1ep', '40sp', '1ep'), ('3ba', '1ep', '2ba', '20sp', '2ep'), ('3ba', '30ba')])
def test_pytorch_schedulers_get_one_step_a_batch_in_fits_of_any_unit(make_trainer, durations):
    lrs = []
    for algorithms in ([], [LinUpper(burn_in=None)]):
        trainer = make_trainer(algorithms, scheduler_of=lambda o: lr_scheduler.ExponentialLR(o, 0.5), step_schedulers_every_batch=True)
        for duration in durations:
            trainer.fit(duration=duration)
        lrs.append(trainer.recorder.lrs)
    assert lrs[1] == lrs[0]


def test_a_checkpoint_in_another_unit_goes_on_in_epochs(make_trainer, tmp_path):
    arguments = {'scheduler_of': lambda o: lr_scheduler.ExponentialLR(o, 0.5), 'step_schedulers_every_batch': True}
    trainer = make_trainer([InfoBatch(0.6)], max_duration='4ba', **arguments)
    trainer.fit()
    trainer.save_checkpoint(str(tmp_path / 'saved.pt'))
    trainer.fit(duration='2ep')
    resumed = make_trainer([InfoBatch(0.6)], max_duration='2ep', load_path=str(tmp_path / 'saved.pt'), **arguments)
    resumed.fit()
    assert resumed.recorder.lrs[0] == trainer.recorder.lrs[0][4:]
    assert resumed.recorder.lrs[0] == [0.1 * 0.5**b for b in range(4, 13)]


def test_reset_time_starts_the_clock_anew(make_trainer):
    trainer = make_trainer([InfoBatch(0.6)], schedulers=LinearScheduler())
    trainer.fit()
    trainer.fit(duration='6ep', reset_time=True)
    again = [epoch[0] for epoch in trainer.recorder.lrs[6:]]
    assert again[1:] == pytest.approx([0.1 * (1 - e / 6 + 1 / 78) for e in range(1, 6)], rel=1e-6)


def test_runs_of_fixed_length_keep_real_time_and_say_so_once(make_trainer):
    trainer = make_trainer([InfoBatch(0.6)], schedulers=LinearScheduler(), max_duration='60ba')
    with pytest.warns(UserWarning, match='saves no time'):
        trainer.fit()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        trainer.fit(duration='10ba')
    assert not [w for w in caught if 'saves no time' in str(w.message)]
    steps = [lr for epoch in trainer.recorder.lrs for lr in epoch]
    assert steps[1:60] == pytest.approx([0.1 * (1 - b / 60) for b in range(59)], rel=1e-6)
    assert trainer.state.timestamp.batch == Time(70, 'ba')


def test_schedules_are_found_not_wrapped_again(make_trainer):
    trainer = make_trainer([InfoBatch(0.6)], schedulers=LinearScheduler(t_max='12ep'))
    trainer.fit()
    (function,) = trainer.state.schedulers[0].lr_lambdas
    trainer.fit(duration='6ep')
    assert trainer.state.schedulers[0].lr_lambdas == [function]


def test_states_hold_real_time_between_steps(make_trainer):
    trainer = make_trainer([InfoBatch(0.6)], schedulers=LinearScheduler())
    trainer.fit()
    assert int(trainer.state.timestamp.batch) == sum(map(len, trainer.recorder.lrs))
    assert math.isclose(int(trainer.state.timestamp.sample), sum(map(sum, trainer.recorder.sizes)))
    assert torch.isfinite(trainer.state.loss)
