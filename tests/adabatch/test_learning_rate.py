import pytest
import torch
from composer.optim import DecoupledAdamW, DecoupledSGDW, LinearScheduler
from torch.optim import SGD, Adam, AdamW, NAdam, RMSprop

from composer_effalgos import AdaBatch, InputError

SCHEDULE = '0:8 5ba:32 1ep:16'


def rates(trainer) -> list[tuple[int, float]]:
    """Batch size and learning rate of every step but the last two of an epoch, whose size is what is left."""
    recorder = trainer.recorder
    return [pair for sizes, lrs in zip(recorder.sizes, recorder.lrs, strict=True) for pair in list(zip(sizes, lrs, strict=True))[:-2]]


@pytest.mark.parametrize(
    ('lr', 'optimizer_of', 'power'),
    [
        (None, SGD, 0),
        ('none', SGD, 0),
        ('linear', AdamW, 1),
        ('sqrt', SGD, 0.5),
        ('auto', SGD, 1),
        ('auto', DecoupledSGDW, 1),
        ('auto', Adam, 0.5),
        ('auto', DecoupledAdamW, 0.5),
        ('auto', NAdam, 0.5),
        ('auto', RMSprop, 0.5),
    ],
)
def test_the_rate_follows_the_batch_size(make_trainer, lr, optimizer_of, power):
    """The optimizer's rate is meant for the loader's batches of 16, whatever the schedule begins with."""
    trainer = make_trainer([AdaBatch(schedule=SCHEDULE, lr=lr)], max_duration='2ep', optimizer_of=lambda p: optimizer_of(p, lr=0.01))
    trainer.fit()
    assert {size for size, _ in rates(trainer)} == {8, 16, 32}
    for size, rate in rates(trainer):
        assert rate == pytest.approx(0.01 * (size / 16) ** power)


def test_the_rate_follows_on_top_of_a_schedule_and_in_place_of_lr_factor(make_trainer):
    plain = make_trainer(schedulers=LinearScheduler(), max_duration='4ep')
    plain.fit()
    grown = make_trainer([AdaBatch(4, '2ep', lr='sqrt')], schedulers=LinearScheduler(), max_duration='4ep')
    grown.fit()
    ratio = [b[0] / a[0] for a, b in zip(plain.recorder.lrs, grown.recorder.lrs, strict=True)]
    assert ratio == pytest.approx([1, 1, 2, 2])


def test_auto_refuses_an_optimizer_that_it_does_not_know(make_trainer):
    trainer = make_trainer([AdaBatch(lr='auto')], optimizer_of=lambda p: torch.optim.Rprop(p, lr=0.01))
    with pytest.raises(InputError, match=r"^lr: expected 'sqrt', 'linear' or 'none' with the optimizer Rprop.*got 'auto'$"):
        trainer.fit()


def test_beta2_keeps_its_half_life_in_samples(make_trainer, tmp_path, weights_of):
    seen = []

    def run(**arguments):
        trainer = make_trainer(
            [AdaBatch(schedule=SCHEDULE, lr='auto', beta2='rescale')],
            max_duration='2ep',
            optimizer_of=lambda p: AdamW(p, lr=0.01, betas=(0.8, 0.95)),
            **arguments,
        )
        trainer.recorder.batch_end = lambda state, logger: seen.append(state.optimizers[0].param_groups[0]['betas'])
        trainer.fit()
        return trainer

    whole = run(save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt', save_num_checkpoints_to_keep=-1)
    sizes = [size for epoch in whole.recorder.sizes for size in epoch]
    first = len(whole.recorder.sizes[0])
    expected = [8] * 5 + [32] * (first - 5) + [16] * (len(sizes) - first)
    assert seen == [(0.8, 0.95 ** (size / 16)) for size in expected]
    for size in (8, 16, 32):  # after as many samples, the second moment has forgotten as much
        assert (0.95 ** (size / 16)) ** (320 / size) == pytest.approx(0.95**20)
    for batch in (4, 5, 6, first, first + 1):
        seen.clear()
        resumed = run(load_path=str(tmp_path / f'ba{batch}.pt'))
        assert seen == [(0.8, 0.95 ** (size / 16)) for size in expected[batch:]]
        assert torch.equal(weights_of(resumed), weights_of(whole))


def test_beta2_of_an_optimizer_without_one(make_trainer):
    with pytest.raises(InputError, match=r"^beta2: expected 'keep' with SGD, which has no beta2, got 'rescale'$"):
        make_trainer([AdaBatch(schedule=SCHEDULE, beta2='rescale')])
