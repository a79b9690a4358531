import math

import pytest
import torch
from composer.core import Callback
from composer.optim import (
    ComposerScheduler,
    ConstantScheduler,
    CosineAnnealingScheduler,
    CosineAnnealingWarmRestartsScheduler,
    CosineAnnealingWithWarmupScheduler,
    LinearWithWarmupScheduler,
    MultiStepScheduler,
    PolynomialScheduler,
)
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

from composer_effalgos import AdaBatch, InputError
from composer_effalgos.adabatch import Seesaw

BATCH, SAMPLES, EPOCHS = 4, 200, 4


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(SAMPLES, 8, generator=generator), torch.randint(3, (SAMPLES,), generator=generator))


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


class Rates(Callback):
    """Notes what the schedule alone says of every step, and what AdaBatch multiplies it by."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.scales: list[float] = []

    def before_train_batch(self, state, logger):
        self.scales.append(state.algorithms[0].state_dict()['lr_scale'])
        self.rates.append(state.optimizers[0].param_groups[0]['lr'] / self.scales[-1])


def expected_growths(rates: list[float], factor: float, most: float) -> list[int]:
    """Growths by the rates of a run: as often as the rate has fallen by the factor, from its peak so far."""
    growths, peak = [], 0.0
    for rate in rates:
        peak = max(peak, rate)
        count = 0
        while rate < peak and factor ** (count + 1) * rate <= peak * (1 + 1e-9) and round(BATCH * factor ** (count + 1)) <= most:
            count += 1
        growths.append(count)
    return growths


SCHEDULES = {
    'cosine': {'schedulers': CosineAnnealingScheduler()},
    'cosine with warmup, to a floor': {'schedulers': CosineAnnealingWithWarmupScheduler('1ep', alpha_f=0.1)},
    'linear with warmup': {'schedulers': LinearWithWarmupScheduler('30ba')},
    'polynomial': {'schedulers': PolynomialScheduler(power=2.0)},
    'steps': {'schedulers': MultiStepScheduler(['1ep', '3ep'], gamma=0.25)},
    'constant': {'schedulers': ConstantScheduler()},
    'restarts': {'schedulers': CosineAnnealingWarmRestartsScheduler(t_0='2ep', alpha_f=0.05)},
    'OneCycleLR': {'scheduler_of': lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=EPOCHS * SAMPLES // BATCH)},
    'CosineAnnealingLR': {'scheduler_of': lambda o: lr_scheduler.CosineAnnealingLR(o, EPOCHS * SAMPLES // BATCH, eta_min=1e-4)},
}


@pytest.mark.parametrize(
    ('schedule', 'optimizer_of', 'power'),
    [
        *(pytest.param(schedule, adamw, 0.5, id=f'AdamW-{schedule}') for schedule in SCHEDULES),
        *(pytest.param(schedule, None, 1.0, id=f'SGD-{schedule}') for schedule in ('cosine', 'steps', 'OneCycleLR')),
    ],
)
def test_follows_the_runs_own_schedule_exactly(make_trainer, data, schedule, optimizer_of, power):
    arguments = {'dataset': data, 'batch_size': BATCH, 'max_duration': f'{EPOCHS}ep', 'lr': 0.01, 'optimizer_of': optimizer_of}
    arguments |= SCHEDULES[schedule] | ({'step_schedulers_every_batch': True} if 'scheduler_of' in SCHEDULES[schedule] else {})
    plain, watch = make_trainer(**arguments), Rates()
    seesaw = make_trainer([AdaBatch(policy='seesaw', max_batch_size=48)], callbacks=[watch], **arguments)
    plain.fit()
    seesaw.fit()
    scheduled = [rate for epoch in plain.recorder.lrs for rate in epoch]
    sizes = [size for epoch in seesaw.recorder.sizes for size in epoch]
    growths = expected_growths(watch.rates, 2, 48)
    epoch_ends = {sum(map(len, seesaw.recorder.sizes[: epoch + 1])) - k for epoch in range(EPOCHS) for k in (1, 2)}
    seen = 0
    for step, (size, rate, scale, count) in enumerate(zip(sizes, watch.rates, watch.scales, growths, strict=True)):
        assert scale == pytest.approx((2**count) ** power, rel=1e-12)
        assert size == BATCH * 2**count or step in epoch_ends
        # and the schedule's rate is that of the run with a fixed batch, where it has seen as many samples, but for two batches: Composer
        # sets a batch's rate by the time at which the batch before it began
        same = [batch for batch, expected in enumerate(scheduled) if math.isclose(rate, expected, rel_tol=1e-9, abs_tol=1e-15)]
        assert min(abs(batch * BATCH - seen) for batch in same) <= 2 * max(BATCH * 2**count, BATCH * 2 ** growths[step - 1]), step
        seen += size
    if schedule == 'constant':
        assert len(sizes) == EPOCHS * SAMPLES // BATCH
    else:
        assert len(sizes) < 0.85 * EPOCHS * SAMPLES / BATCH
        assert max(growths) == 3
    if schedule == 'restarts':
        assert growths != sorted(growths)  # it shrank


def test_in_samples_the_rate_and_the_size_are_in_closed_form(make_trainer, data):
    """Composer sets a batch's rate by the time at which the batch before it began."""
    total = 4 * SAMPLES
    trainer = make_trainer(
        [AdaBatch(1.25, policy='seesaw', max_batch_size=64)],
        dataset=data,
        batch_size=BATCH,
        max_duration=f'{total}sp',
        optimizer_of=adamw,
        schedulers=CosineAnnealingScheduler(),
    )
    trainer.fit()
    seen, before, checked = 0, 0, 0
    for sizes, lrs in zip(trainer.recorder.sizes, trainer.recorder.lrs, strict=True):
        for batch, (size, lr) in enumerate(zip(sizes, lrs, strict=True)):
            share = (1 + math.cos(math.pi * before / total)) / 2
            (count,) = expected_growths([share, share][1:], 1.25, 64) if share == 1 else expected_growths([1.0, share], 1.25, 64)[1:]
            wanted = round(BATCH * 1.25**count)
            assert lr == pytest.approx(0.01 * share * math.sqrt(wanted / BATCH))
            if batch < len(sizes) - 2:
                assert size == wanted
                checked += 1
            before, seen = seen, seen + size
    assert seen == total
    assert checked > 3 / 8 * SAMPLES


def test_saves_the_steps_that_the_paper_says(make_trainer):
    """The mean of a is 1/2 along a cosine: fine growths leave half of the steps, whole powers of 2 more."""
    data = TensorDataset(torch.randn(4000, 8), torch.zeros(4000, dtype=torch.int64))
    steps = {}
    for factor in (1.1, 2.0):
        trainer = make_trainer(
            [AdaBatch(factor, policy='seesaw')],
            dataset=data,
            batch_size=4,
            max_duration='1ep',
            optimizer_of=adamw,
            schedulers=CosineAnnealingScheduler(),
        )
        trainer.fit()
        steps[factor] = int(trainer.state.timestamp.batch) / 1000
    exact = {
        factor: sum(
            factor ** -math.floor(-math.log((1 + math.cos(math.pi * (k + 0.5) / 1000)) / 2) / math.log(factor)) for k in range(1000)
        )
        / 1000
        for factor in steps
    }
    assert exact[1.1] == pytest.approx(0.52, abs=0.02)
    for factor in steps:
        assert steps[factor] == pytest.approx(exact[factor], abs=0.02)


@pytest.mark.parametrize('workers', [0, 1])
def test_resumed_at_any_step_is_the_same_run(make_trainer, weights_of, data, tmp_path, workers):
    def run(**more):
        trainer = make_trainer(
            [AdaBatch(policy='seesaw', max_batch_size=32, beta2='rescale')],
            dataset=data,
            batch_size=16,
            max_duration='3ep',
            num_workers=workers,
            optimizer_of=adamw,
            schedulers=CosineAnnealingWithWarmupScheduler('10ba'),
            **more,
        )
        trainer.fit()
        return trainer

    whole = run(save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt', save_num_checkpoints_to_keep=-1)
    sizes = [size for epoch in whole.recorder.sizes for size in epoch]
    grown = sizes.index(32)
    for batch in (3, grown - 1, grown, grown + 1, len(sizes) - 1):
        resumed = run(load_path=str(tmp_path / f'ba{batch}.pt'))
        assert [size for epoch in resumed.recorder.sizes for size in epoch] == sizes[batch:]
        assert torch.equal(weights_of(resumed), weights_of(whole))


class InSteps(ComposerScheduler):
    def __call__(self, state, ssr=1.0):
        return 0.99 ** int(state.timestamp.batch)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'schedulers': None}, r'^policy: seesaw expected a learning-rate schedule to follow, got none'),
        ({'max_duration': '50ba'}, r"^max_duration: expected epochs, samples or tokens with seesaw, got '50ba'"),
        ({'max_duration': '500sp', 'schedulers': InSteps()}, r'^schedulers: expected a Composer schedule in sp or dur .* counts steps'),
        ({'max_duration': '500sp', 'schedulers': CosineAnnealingScheduler('2ep')}, r'^schedulers: .* counts steps'),
        (
            {'max_duration': '500sp', 'schedulers': None, 'scheduler_of': lambda o: lr_scheduler.StepLR(o, 3)},
            r'^schedulers: .* counts steps',
        ),
    ],
)
def test_refuses_schedules_that_it_cannot_follow(make_trainer, arguments, message):
    arguments = {'max_duration': '2ep', 'schedulers': CosineAnnealingScheduler()} | arguments
    if arguments.get('scheduler_of') is None and arguments['schedulers'] is None:
        arguments['scheduler_of'] = lambda o: []
    with pytest.raises((InputError, ValueError), match=message):
        make_trainer([AdaBatch(policy=Seesaw())], **arguments).fit()


def test_refuses_different_schedules_for_parameter_groups(make_trainer):
    def two_groups(parameters):
        first, *others = parameters
        return torch.optim.SGD([{'params': [first]}, {'params': others}], lr=0.1)

    trainer = make_trainer(
        [AdaBatch(policy='seesaw')],
        optimizer_of=two_groups,
        max_duration='2ep',
        scheduler_of=lambda o: lr_scheduler.LambdaLR(o, [lambda step: 1 / (1 + step), lambda step: 1.0]),
        step_schedulers_every_batch=True,
    )
    with pytest.raises(InputError, match=r'^policy: seesaw expected one schedule for all parameter groups'):
        trainer.fit()


@pytest.mark.parametrize('arguments', [{'lr_factor': 0.5}, {'lr': 'none'}])
def test_refuses_a_rate_that_does_not_follow(arguments):
    with pytest.raises(InputError, match=r"^lr: expected 'auto', 'sqrt' or 'linear' with seesaw"):
        AdaBatch(policy='seesaw', **arguments)
