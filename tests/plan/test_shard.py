"""What ranks that keep their own parts of the samples come to together, against one that has all of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_in_threads import on_ranks

from composer_effalgos.plan import ranks as ranks_module
from composer_effalgos.plan.bijection import Bijection
from composer_effalgos.plan.ranks import send, whole
from composer_effalgos.plan.shard import Shard
from composer_effalgos.plan.shard_loader import ShardPlan, deal

RANKS = st.sampled_from([1, 2, 3, 4])


@settings(max_examples=50)
@given(RANKS, st.integers(0, 20), st.integers(0, 99))
def test_rows_reach_the_ranks_they_are_for(world_size, most, seed):
    draw = np.random.default_rng(seed)
    rows = [torch.from_numpy(draw.integers(0, 1000, draw.integers(0, most + 1))) for _ in range(world_size)]
    to = [torch.from_numpy(draw.integers(0, world_size, len(mine))) for mine in rows]

    came = on_ranks(world_size, lambda ranks: send(ranks, to[ranks.rank], rows[ranks.rank], rows[ranks.rank].float() / 2))
    for rank, (numbers, halves) in enumerate(came):
        assert numbers.tolist() == [int(row) for mine, where in zip(rows, to, strict=True) for row in mine[where == rank]]
        assert torch.equal(halves, numbers.float() / 2)


@settings(max_examples=50)
@given(RANKS, st.integers(4, 60), st.sampled_from([1, 7, 1 << 24]))
def test_rank_0_gathers_all_rows(world_size, size, piece):
    rows = torch.randn(3, size)
    before, ranks_module._PIECE = ranks_module._PIECE, piece
    try:
        found = on_ranks(world_size, lambda ranks: whole(ranks, Shard(size, ranks).part(rows), size))
        flags = on_ranks(world_size, lambda ranks: whole(ranks, Shard(size, ranks).part(rows[0] > 0), size))
    finally:
        ranks_module._PIECE = before
    assert torch.equal(found[0], rows)
    assert torch.equal(flags[0], rows[0] > 0)
    assert found[1:] == [None] * (world_size - 1)


@settings(max_examples=50)
@given(RANKS, st.integers(1, 60), st.sampled_from([3, 2**17, 2**40, 2**63 - 1]), st.data())
def test_the_smallest_keys(world_size, size, bound, data):
    keys = torch.tensor(sorted(data.draw(st.sets(st.integers(0, bound), min_size=1, max_size=size)), key=hash))
    count = data.draw(st.integers(0, len(keys)))
    parts = on_ranks(world_size, lambda ranks: Shard(len(keys), ranks).smallest(keys[ranks.rank :: world_size], count))
    expected = sorted(keys.tolist())[:count]
    found = [int(key) for rank, part in enumerate(parts) for key in keys[rank::world_size][part]]
    assert sorted(found) == expected


@settings(max_examples=50)
@given(RANKS, st.integers(1, 50), st.integers(0, 99))
def test_mean_and_quantiles_leave_out_what_is_not_finite(world_size, size, seed):
    draw = np.random.default_rng(seed)
    values = torch.from_numpy(draw.normal(size=size)).float()
    values[torch.from_numpy(draw.random(size) < 0.2)] = float(draw.choice([np.inf, np.nan, -0.0]))
    wanted = [0.0, 0.25, 0.6, 1.0]

    def measure(ranks):
        shard = Shard(size, ranks)
        part = shard.part(values)
        return shard.finite_mean(part), shard.quantiles(part, wanted)

    finite = values[values.isfinite()].double().numpy()
    for mean, quantiles in on_ranks(world_size, measure):
        if len(finite):
            assert mean == pytest.approx(finite.mean(), abs=1e-12)
            assert quantiles == pytest.approx(np.quantile(finite, wanted).tolist(), abs=1e-12)
        else:
            assert math.isnan(mean)
            assert all(map(math.isnan, quantiles))


@settings(max_examples=80)
@given(RANKS, st.integers(4, 80), st.integers(0, 99), st.booleans(), st.data())
def test_the_order_is_dealt_out_as_that_of_one_rank(world_size, size, seed, shuffle, data):
    draw = np.random.default_rng(seed)
    order = Bijection(size, seed if shuffle else None)
    keep = torch.from_numpy(draw.random(size) < draw.random())
    weights = torch.rand(size)
    start = data.draw(st.integers(0, int(keep.sum())))
    everything = not int(keep.sum())

    def mine(ranks):
        shard = Shard(size, ranks)
        if everything:
            return deal(shard, order, None, None, start)
        kept = shard.part(keep).nonzero()[:, 0]
        return deal(shard, order, kept, shard.part(weights)[kept], start)

    straight = [sample for sample in order.inverse(torch.arange(size)).tolist() if everything or keep[sample]][start:]
    for rank, (samples, given_weights) in enumerate(on_ranks(world_size, mine)):
        assert samples.tolist() == straight[rank::world_size]
        assert given_weights is None if everything else torch.equal(given_weights, weights[samples])


@settings(max_examples=40)
@given(RANKS, st.integers(8, 60), st.integers(0, 99), st.booleans())
def test_what_an_epoch_left_out_was_not_trained_on(world_size, size, seed, pruned):
    keep = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.7
    keep[: 2 * world_size] = True
    trains = (int(keep.sum()) if pruned else size) - seed % 3

    def trained(ranks):
        shard = Shard(size, ranks)
        kept = shard.part(keep).nonzero()[:, 0] if pruned else None
        plan = ShardPlan(kept, None, (trains,), shard=shard, seed=seed).dealt()
        counts = torch.zeros(len(shard), dtype=torch.int32)
        counts[plan.trained()] += 1
        return plan.rank_order(ranks.rank, world_size), whole(ranks, counts, size)

    found = on_ranks(world_size, trained)
    samples = torch.cat([order for order, _ in found])
    assert torch.equal(torch.bincount(samples, minlength=size).int(), found[0][1])
