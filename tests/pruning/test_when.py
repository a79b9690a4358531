"""When a run is pruned: every case in which it once never was, without a word."""

import warnings

import pytest
import torch
from composer.core import Time
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import InfoBatch, Pruning, SubsetSelection


def sizes(trainer) -> list[int]:
    return [sum(epoch) for epoch in trainer.recorder.sizes]


def said(caught) -> list[str]:
    return [str(item.message) for item in caught if 'InfoBatch: ' in str(item.message)]


@pytest.mark.parametrize(
    ('duration', 'delta'), [('1ep', 0.875), ('2ep', 0.875), ('1ep', 1.0), ('12ba', 0.875), ('14ba', 0.9), ('200sp', 1.0)]
)
def test_a_run_too_short_to_be_pruned_says_so_once_at_the_start(make_trainer, duration, delta):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        trainer = make_trainer([InfoBatch(delta=delta)], max_duration=duration)
        trainer.fit()
    assert trainer.state.algorithms[0].samples_saved == 0
    (message,) = said(caught)
    assert message.startswith(f"InfoBatch: no epoch of this run can be pruned: max_duration is '{duration}'")


@pytest.mark.parametrize(
    ('duration', 'arguments'), [('3ep', {}), ('2ep', {'delta': 1.0}), ('40ba', {}), ('1ep', {'prune_ratio': 0}), ('1ep', {'delta': 0.0})]
)
def test_nothing_is_said_where_epochs_are_pruned_or_no_pruning_is_asked_for(make_trainer, duration, arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        trainer = make_trainer([InfoBatch(**arguments)], max_duration=duration)
        trainer.fit()
    assert not said(caught)
    wanted = arguments.get('prune_ratio', 0.5) > 0 and arguments.get('delta', 0.875) > 0
    assert (trainer.state.algorithms[0].samples_saved > 0) == wanted


def test_delta_is_measured_against_the_length_that_the_trainer_was_given(make_trainer):
    whole = make_trainer([InfoBatch(delta=0.75)], max_duration='8ep')
    whole.fit()
    parts = make_trainer([InfoBatch(delta=0.75)], max_duration='8ep')
    for _ in range(8):
        parts.fit(duration='1ep')
    assert sizes(parts) == sizes(whole)
    assert [epoch for epoch, size in enumerate(sizes(whole)) if size == 203] == [0, 6, 7]


def test_a_loop_of_fits_whose_end_is_unknown_is_pruned_and_says_so(make_trainer):
    trainer = make_trainer([InfoBatch()], max_duration=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(10):
            trainer.fit(duration='1ep')
    assert [size < 203 for size in sizes(trainer)] == [False] + [True] * 9
    assert [message.split(' of ')[0] for message in said(caught)] == [
        'InfoBatch: no epoch',
        'InfoBatch: fit(duration=...) continues past the planned end',
    ]


def test_a_later_fit_that_is_long_enough_has_a_full_end_of_its_own(make_trainer):
    trainer = make_trainer([InfoBatch()], max_duration='4ep')
    trainer.fit()
    trainer.fit(duration='4ep')  # an eighth of 8 epochs is one
    assert [epoch for epoch, size in enumerate(sizes(trainer)) if size == 203] == [0, 3, 7]
    with pytest.warns(UserWarning, match='continues past the planned end of the run'):
        trainer.fit(duration='1ep')
    assert sizes(trainer)[8] < 203


def test_time_that_is_reset_begins_another_run(make_trainer):
    trainer = make_trainer([InfoBatch()], max_duration='16ep')
    trainer.fit(duration='1ep')
    trainer.fit(duration='4ep', reset_time=True)
    assert [epoch for epoch, size in enumerate(sizes(trainer)[1:]) if size == 203] == [3]  # the scores are still there


@pytest.mark.parametrize('shuffle', [True, False])
def test_drop_last_is_pruned_from_the_second_epoch_on(make_trainer, problem, shuffle):
    loader = DataLoader(problem, batch_size=20, shuffle=shuffle, drop_last=True)
    algorithm = InfoBatch(delta=1.0)
    trainer = make_trainer([algorithm], train_loader=loader, max_duration='4ep')
    trainer.fit()
    assert {size for epoch in trainer.recorder.sizes for size in epoch} == {20}
    assert sizes(trainer)[0] == 200
    assert max(sizes(trainer)[1:]) < 200


@pytest.mark.parametrize(('samples', 'batch_size'), [(1437, 256), (5000, 512)])
def test_much_that_is_dropped_delays_nothing(make_trainer, samples, batch_size):
    inputs = torch.randn(samples, 8, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    trainer = make_trainer([InfoBatch()], dataset=dataset, batch_size=batch_size, drop_last=True, max_duration='12ep')
    trainer.fit()
    full = samples - samples % batch_size
    assert [epoch for epoch, size in enumerate(sizes(trainer)) if size == full] == [0, 10, 11]


def test_a_limit_of_batches_is_pruned_below_it_once_most_have_a_score(make_trainer):
    trainer = make_trainer([InfoBatch(prune_ratio=0.9, delta=1.0)], train_subset_num_batches=11, max_duration='5ep')
    trainer.fit()
    assert sizes(trainer)[0] == 11 * 16
    assert max(sizes(trainer)[1:]) < 11 * 16
    assert trainer.state.algorithms[0].samples_saved == 5 * 176 - sum(sizes(trainer))


def test_a_limit_of_batches_that_leaves_nothing_to_save_says_so_at_the_end(make_trainer):
    trainer = make_trainer([InfoBatch(delta=1.0)], train_subset_num_batches=3, max_duration='4ep')
    with pytest.warns(
        UserWarning, match=r'no epoch of this run was shortened: InfoBatchRule decided on \d of 4 epochs; train_subset_num_batches=3'
    ):
        trainer.fit()
    assert sizes(trainer) == [48] * 4
    assert trainer.state.algorithms[0].samples_saved == 0


def test_a_subset_that_is_new_in_every_epoch_says_so_at_the_end(make_trainer):
    algorithms = [SubsetSelection('adaptive-random', 0.3, '1ep'), InfoBatch(delta=1.0)]
    trainer = make_trainer(algorithms, max_duration='3ep')
    with pytest.warns(UserWarning, match='no epoch of this run was shortened'):
        trainer.fit()


def test_a_fresh_subset_is_trained_on_whole_first(make_trainer):
    algorithms = [SubsetSelection('adaptive-random', 0.5, '2ep'), InfoBatch(delta=1.0)]
    trainer = make_trainer(algorithms, max_duration='4ep')
    trainer.fit()
    assert [size == 102 for size in sizes(trainer)] == [True, False, True, False]


def test_a_rule_that_was_asked_and_kept_everything_is_named(make_trainer):
    """``ies`` leaves out nothing before it has seen a sample ``window + 3`` times."""
    trainer = make_trainer([Pruning('ies')], max_duration='9ep')
    with pytest.warns(UserWarning, match=r'no epoch of this run was shortened: IesRule decided on 6 of 9 epochs and kept every sample$'):
        trainer.fit()


def test_a_run_that_begins_anew_near_its_end_speaks_of_the_rest_alone(make_trainer, tmp_path):
    make_trainer([InfoBatch()], max_duration='8ep', save_folder=str(tmp_path), save_interval='1ep', save_filename='{epoch}.pt').fit()
    saved = torch.load(tmp_path / '7.pt', weights_only=False)
    saved['state']['algorithms'] = []
    torch.save(saved, tmp_path / 'without.pt')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        make_trainer([InfoBatch()], max_duration='8ep', load_path=str(tmp_path / 'without.pt')).fit()
    (message,) = said(caught)
    assert message.startswith("InfoBatch: no epoch from epoch 7 on can be pruned: max_duration is '8ep'")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        make_trainer([InfoBatch()], max_duration='8ep', load_path=str(tmp_path / '7.pt')).fit()
    assert not said(caught)


@pytest.mark.parametrize('duration', ['130ba', '2030sp'])  # 10 full epochs
def test_in_batches_or_samples_no_pruned_epoch_could_reach_into_the_last_part(make_trainer, duration):
    trainer = make_trainer([InfoBatch(delta=0.8)], max_duration=duration)
    trainer.fit()
    end, trained, full = Time.from_timestring(duration).value, 0, (13 if duration.endswith('ba') else 203)
    lengths = [len(epoch) if duration.endswith('ba') else sum(epoch) for epoch in trainer.recorder.sizes]
    pruned = [sum(epoch) < 203 for epoch in trainer.recorder.sizes[:-1]]
    for length, short in zip(lengths, pruned, strict=False):
        assert short == (trained > 0 and trained + full <= 0.8 * end)
        trained += length
