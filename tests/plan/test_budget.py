"""``budget='full'``: a run's length in samples or batches is what a run that prunes nothing would train."""

import itertools
import warnings

import pytest
import torch
from composer.optim import CosineAnnealingScheduler, LinearWithWarmupScheduler
from composer.utils import dist
from torch.optim.lr_scheduler import OneCycleLR

from composer_effalgos import AdaBatch, InfoBatch, InputError, Pruning, SubsetSelection

EPOCHS, SAMPLES, BATCHES = 5, 203, 13
LENGTHS = [f'{EPOCHS * SAMPLES}sp', f'{EPOCHS * BATCHES}ba']
SCHEDULES = {
    'cosine in dur': {'schedulers': CosineAnnealingScheduler()},
    'warm-up': {'schedulers': LinearWithWarmupScheduler(t_warmup='0.3dur')},
    'one cycle': {'scheduler_of': lambda optimizer: OneCycleLR(optimizer, 0.2, total_steps=EPOCHS * BATCHES)},
}


def sizes(trainer) -> list[int]:
    return [sum(epoch) for epoch in trainer.recorder.sizes]


def fit(make_trainer, algorithms, length, **settings):
    trainer = make_trainer(algorithms, max_duration=length, **settings)
    trainer.fit()
    return trainer


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('algorithm', [lambda b: InfoBatch(0.0, budget=b), lambda b: SubsetSelection('random', 1.0, budget=b)])
def test_with_nothing_pruned_it_is_the_same_run_bit_by_bit(make_trainer, weights_of, length, schedule, algorithm):
    trained, full = (fit(make_trainer, [algorithm(budget)], length, **SCHEDULES[schedule]) for budget in ('trained', 'full'))
    assert full.recorder.lrs == trained.recorder.lrs
    assert torch.equal(weights_of(trained), weights_of(full))


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize(('ratio', 'delta'), [(0.3, 0.875), (0.9, 1.0)])
def test_what_is_pruned_is_saved_and_the_schedule_meets_the_full_runs_at_every_epoch(make_trainer, length, ratio, delta):
    full = fit(make_trainer, [InfoBatch(0.0)], length, schedulers=CosineAnnealingScheduler())
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='max_duration is')
        pruned = fit(make_trainer, [InfoBatch(ratio, delta, budget='full')], length, schedulers=CosineAnnealingScheduler())
    assert len(sizes(pruned)) == EPOCHS
    assert sum(sizes(pruned)) + pruned.state.algorithms[0].samples_saved == EPOCHS * SAMPLES
    assert sum(sizes(pruned)) < EPOCHS * SAMPLES
    assert (sizes(pruned)[-1] == SAMPLES) == (delta < 1)  # the last epochs are full ones
    assert [epoch[0] for epoch in pruned.recorder.lrs] == pytest.approx([epoch[0] for epoch in full.recorder.lrs])
    if length.endswith('ba'):  # a cosine over samples is another one within an epoch, whose last batch is smaller
        by_epochs = fit(make_trainer, [InfoBatch(ratio, delta)], f'{EPOCHS}ep', schedulers=CosineAnnealingScheduler())
        assert sizes(pruned) == sizes(by_epochs)


def test_a_subset_takes_as_many_epochs_as_all_samples(make_trainer):
    trainer = fit(make_trainer, [SubsetSelection('random', 0.3, '1ep', kappa=0.4, budget='full')], LENGTHS[0])
    assert sizes(trainer) == [203, 203, 61, 61, 61]


def run_saved(make_trainer, tmp_path, length):
    saved = {'save_interval': '1ba', 'save_filename': 'ba{batch}.pt', 'save_num_checkpoints_to_keep': -1}
    return fit(make_trainer, algorithms(), length, save_folder=str(tmp_path), schedulers=CosineAnnealingScheduler(), **saved)


def algorithms():
    return [InfoBatch(0.5, 1.0, budget='full'), SubsetSelection('random', 0.8, '2ep')]


@pytest.mark.parametrize('length', LENGTHS)
def test_resumed_at_and_beside_every_epochs_end_it_is_bit_identical(make_trainer, weights_of, tmp_path, length):
    whole = run_saved(make_trainer, tmp_path, length)
    ends = list(itertools.accumulate(len(epoch) for epoch in whole.recorder.sizes))
    for batch in sorted({end + offset for end in ends[:-1] for offset in (-1, 0, 1)}):
        resumed = fit(make_trainer, algorithms(), length, load_path=str(tmp_path / f'ba{batch}.pt'), schedulers=CosineAnnealingScheduler())
        assert torch.equal(weights_of(whole), weights_of(resumed)), batch
    # the budget in samples is not used up by real time, but the run is over
    over = fit(make_trainer, algorithms(), length, load_path=str(tmp_path / f'ba{ends[-1]}.pt'), schedulers=CosineAnnealingScheduler())
    assert torch.equal(weights_of(whole), weights_of(over))
    assert not over.recorder.sizes


def test_parts_of_a_run(make_trainer, weights_of):
    whole = fit(make_trainer, [InfoBatch(budget='full')], LENGTHS[0])
    parts = make_trainer([InfoBatch(budget='full')], max_duration=LENGTHS[0])
    for _ in range(EPOCHS):
        parts.fit(duration='1ep')
    assert sizes(parts) == sizes(whole)
    assert torch.equal(weights_of(parts), weights_of(whole))
    parts.fit(duration='2ep')
    assert len(sizes(parts)) == EPOCHS + 2
    with pytest.raises(InputError, match=r'^max_duration: expected whole epochs of 203sp'):  # from here on, and some was pruned
        parts.fit(duration='203sp')


def test_adabatch_beside_it(make_trainer):
    trainer = fit(make_trainer, [InfoBatch(delta=1.0, budget='full'), AdaBatch(2, '2ep')], LENGTHS[0])
    assert len(sizes(trainer)) == EPOCHS
    with pytest.raises(InputError, match=r"^max_duration: expected ep or sp with budget='full', got '65ba'"):
        fit(make_trainer, [InfoBatch(budget='full'), AdaBatch(2, '2ep')], LENGTHS[1])


@pytest.mark.parametrize(
    ('length', 'message'),
    [
        ('1000sp', r"whole epochs of 203sp with budget='full', got '1000sp', 4.926 of them; give '5ep'$"),
        ('100sp', r"whole epochs of 203sp .*, 0.493 of them; give '1ep'$"),
        ('40ba', r"whole epochs of 13ba .*, 3.077 of them; give '3ep'$"),
        ('4000tok', r"expected ep or sp or ba with budget='full', got '4000tok'"),
    ],
)
def test_other_lengths_are_refused(make_trainer, length, message):
    with pytest.raises(InputError, match='^max_duration: expected ' + message.removeprefix('expected ')):
        fit(make_trainer, [Pruning('random', budget='full')], length)


def test_arguments():
    for make in (InfoBatch, SubsetSelection):
        with pytest.raises(InputError, match=r"^budget: expected 'trained' or 'full', got 'whole'$"):
            make(budget='whole')
    assert dist.get_world_size() == 1


def test_without_it_the_warning_names_it(make_trainer):
    with pytest.warns(UserWarning, match=r"to save time, give InfoBatch\(budget='full'\), or max_duration in epochs"):
        fit(make_trainer, [InfoBatch()], LENGTHS[1])
