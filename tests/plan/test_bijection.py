"""The order that is evaluated sample by sample is a permutation, random, and one that its seed names."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_effalgos.plan.bijection import Bijection

SIZES = st.one_of(st.integers(1, 300), st.sampled_from([4096, 9999, 65_537]))


@given(SIZES, st.integers(0, 2**63 - 1))
def test_is_a_permutation_with_an_inverse(size, seed):
    order, samples = Bijection(size, seed), torch.arange(size)
    positions = order(samples)
    assert torch.equal(positions.sort().values, samples)
    assert torch.equal(order.inverse(positions), samples)


@given(SIZES, st.integers(0, 99), st.data())
def test_does_not_depend_on_what_it_is_asked_together_with(size, seed, data):
    some = torch.tensor(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=torch.int64)
    order = Bijection(size, seed)
    assert torch.equal(order(some), order(torch.arange(size))[some])
    assert torch.equal(Bijection(size, seed).inverse(some), order.inverse(torch.arange(size))[some])


@pytest.mark.parametrize('size', [200, 1000, 50_000])
def test_seeds_give_unlike_orders(size):
    samples = torch.arange(size)
    orders = [Bijection(size, seed)(samples) for seed in range(20)]
    for number, order in enumerate(orders):
        assert not torch.equal(order, samples)
        for other in orders[:number]:
            assert int((order == other).sum()) < 10  # 1 is what two random ones have in common on average


@pytest.mark.parametrize('size', [7, 20, 203])
def test_every_sample_comes_to_every_place_equally_often(size):
    draws = 3000
    counts = torch.zeros(size, size)
    for seed in range(draws):
        counts[torch.arange(size), Bijection(size, seed)(torch.arange(size))] += 1
    freedom = (size - 1) ** 2
    chi_squared = float(((counts - draws / size) ** 2 / (draws / size)).sum())
    assert abs(chi_squared - freedom) < 5 * math.sqrt(2 * freedom)


def test_neighbours_are_apart():
    """As in a random permutation: the mean distance of neighbours is a third of the size."""
    size = 100_000
    positions = Bijection(size, 3)(torch.arange(size)).double()
    assert float(positions.diff().abs().mean()) == pytest.approx(size / 3, rel=0.01)
    assert abs(float(torch.corrcoef(torch.stack([positions, torch.arange(size).double()]))[0, 1])) < 0.02


def test_the_identity_and_numbers_beyond_32_bits():
    samples = torch.tensor([0, 5, 2**40 - 1])
    assert torch.equal(Bijection(2**40, None)(samples), samples)
    order = Bijection(2**40, 1)
    assert torch.equal(order.inverse(order(samples)), samples)
    assert int(order(samples).max()) < 2**40
