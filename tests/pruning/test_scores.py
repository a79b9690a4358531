"""Scores other than the last loss, quantile bands and pruning by class."""

import importlib
import math
from collections import Counter

import numpy as np
import pytest
import torch
from composer.core import Callback
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from composer_effalgos import InfoBatch, InputError
from composer_effalgos import functional as ef
from composer_effalgos.plan import EpochPlanner

drawing = importlib.import_module('composer_effalgos.pruning.prune')


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_bands_by_hand():
    # below the 0.5 quantile (4.5) of 0..9 are 0-4, of which those below the 0.2 quantile (1.8) are 0 and 1
    kept, weights = ef.prune(torch.arange(10.0), 0.0, generator(), bands=[(0.2, 0.5), (0.5, 0.75)])
    low, middle, high = (kept < 2), (kept >= 2) & (kept < 5), kept >= 5
    assert (int(low.sum()), int(middle.sum()), int(high.sum())) == (1, 0, 5)  # 0.5 of two, floor(0.25 * 3), all
    assert weights[low].tolist() == [2.0]
    assert weights[high].tolist() == [1.0] * 5
    kept, weights = ef.prune(torch.arange(10.0), 0.0, generator(), bands=[(0.9, 0.5)])
    assert int((weights == 2).sum()) == 4
    assert kept[weights == 1].tolist() == [9]


def test_by_class_each_class_is_pruned_by_its_own_mean():
    # class 1 has far lower losses: by one mean it would be pruned whole, by its own only half of its lower half
    scores = torch.cat([torch.linspace(10, 20, 20), torch.linspace(0, 1, 20)])
    labels = torch.arange(40) // 20
    together, _ = ef.prune(scores, 0.5, generator())
    apart, weights = ef.prune(scores, 0.5, generator(), labels=labels)
    assert int((together >= 20).sum()) == 10
    assert [int((labels[apart] == c).sum()) for c in (0, 1)] == [15, 15]
    assert [weights[labels[apart] == c].sum().item() for c in (0, 1)] == [20, 20]


@given(st.integers(1, 300), st.integers(1, 5), st.floats(0, 0.95), st.integers(0, 50))
def test_by_class_is_class_after_class_up_to_rounding(n, classes, ratio, seed):
    draw = np.random.default_rng(seed)
    scores, labels = torch.tensor(draw.random(n)), torch.tensor(draw.integers(0, classes, n))
    kept, weights = ef.prune(scores, ratio, generator(seed), labels=labels)
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().flatten()
        alone, alone_weights = ef.prune(scores[rows], ratio, generator())
        mine = labels[kept] == label
        more = int(mine.sum()) - len(alone)
        assert more in (0, 1)  # by class, the number is rounded at random
        expected = [*alone_weights.sort().values.tolist(), *[float(np.float32(1 / (1 - ratio)))] * more]
        assert weights[mine].sort().values.tolist() == expected


@given(st.integers(1, 400), st.floats(0.01, 0.95), st.integers(0, 30), st.integers(1, 16))
def test_blocks_change_nothing(n, ratio, seed, block):
    scores = torch.tensor(np.random.default_rng(seed).random(n))
    whole = ef.prune(scores, ratio, generator(seed))
    before, drawing._BLOCK = drawing._BLOCK, 8 * block
    try:
        blocked = ef.prune(scores, ratio, generator(seed))
    finally:
        drawing._BLOCK = before
    assert all(a.equal(b) for a, b in zip(whole, blocked, strict=True))


def test_few_of_many_are_chosen_uniformly():
    mask = np.zeros(80, bool)
    mask[5:70] = True  # 65 of which 2 are drawn: without looking at them all
    draws, trials, choices = np.random.default_rng(0), 40_000, Counter()
    for _ in range(trials):
        choices[tuple(sorted(drawing._choose(mask, 2, draws).tolist()))] += 1
    assert all(mask[i] and mask[j] and i < j for i, j in choices)
    number = math.comb(65, 2)
    observed = np.array([*choices.values(), *[0] * (number - len(choices))])
    chi_squared = ((observed - trials / number) ** 2 / (trials / number)).sum()
    assert abs(chi_squared - (number - 1)) < 5 * math.sqrt(2 * (number - 1))


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1), st.integers(0, 30))
def test_choosing_takes_as_many_as_asked_for_and_none_twice(n, density, share, seed):
    draws = np.random.default_rng(seed)
    mask = draws.random(n) < density
    count = int(share * mask.sum())
    chosen = drawing._choose(mask, count, draws)
    assert len(set(chosen.tolist())) == count
    assert mask[chosen].all()


@pytest.mark.parametrize('ratio', [0.1, 0.5, 0.8])
def test_every_choice_of_candidates_is_as_likely_as_any_other(ratio):
    scores = torch.cat([torch.zeros(5), torch.full((2,), 10.0)])[torch.randperm(7, generator=generator(1))]
    trials, choices = 6000, Counter()
    for seed in range(trials):
        kept, weights = ef.prune(scores, ratio, generator(seed))
        choices[tuple(kept[weights != 1].tolist())] += 1
        assert kept[weights == 1].equal((scores == 10).nonzero().flatten())
    number = math.comb(5, math.floor(5 * (1 - ratio) + 1e-9))
    assert len(choices) == number
    # chi-squared with number - 1 degrees of freedom, five standard deviations
    statistic = sum((count - trials / number) ** 2 for count in choices.values()) / (trials / number)
    assert statistic < (number - 1) + 5 * (2 * (number - 1)) ** 0.5


class Losses(Callback):
    def __init__(self, algorithm):
        self.algorithm, self.scores = algorithm, []

    def epoch_end(self, state, logger):
        self.scores.append(self.algorithm.scores)


def test_moving_average(make_trainer):
    last, average = InfoBatch(prune_ratio=0), InfoBatch(prune_ratio=0, score='ema', score_decay=0.75)
    notes = [Losses(a) for a in (last, average)]
    for note in notes:
        make_trainer([note.algorithm], callbacks=[note], max_duration='3ep').fit()
    expected = notes[0].scores[0]
    for epoch in (1, 2):
        expected = 0.75 * expected + 0.25 * notes[0].scores[epoch]
        assert torch.allclose(notes[1].scores[epoch], expected, atol=1e-6)


def test_a_score_of_ones_own(make_trainer, problem):
    def margin(outputs, batch):
        top = outputs.topk(2).values
        return top[:, 1] - top[:, 0]

    algorithm = InfoBatch(score=margin, delta=1.0)
    trainer = make_trainer([algorithm], lr=0.0, max_duration='2ep')
    trainer.fit()
    with torch.no_grad():
        expected = margin(trainer.state.model.module(problem.tensors[0]), None)
    assert torch.allclose(algorithm.scores, expected, atol=1e-5)
    assert algorithm.samples_saved > 0
    with pytest.raises(InputError, match='score'):
        make_trainer([InfoBatch(score=lambda outputs, batch: outputs[:3])]).fit()


@pytest.mark.parametrize('kind', ['tensors', 'subset', 'targets', 'given'])
def test_classes_come_from_the_data_set(make_trainer, problem, kind):
    class Plain(Dataset):
        def __init__(self, targets=None):
            if targets is not None:
                self.targets = targets

        def __len__(self):
            return len(problem)

        def __getitem__(self, index):
            return problem[index]

    labels = problem.tensors[1]
    dataset = {'tensors': problem, 'subset': Subset(problem, range(100)), 'targets': Plain(labels.tolist()), 'given': Plain()}[kind]
    algorithm = InfoBatch(delta=1.0, class_balanced=True, labels=labels if kind == 'given' else None)
    note = Losses(algorithm)
    trainer = make_trainer([algorithm], dataset=dataset, callbacks=[note], max_duration='2ep')
    trainer.fit()
    classes = labels[: len(dataset)]
    kept = EpochPlanner.of(trainer.state).loader.plan.order
    for label in range(3):
        scores = note.scores[0][classes == label]
        below = int((scores.double() < scores.double().mean()).sum())
        assert int((classes[kept] == label).sum()) - (len(scores) - below) in (below // 2, (below + 1) // 2)  # rounded at random
    if kind == 'given':
        with pytest.raises(
            InputError, match=r'labels: expected the class of every sample, got none, and Plain has no targets; pass InfoBatch\(labels'
        ):
            make_trainer([InfoBatch(class_balanced=True)], dataset=dataset).fit()
        with pytest.raises(InputError, match='labels: expected 203 class indices'):
            make_trainer([InfoBatch(class_balanced=True, labels=[0, 1])], dataset=dataset).fit()


def test_bands_in_training(make_trainer):
    algorithm = InfoBatch(bands=[(0.25, 0.8), (0.5, 0.4)], delta=1.0)
    trainer = make_trainer([algorithm], max_duration='2ep', lr=0.01)
    trainer.fit()
    weights = EpochPlanner.of(trainer.state).loader.plan.weights
    assert sorted({round(w, 3) for w in weights.tolist()}) == [1.0, 1.667, 5.0]
    assert weights.sum().item() == pytest.approx(203, abs=5 + 1.67)


@pytest.mark.parametrize('bands', [3, [0.5], [(0.5, 1.0)], [(0.0, 0.5)], [(0.5, 0.2), (0.5, 0.3)], [(0.6, 0.2), (0.5, 0.3)], []])
def test_refuses_bands(bands):
    with pytest.raises(InputError, match='bands'):
        InfoBatch(bands=bands)


@pytest.mark.parametrize(('arguments', 'name'), [({'score': 'loss2'}, 'score'), ({'score_decay': 1.0}, 'score_decay')])
def test_refuses_scores(arguments, name):
    with pytest.raises(InputError, match=f'^{name}: expected'):
        InfoBatch(**arguments)


def test_says_what_differs_from_the_default():
    assert repr(InfoBatch(score='ema', class_balanced=True, bands=[(0.5, 0.2)])) == (
        "InfoBatch(prune_ratio=0.5, delta=0.875, seed=None, score='ema', score_decay=0.9, bands=[(0.5, 0.2)], class_balanced=True)"
    )


def test_tensor_data_sets_of_one_tensor_have_no_labels(make_trainer):
    dataset = TensorDataset(torch.randn(64, 8))
    with pytest.raises(InputError, match='no targets'):
        make_trainer(
            [InfoBatch(class_balanced=True, per_sample_loss=lambda outputs, batch: outputs.square())],
            dataset=dataset, module=nn.Linear(8, 3),
        ).fit()  # fmt: skip
