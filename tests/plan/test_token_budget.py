"""``budget='full'`` with a length in tokens, on sequences of one length: the run ends where a run that prunes nothing would."""

from pathlib import Path

import numpy as np
import pytest
import torch
from composer.core import DataSpec
from composer.optim import CosineAnnealingScheduler, CosineAnnealingWithWarmupScheduler
from torch.utils.data import DataLoader, Subset

from composer_effalgos import AdaBatch, InfoBatch, InputError, SubsetSelection
from composer_effalgos.datasets.sequences import TokenSequences

pytest.importorskip('transformers')
from composer_effalgos.models.language import build_language_model

EPOCHS, SAMPLES, LENGTH, VOCABULARY = 4, 37, 8, 16
BUDGET = f'{EPOCHS * SAMPLES * LENGTH}tok'


def text() -> TokenSequences:
    return TokenSequences(np.random.default_rng(0).integers(0, VOCABULARY, (SAMPLES, LENGTH)), VOCABULARY)


def make(make_trainer, algorithms, length=BUDGET, loader=None, **settings):
    torch.manual_seed(0)
    model = build_language_model('gpt2', VOCABULARY, LENGTH, layers=1, width=8, heads=1)
    loader = loader or DataLoader(text(), 8, shuffle=True)
    return make_trainer(algorithms, model=model, train_loader=loader, max_duration=length, **settings)


def fit(make_trainer, algorithms, length=BUDGET, **settings):
    trainer = make(make_trainer, algorithms, length, **settings)
    trainer.fit()
    return trainer


def sizes(trainer) -> list[int]:
    return [sum(epoch) for epoch in trainer.recorder.sizes]


@pytest.mark.parametrize('schedule', [CosineAnnealingScheduler(), CosineAnnealingWithWarmupScheduler(t_warmup='200tok', t_max=BUDGET)])
@pytest.mark.parametrize('algorithm', [lambda b: InfoBatch(0.0, budget=b), lambda b: SubsetSelection('random', 1.0, budget=b)])
def test_with_nothing_pruned_it_is_the_same_run_bit_by_bit(make_trainer, weights_of, schedule, algorithm):
    trained, full = (fit(make_trainer, [algorithm(budget)], schedulers=schedule) for budget in ('trained', 'full'))
    assert int(full.state.timestamp.token) == EPOCHS * SAMPLES * LENGTH
    assert full.recorder.lrs == trained.recorder.lrs
    assert torch.equal(weights_of(trained), weights_of(full))


def test_it_ends_where_the_full_run_would_and_meets_its_schedule_at_every_epoch(make_trainer):
    schedule = CosineAnnealingWithWarmupScheduler(t_warmup='200tok', t_max=BUDGET)
    whole = fit(make_trainer, [InfoBatch(0.0)], schedulers=schedule)
    pruned = fit(make_trainer, [InfoBatch(0.5, budget='full')], schedulers=schedule)
    saved = pruned.state.algorithms[0].samples_saved
    assert sizes(pruned)[0] == sizes(pruned)[-1] == SAMPLES
    assert saved > 0
    assert int(pruned.state.timestamp.token) == LENGTH * sum(sizes(pruned)) == LENGTH * (EPOCHS * SAMPLES - saved)
    assert [epoch[0] for epoch in pruned.recorder.lrs] == pytest.approx([epoch[0] for epoch in whole.recorder.lrs])
    subset = fit(make_trainer, [SubsetSelection('random', 0.5, '1ep', kappa=0.5, budget='full')])
    assert sizes(subset) == [SAMPLES, SAMPLES, 18, 18]


def test_a_growing_batch_beside_it(make_trainer):
    trainer = fit(make_trainer, [InfoBatch(budget='full'), AdaBatch(schedule='0:4 400tok:8')])
    assert len(sizes(trainer)) == EPOCHS
    assert sum(sizes(trainer)) + trainer.state.algorithms[0].samples_saved == EPOCHS * SAMPLES


@pytest.mark.parametrize('batch', [5, 7, 10, 11])
def test_resumed_it_is_bit_identical(make_trainer, weights_of, tmp_path: Path, batch):
    saved = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'save_filename': 'ba{batch}.pt', 'save_num_checkpoints_to_keep': -1}
    whole = fit(make_trainer, [InfoBatch(budget='full')], schedulers=CosineAnnealingScheduler(), **saved)
    resumed = fit(
        make_trainer, [InfoBatch(budget='full')], schedulers=CosineAnnealingScheduler(), load_path=str(tmp_path / f'ba{batch}.pt')
    )
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert resumed.state.timestamp.token == whole.state.timestamp.token


def test_part_of_a_data_set(make_trainer):
    part = Subset(text(), range(10, 30))
    trainer = fit(make_trainer, [InfoBatch(budget='full')], f'{3 * 20 * LENGTH}tok', loader=DataLoader(part, 8, shuffle=True))
    assert len(sizes(trainer)) == 3


@pytest.mark.parametrize('wrong', [lambda batch: 7 * len(batch['labels']), lambda batch: 0], ids=['other', 'none'])
def test_samples_with_other_numbers_of_tokens_are_refused_in_the_first_batch(make_trainer, wrong):
    spec = DataSpec(DataLoader(text(), 8), get_num_tokens_in_batch=wrong)
    with pytest.raises(InputError, match=r"^max_duration: expected 8 tokens in each sample with budget='full' in tokens, .* in 8 samples"):
        fit(make_trainer, [InfoBatch(budget='full')], loader=spec)


def test_parts_of_epochs_are_refused(make_trainer):
    with pytest.raises(InputError, match=r"^max_duration: expected whole epochs of 296tok .*, got '1000tok', 3.378 of them; give '3ep'$"):
        fit(make_trainer, [InfoBatch(budget='full')], '1000tok')
