import contextlib
import itertools
import math
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from composer.core import Callback, DataSpec, Time, Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset

from composer_effalgos import AdaBatch, InfoBatch, InputError
from composer_effalgos.adabatch import Every, LossPlateau, Milestones, NoiseScale, Progress
from composer_effalgos.recipes.schema import parse_recipe


def flat(nested: list[list[int]]) -> list[int]:
    return [size for epoch in nested for size in epoch]


class AtBatches(Callback):
    """Grows before given batches, but knows it only when they come: nothing can be planned ahead."""

    def __init__(self, *batches: int) -> None:
        self.batches, self.growths = batches, 0

    def __call__(self, progress: Progress) -> int:
        return self.growths

    def batch_end(self, state, logger):
        self.growths = sum(int(state.timestamp.batch) >= batch for batch in self.batches)


class Seen(Callback):
    """Notes the samples of every epoch."""

    def __init__(self) -> None:
        self.epochs: list[list[torch.Tensor]] = []

    def epoch_start(self, state, logger):
        self.epochs.append([])

    def batch_start(self, state, logger):
        self.epochs[-1].append(state.batch[0].clone())


def test_a_function_of_the_progress(make_trainer):
    trainer = make_trainer([AdaBatch(policy=lambda progress: progress.epoch // 2 + (progress.batch >= 45))])
    trainer.fit()
    sizes = flat(trainer.recorder.sizes)
    assert sizes[:26].count(16) == 24  # two epochs of 203 samples: 12 batches and a last one of 11
    assert [trainer.recorder.sizes[epoch][0] for epoch in range(4)] == [16, 16, 32, 32]
    assert sizes[44:] == [64, 64, 75]  # 128 and 11
    assert [sum(epoch) for epoch in trainer.recorder.sizes] == [203] * 6


@pytest.mark.parametrize('workers', [0, 2])
def test_a_growth_that_could_not_be_foreseen_is_as_exact_as_one_that_could(make_trainer, weights_of, problem, workers):
    runs = []
    for algorithm in (AdaBatch(milestones=['5ba', '20ba']), AdaBatch(policy=AtBatches(5, 20))):
        seen = Seen()
        trainer = make_trainer([algorithm], max_duration='3ep', num_workers=workers, callbacks=[seen])
        trainer.fit()
        for epoch in seen.epochs:  # nothing lost, nothing seen twice
            assert torch.equal(torch.cat(epoch).sort(dim=0).values, problem.tensors[0].sort(dim=0).values)
        runs.append(trainer)
    assert flat(runs[0].recorder.sizes)[:6] == [16] * 5 + [32]
    assert runs[0].recorder.sizes == runs[1].recorder.sizes
    assert torch.equal(weights_of(runs[0]), weights_of(runs[1]))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sampled_from([1.3, 2, 3]), st.booleans())
def test_no_sample_is_lost_or_repeated_wherever_the_batch_grows(make_trainer, batches, factor, drop_last):
    seen = Seen()
    trainer = make_trainer([AdaBatch(factor, policy=AtBatches(*batches))], max_duration='3ep', callbacks=[seen], drop_last=drop_last)
    trainer.fit()
    sizes = trainer.recorder.sizes
    for epoch, rows in zip(sizes, seen.epochs, strict=True):
        assert len(torch.cat(rows).unique(dim=0)) == sum(epoch)
        assert sum(epoch) == 203 if not drop_last else 203 - sum(epoch) < max(flat(sizes))
    for batch, size in enumerate(flat(sizes)):
        wanted = round(16 * factor ** sum(batch >= b for b in batches))
        assert size <= max(wanted, 16)
        if 203 // wanted > 3 and batch < len(sizes[0]) - 2:
            assert size == wanted


class Pids(Dataset):
    def __len__(self):
        return 203

    def __getitem__(self, index):
        return torch.full((8,), float(os.getpid())), 0


def test_workers_survive_a_growth_within_an_epoch(make_trainer):
    seen = Seen()
    trainer = make_trainer(
        [AdaBatch(policy=AtBatches(4, 6, 9))], dataset=Pids(), num_workers=2, max_duration='2ep', callbacks=[seen], lr=0.0
    )
    trainer.fit()
    epochs = [{float(pid) for rows in epoch for pid in rows.unique()} for epoch in seen.epochs]
    assert [len(pids) for pids in epochs] == [2, 2]
    assert not epochs[0] & epochs[1]  # persistent_workers=False
    assert os.getpid() not in epochs[0] | epochs[1]
    assert flat(trainer.recorder.sizes)[:11] == [16] * 4 + [32] * 2 + [32, 43] + [64, 64, 75]


def test_grows_by_tokens(make_trainer, problem):
    # as many tokens as the label says, and one
    count = lambda batch: int(batch[1].sum()) + len(batch[1])  # noqa: E731
    trainer = make_trainer([AdaBatch(2, '120tok')], max_duration='2ep')
    seen = Seen()
    trainer.state.callbacks.append(seen)
    trainer.fit(train_dataloader=DataSpec(DataLoader(problem, 16, shuffle=True), get_num_tokens_in_batch=count))
    labels = {tuple(row.tolist()): int(label) for row, label in zip(*problem.tensors, strict=True)}
    tokens, sizes = 0, []
    for epoch in seen.epochs:
        left = 203
        for rows in epoch:
            size = 16 * 2 ** min(tokens // 120, 3)  # 128 is the last that fits into 203
            # an epoch's remainder: as it comes, or with the batch before it where it is less than half a batch
            assert len(rows) == min(size, left) or size < left < 1.5 * size
            tokens += sum(labels[tuple(row.tolist())] + 1 for row in rows)
            left -= len(rows)
            sizes.append(size)
        assert left == 0
    assert {16, 32, 64, 128} == set(sizes)
    assert int(trainer.state.timestamp.token) == tokens


def test_tokens_where_there_are_none(make_trainer):
    with pytest.raises(InputError, match=r"interval='100tok': expected batches with tokens to count, got none"):
        make_trainer([AdaBatch(2, '100tok')]).fit()


def test_composes_with_pruning_within_an_epoch(make_trainer):
    """Scores stay with their samples when the rest of an epoch is dealt out anew."""
    scores = []
    for algorithms in ([InfoBatch(0.5)], [InfoBatch(0.5), AdaBatch(policy=AtBatches(3, 17))]):
        trainer = make_trainer(algorithms, max_duration='3ep', lr=0.0)
        trainer.fit()
        scores.append(algorithms[0].scores)
        assert trainer.state.algorithms[0].samples_saved > 0
    assert torch.allclose(scores[0], scores[1], atol=1e-6)  # without learning, a loss does not depend on the batch


# ---------------------------------------------------------------------- plateau


def drive(policy: LossPlateau, losses: list[float]) -> list[int]:
    """Shows a policy one loss an epoch of four batches, on average, and gives how often it asked for growth after each."""
    growths, timestamp = [], Timestamp()
    for loss in losses:
        for step in (-1, 1, -2, 2):
            before, timestamp = timestamp, timestamp.to_next_batch(samples=3)
            state = SimpleNamespace(
                timestamp=timestamp,
                previous_timestamp=before,
                total_loss_dict={'loss/train/total': loss + step},
                max_duration=Time.from_timestring('1000ep'),
                callbacks=[],
            )
            policy.batch_end(state, None)
        state.timestamp = timestamp = timestamp.to_next_epoch()
        policy.epoch_end(state, None)
        growths.append(policy(Progress(0, 0, 0)))
    return growths


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(0, 4), st.sampled_from([0.0, 0.05, 0.3]))
def test_plateau_is_the_rule_of_reduce_lr_on_plateau(losses, patience, threshold):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = ReduceLROnPlateau(optimizer, factor=0.5, patience=patience, threshold=threshold, eps=0.0)
    expected = []
    for loss in losses:
        theirs.step(float(loss))
        expected.append(round(-math.log2(optimizer.param_groups[0]['lr'])))
    assert drive(LossPlateau(patience, threshold), [float(loss) for loss in losses]) == expected


def test_a_loss_that_is_no_number_is_a_bad_window_and_no_best_one():
    assert drive(LossPlateau(0), [math.nan, 5.0, 4.0, 3.0, math.inf, 2.0]) == [1, 1, 1, 1, 2, 2]


def test_grows_on_a_plateau_of_the_training_loss(make_trainer):
    trainer = make_trainer([AdaBatch(policy=LossPlateau(patience=1))], lr=0.0, max_duration='7ep')  # without learning
    trainer.fit()
    assert [epoch[0] for epoch in trainer.recorder.sizes] == [16, 16, 16, 32, 32, 64, 64]
    trainer = make_trainer([AdaBatch(policy=LossPlateau(patience=0, window='4ba'))], lr=0.0, max_duration='1ep')
    trainer.fit()
    sizes = trainer.recorder.sizes[0]
    assert sizes[:9] == [16] * 8 + [sizes[8]]  # the second window's loss cannot be better by chance every time
    trainer = make_trainer([AdaBatch(policy=LossPlateau(patience=1))], lr=0.02)
    trainer.fit()
    assert {epoch[0] for epoch in trainer.recorder.sizes} == {16}  # it learns


# ---------------------------------------------------------------------- names and mistakes


def test_a_policy_from_a_recipe():
    def algorithm(settings):
        recipe = parse_recipe(
            {
                'run_name': 'r',
                'max_duration': '2ep',
                'dataset': {'name': 'digits', 'batch_size': 16},
                'model': {'name': 'resnet20_cifar'},
                'optimizer': {'name': 'sgd', 'lr': 0.1},
                'algorithms': {'adabatch': settings},
            }
        )
        return recipe.algorithms[0].build()

    assert isinstance(algorithm({'policy': 'noise_scale'}).policy, NoiseScale)
    plateau = algorithm({'policy': {'name': 'loss_plateau', 'patience': 3, 'window': '100ba'}, 'lr_factor': 0.5}).policy
    assert (plateau.patience, plateau.times[0].to_timestring()) == (3, '100ba')
    assert isinstance(algorithm({'interval': '1000tok'}).policy, Every)
    assert isinstance(algorithm({'milestones': ['1ep', '30ba']}).policy, Milestones)
    with pytest.raises(InputError, match=r"recipe: algorithms.adabatch: policy: .*did you mean 'noise_scale'"):
        algorithm({'policy': 'noise_scales'})
    with pytest.raises(InputError, match=r'algorithms.adabatch: policy: noise_scale: .*raito'):
        algorithm({'policy': {'name': 'noise_scale', 'raito': 3}})


@pytest.mark.parametrize('answer', [True, -1, 1.0, None])
def test_a_policy_that_does_not_count(make_trainer, answer):
    with pytest.raises(InputError, match='policy: expected the number of growths by now'):
        make_trainer([AdaBatch(policy=lambda progress: answer)]).fit()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'milestones': ['1ep'], 'policy': Every('1ep')}, 'milestones: expected none with policy'),
        ({'interval': '5ep', 'milestones': ['1ep']}, "interval: expected none with milestones, which replaces it, got '5ep'"),
        ({'interval': '20ep', 'milestones': ['1ep']}, 'interval: expected none with milestones'),
        ({'interval': '5ep', 'policy': 'noise_scale'}, 'interval: expected none with policy'),
        ({'milestones': []}, r'milestones: expected at least one time, got \[\]; leave AdaBatch out'),
    ],
)
def test_two_things_that_say_when_are_refused(arguments, message):
    with pytest.raises(InputError, match=f'^{message}'):
        AdaBatch(**arguments)


def test_what_is_no_policy():
    with pytest.raises(InputError, match=r'^policy: expected a function'):
        AdaBatch(policy=3)


@pytest.mark.parametrize(
    ('make', 'name'),
    [
        (lambda: LossPlateau(patience=-1), 'patience'),
        (lambda: LossPlateau(patience=1.5), 'patience'),
        (lambda: LossPlateau(threshold=-0.1), 'threshold'),
        (lambda: LossPlateau(window='1s'), 'window'),
        (lambda: NoiseScale(ratio=0), 'ratio'),
        (lambda: NoiseScale(decay=1.0), 'decay'),
        (lambda: NoiseScale(measure_every=0), 'measure_every'),
        (lambda: NoiseScale(window='0ep'), 'window'),
        (lambda: Every('soon'), 'interval'),
        (lambda: Milestones('3ep'), 'milestones'),
    ],
)
def test_refuses_arguments(make, name):
    with pytest.raises(InputError, match=f'^{name}: expected'):
        make()


def test_says_what_it_is():
    assert 'policy=NoiseScale' in repr(AdaBatch(policy=NoiseScale()))
    assert 'policy=<lambda>' in repr(AdaBatch(policy=lambda progress: 0))


# ---------------------------------------------------------------------- resuming

POLICIES = {
    'foreseen': lambda: AdaBatch(1.5, milestones=['5ba', '20ba'], lr_factor=0.8),
    'plateau': lambda: AdaBatch(2, policy=LossPlateau(0, 0.5, '4ba'), lr_factor=0.8),
    'noise': lambda: AdaBatch(2, policy=NoiseScale(0.3, '5ba', measure_every=2, decay=0.5), lr_factor=0.8),
}


@pytest.mark.parametrize('policy', POLICIES)
@pytest.mark.parametrize('workers', [0, 1])
def test_resumed_in_mid_growth_is_the_same_run(make_trainer, weights_of, tmp_path, policy, workers):
    arguments = {'max_duration': '3ep', 'num_workers': workers, 'algorithms': None}

    def run(**more):
        trainer = make_trainer(**{**arguments, 'algorithms': [POLICIES[policy]()]}, **more)
        trainer.fit()
        return trainer

    whole = run(save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt', save_num_checkpoints_to_keep=-1)
    sizes = flat(whole.recorder.sizes)
    grown = [batch for batch, (a, b) in enumerate(itertools.pairwise(sizes), 1) if b > a]
    assert grown, sizes
    for batch in (grown[0] - 1, grown[0], grown[0] + 1, len(sizes) - 1):
        resumed = run(load_path=str(tmp_path / f'ba{batch}.pt'))
        assert flat(resumed.recorder.sizes) == sizes[batch:]
        assert torch.equal(weights_of(resumed), weights_of(whole))
        assert resumed.state.optimizers[0].param_groups[0]['lr'] == whole.state.optimizers[0].param_groups[0]['lr']


def test_the_same_policy_object_in_a_second_run_begins_anew(make_trainer):
    policy = LossPlateau(patience=0)
    for _ in range(2):
        trainer = make_trainer([AdaBatch(policy=policy)], lr=0.0, max_duration='3ep')
        trainer.fit()
        trainer.close()
        assert [epoch[0] for epoch in trainer.recorder.sizes] == [16, 16, 32]


@pytest.mark.parametrize(
    ('settings', 'never'),
    [
        ({}, "interval='20ep' lies at or past its end, '3ep'"),
        ({'milestones': ['40ba', '1000sp']}, 'lies at or past its end'),
        ({'schedule': '0:16 3ep:32'}, 'lies at or past its end'),
        ({'milestones': ['38ba', '1000sp']}, None),  # 39 batches
        ({'interval': '0.5dur'}, None),
        ({'milestones': ['1Mtok', '5ep']}, None),  # tokens are not known beforehand
    ],
)
def test_a_batch_that_never_grows_is_said_once_at_the_start(make_trainer, settings, never):
    trainer = make_trainer([AdaBatch(**settings)], max_duration='3ep')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        with contextlib.suppress(InputError):  # of tokens that the batches have not
            trainer.fit()
    found = [str(item.message) for item in caught if 'never changes' in str(item.message)]
    assert len(found) == (never is not None)
    assert never is None or never in found[0]
