import warnings

import pytest
import torch
from composer.callbacks import LRMonitor
from composer.loggers import InMemoryLogger
from composer.optim import ConstantScheduler, DecoupledSGDW, LinearScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from composer_effalgos import AdaBatch, InputError
from composer_effalgos.adabatch.sizes import Size, Sizes
from composer_effalgos.plan import EpochPlanner


def epoch_sizes(trainer) -> list[int]:
    return [sizes[0] for sizes in trainer.recorder.sizes]


def test_doubles_at_intervals_and_loses_no_sample(make_trainer):
    trainer = make_trainer([AdaBatch(2, '2ep')])
    trainer.fit()
    assert epoch_sizes(trainer) == [16, 16, 32, 32, 64, 64]
    assert [sum(sizes) for sizes in trainer.recorder.sizes] == [203] * 6
    assert trainer.recorder.sizes[4] == [64, 64, 32, 43]
    assert EpochPlanner.of(trainer.state).loader.batch_size == 64


def test_milestones_replace_the_interval(make_trainer):
    trainer = make_trainer([AdaBatch(3, milestones=['1ep', '0.5dur'])])
    trainer.fit()
    assert epoch_sizes(trainer) == [16, 48, 48, 96, 96, 96]  # 144 and 59, of which 59 is less than half: 96 and 107
    assert EpochPlanner.of(trainer.state).loader.batch_size == 144


def test_factors_that_are_not_whole(make_trainer):
    trainer = make_trainer([AdaBatch(1.5, '1ep')], max_duration='4ep')
    trainer.fit()
    assert epoch_sizes(trainer) == [16, 24, 36, 54]


@pytest.mark.parametrize('workers', [0, 2])
def test_grows_within_an_epoch_at_the_very_batch(make_trainer, workers):
    trainer = make_trainer([AdaBatch(2, milestones=['5ba', '19ba'])], max_duration='3ep', num_workers=workers)
    trainer.fit()
    flat = [size for sizes in trainer.recorder.sizes for size in sizes]
    assert flat[:6] == [16] * 5 + [32]
    assert flat[18:21] == [32, 64, 43]
    assert [sum(sizes) for sizes in trainer.recorder.sizes] == [203] * 3
    trainer = make_trainer([AdaBatch(2, '100sp')], max_duration='1ep')
    trainer.fit()
    assert trainer.recorder.sizes == [[16] * 7 + [32, 32, 27]]  # 112 samples is the first batch boundary past 100; 200 comes too late


def test_learning_rate_on_top_of_a_schedule(make_trainer):
    plain = make_trainer(schedulers=LinearScheduler())
    plain.fit()
    logger = InMemoryLogger()
    grown = make_trainer([AdaBatch(2, '2ep', lr_factor=0.75)], schedulers=LinearScheduler(), callbacks=[LRMonitor()], loggers=[logger])
    grown.fit()
    ratio = [b[0] / a[0] for a, b in zip(plain.recorder.lrs, grown.recorder.lrs, strict=True)]
    assert ratio == pytest.approx([1, 1, 0.75, 0.75, 0.75**2, 0.75**2], rel=1e-6)
    seen = [value for _, value in logger.data['lr-SGD/group0']]
    steps = [lr for epoch in grown.recorder.lrs for lr in epoch]
    # LRMonitor reads after the schedule's step: what it sees is the next batch's learning rate, but for a growth in between
    assert sum(a == pytest.approx(b) for a, b in zip(seen[:-1], steps[1:], strict=True)) >= len(steps) - 3
    assert seen[-1] == pytest.approx(0.75**2 * 0.1 / 78)


@pytest.mark.parametrize(
    'scheduler_of',
    [
        None,
        lambda o: lr_scheduler.MultiStepLR(o, [3], 0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 6, eta_min=0.04),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=0.02),
        lambda o: lr_scheduler.CyclicLR(o, 0.05, 0.2, step_size_up=4, cycle_momentum=False),
        lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=5),
        lambda o: lr_scheduler.PolynomialLR(o, 8, power=2.0),
        lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
        lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.MultiStepLR(o, [3], 0.5)]),
        lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=7, cycle_momentum=False),
    ],
    ids=['none', 'steps', 'cosine', 'cosine to a floor', 'restarts', 'cyclic', 'linear', 'polynomial', 'lambda', 'chained', 'one cycle'],
)
def test_learning_rate_on_top_of_pytorch_schedulers(make_trainer, scheduler_of):
    runs = []
    for algorithms in ([], [AdaBatch(2, '2ep', lr_factor=0.5)]):
        trainer = make_trainer(algorithms, scheduler_of=scheduler_of, step_schedulers_every_batch=False if scheduler_of else None)
        trainer.fit()
        runs.append([epoch[0] for epoch in trainer.recorder.lrs])
    assert [b / a for a, b in zip(*runs, strict=True)] == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25], rel=1e-6)


def test_a_later_fit_keeps_the_factor(make_trainer):
    trainer = make_trainer([AdaBatch(2, '2ep', lr_factor=0.5)], max_duration='3ep', schedulers=LinearScheduler(1.0, 1.0))
    trainer.fit()
    trainer.fit(duration='1ep')
    trainer.fit(duration='2ep', schedulers=LinearScheduler(1.0, 1.0))
    assert [epoch[0] for epoch in trainer.recorder.lrs] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])
    assert epoch_sizes(trainer) == [16, 16, 32, 32, 64, 64]


LATER = {  # name: schedulers of a later fit, and the rate that they set at first for a rate of 0.1
    'composer': (lambda _: ConstantScheduler(), 0.1),
    'StepLR': (lambda optimizer: lr_scheduler.StepLR(optimizer, 100), 0.1),
    'CosineAnnealingLR': (lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 10**6), 0.1),
    'LambdaLR': (lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.5), 0.05),
    'LinearLR': (lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.5, 0.5), 0.05),
    'ConstantLR': (lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, 100), 0.05),
    'OneCycleLR': (lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, 10**7, div_factor=2), 0.05),
    'SequentialLR': (lambda optimizer: lr_scheduler.SequentialLR(optimizer, [lr_scheduler.LinearLR(optimizer, 0.5, 0.5)], []), 0.05),
    'ChainedScheduler': (lambda optimizer: lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(optimizer, 0.5, 0.5)]), 0.05),
    'two': (lambda optimizer: [lr_scheduler.LambdaLR(optimizer, lambda step: 0.5) for _ in range(2)], 0.05),
}


@pytest.mark.parametrize('before', [None, ConstantScheduler()])
@pytest.mark.parametrize('kind', LATER)
def test_schedulers_of_a_later_fit_are_scaled_once(make_trainer, before, kind):
    trainer = make_trainer([AdaBatch(milestones=['1ep'], lr_factor=2)], max_duration='2ep', schedulers=before)
    trainer.fit()
    make, rate = LATER[kind]
    trainer.fit(duration='1ep', schedulers=make(trainer.state.optimizers[0]), step_schedulers_every_batch=True)
    assert [epoch[0] for epoch in trainer.recorder.lrs[:2]] == pytest.approx([0.1, 0.2])
    assert trainer.recorder.lrs[2] == pytest.approx([2 * rate] * len(trainer.recorder.lrs[2]))


@pytest.mark.parametrize(('duration', 'pieces', 'half'), [('1ep', 1, 101.5), ('4ep', 1, 406), ('4ep', 4, 406), ('24ba', 2, 192)])
def test_a_share_of_the_run_is_that_of_the_planned_run_to_the_batch(make_trainer, duration, pieces, half):
    trainer = make_trainer([AdaBatch(2, milestones=['0.5dur'])], max_duration=duration)
    for _ in range(pieces):
        trainer.fit(duration=f'{int(duration[:-2]) // pieces}{duration[-2:]}')
    sizes = [size for epoch in trainer.recorder.sizes for size in epoch]
    before = sum(sizes[: sizes.index(32)])
    assert half <= before < half + 16


def test_decoupled_weight_decay_follows_the_learning_rate(make_trainer):
    trainer = make_trainer([AdaBatch(2, '1ep', lr_factor=0.5)], max_duration='3ep')
    trainer.state.optimizers = DecoupledSGDW(trainer.state.model.parameters(), lr=0.1, weight_decay=1e-4)
    trainer.fit()
    group = trainer.state.optimizers[0].param_groups[0]
    assert (group['lr'], group['initial_lr']) == pytest.approx((0.025, 0.1))


def test_the_device_batch_grows_unless_a_microbatch_is_given(make_trainer):
    trainer = make_trainer([AdaBatch(2, '2ep')])
    trainer.fit()
    assert trainer.recorder.microbatches[0] == 16
    assert trainer.recorder.microbatches[-1] == 64
    for explicit in (8, 16):
        trainer = make_trainer([AdaBatch(2, '2ep')], device_train_microbatch_size=explicit)
        trainer.fit()
        assert set(trainer.recorder.microbatches) == {explicit}
    trainer = make_trainer([AdaBatch(2, '2ep')], max_duration='2ep')
    trainer.fit()
    trainer.fit(duration='2ep', device_train_microbatch_size=4)
    assert trainer.recorder.microbatches[-1] == 4


def test_limits_stop_the_growth_with_one_warning(make_trainer):
    trainer = make_trainer([AdaBatch(2, '1ep', max_batch_size=40, lr_factor=0.5)])
    with pytest.warns(UserWarning, match='max_batch_size 40; the batch stays at 32') as caught:
        trainer.fit()
    assert len([w for w in caught if 'AdaBatch' in str(w.message)]) == 1
    assert epoch_sizes(trainer) == [16, 32, 32, 32, 32, 32]
    assert [epoch[0] for epoch in trainer.recorder.lrs] == pytest.approx([0.1] + [0.05] * 5)
    trainer = make_trainer([AdaBatch(4, '1ep')])
    with pytest.warns(UserWarning, match='the 203 samples there are; the batch stays at 64') as caught:
        trainer.fit()
    assert epoch_sizes(trainer) == [16, 64, 64, 64, 64, 64]
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='AdaBatch')
        make_trainer([AdaBatch(2, '1ep', max_batch_size=32)], max_duration='2ep').fit()


@settings(max_examples=15)
@given(st.floats(1.1, 5), st.none() | st.integers(16, 300))
def test_sizes_never_shrink_nor_pass_a_limit(factor, limit):
    class Loader:
        initial_batch_size, num_samples, world_size = 16, 203, 1

    most = max(16, min(203, limit or 203))
    grown = [Sizes(lambda progress, g=g: g, factor, limit, over_ranks=False).at(None, Loader, 203, 0) for g in range(8)]
    assert grown[0] == Size(16)
    assert [size.samples for size in grown] == sorted(size.samples for size in grown)
    assert all(size.samples == round(16 * factor**size.growths) <= most for size in grown)
    # the next growth would pass the limit just where this one was refused
    assert all(bool(size.refused) == (size.growths < asked) for asked, size in enumerate(grown))
    assert all(round(16 * factor ** (size.growths + 1)) > most for size in grown if size.refused)


def test_says_what_it_is():
    assert repr(AdaBatch()) == "AdaBatch(growth_factor=2.0, interval='20ep', max_batch_size=None, lr_factor=1.0)"
    assert 'milestones' in repr(AdaBatch(milestones=['3ep', 5]))


def test_given_twice(make_trainer):
    with pytest.raises(InputError, match='twice'):
        make_trainer([AdaBatch(), AdaBatch()])


@pytest.mark.parametrize(
    ('arguments', 'name'),
    [
        ({'growth_factor': 1.0}, 'growth_factor'),
        ({'growth_factor': 0.5}, 'growth_factor'),
        ({'growth_factor': '2'}, 'growth_factor'),
        ({'growth_factor': float('nan')}, 'growth_factor'),
        ({'growth_factor': 1e308}, 'growth_factor'),
        ({'lr_factor': 1e200}, 'lr_factor'),
        ({'lr_factor': 1e-200}, 'lr_factor'),
        ({'interval': '20'}, 'interval'),
        ({'interval': '0ep'}, 'interval'),
        ({'interval': '10s'}, 'interval'),
        ({'interval': 'soon'}, 'interval'),
        ({'milestones': '20ep'}, 'milestones'),
        ({'milestones': ['20ep', '-1ep']}, r'milestones\[1\]'),
        ({'max_batch_size': 0}, 'max_batch_size'),
        ({'max_batch_size': 64.0}, 'max_batch_size'),
        ({'lr_factor': 0}, 'lr_factor'),
        ({'lr_factor': torch.inf}, 'lr_factor'),
    ],
)
def test_refuses_arguments(arguments, name):
    with pytest.raises(InputError, match=f'^{name}: expected'):
        AdaBatch(**arguments)


@pytest.mark.parametrize('factor', [1000.0, 1e-6])
def test_refuses_a_learning_rate_beyond_all_numbers(make_trainer, factor):
    trainer = make_trainer([AdaBatch(1.0001, lr_factor=factor, policy=lambda progress: 60 * progress.batch)], max_duration='1ep')
    with pytest.raises(InputError, match=rf'^lr_factor: .*, got {factor} at each of 60 growths, which multiplies'):
        trainer.fit()
