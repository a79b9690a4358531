"""Selectors put together, against the intersection and the product by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_effalgos import InputError
from composer_effalgos.plan import Choice, Selector, Selectors


class Fixed(Selector):
    def __init__(self, stage, positions, weights=None):
        self.stage, self.choice = stage, None if positions is None else Choice(torch.tensor(positions, dtype=torch.int64), weights)
        self.asked = None

    def choose(self, candidates, epoch):
        self.asked = candidates
        return self.choice


def parts(draw, size):
    kept = np.sort(draw.choice(size, draw.integers(1, size + 1), replace=False)).tolist()
    return kept, torch.from_numpy(draw.random(len(kept))).float() if draw.random() < 0.5 else None


@given(st.integers(1, 40), st.integers(0, 200), st.booleans())
def test_they_choose_among_what_is_left_and_weights_multiply(size, seed, fine_first):
    draw = np.random.default_rng(seed)
    subset, subset_weights = parts(draw, size)
    kept, kept_weights = parts(draw, len(subset))
    coarse, fine = Fixed('coarse', subset, subset_weights), Fixed('fine', kept, kept_weights)
    selectors = Selectors()
    for selector in [fine, coarse] if fine_first else [coarse, fine]:
        selectors.add(selector)
    samples, weights = selectors.choose(0, 1)
    assert coarse.asked is None
    assert fine.asked.tolist() == subset == selectors.candidates.tolist()
    assert samples.tolist() == [subset[position] for position in kept]
    expected = torch.ones(len(kept))
    for factors, rows in ((subset_weights, kept), (kept_weights, range(len(kept)))):
        expected = expected if factors is None else expected * factors[list(rows)]
    assert torch.equal(expected, torch.ones(len(kept)) if weights is None else weights)
    assert (weights is None) == (subset_weights is None and kept_weights is None)


def test_one_that_keeps_everything_or_too_little_is_passed_over():
    selectors = Selectors()
    assert selectors.choose(0, 1) == (None, None)
    selectors.add(Fixed('coarse', None))
    selectors.add(Fixed('fine', [3]))
    assert selectors.choose(0, 2) == (None, None)
    assert selectors.choose(0, 1)[0].tolist() == [3]
    assert selectors.candidates is None


def test_two_of_one_stage_are_refused_with_the_reason():
    for stage, reason in (('coarse', 'both pick the subset'), ('fine', 'both decide which samples an epoch leaves out')):
        selectors = Selectors()
        selectors.add(Fixed(stage, [0]))
        with pytest.raises(InputError, match=f'Fixed is given twice: {reason}'):
            selectors.add(Fixed(stage, [0]))
