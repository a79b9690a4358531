from collections import Counter
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from composer_effalgos.plan import EpochPlan, plan_epoch, resume_epoch, split_batches, stream_seed

sizes = st.integers(1, 400)
batch_sizes = st.integers(1, 40)
worlds = st.integers(1, 5)


def ranks_of(plan: EpochPlan, world_size: int) -> list[list[list[int]]]:
    """Samples by rank and batch."""
    dealt = []
    for rank in range(world_size):
        order, offsets = plan.rank_order(rank, world_size).tolist(), plan.rank_offsets(rank, world_size)
        assert offsets[-1] == len(order)
        dealt.append([order[a:b] for a, b in pairwise(offsets)])
    return dealt


def test_split_by_hand():
    assert split_batches(10, 4) == [4, 4, 2]
    assert split_batches(10, 4, drop_last=True) == [4, 4]
    assert split_batches(9, 4) == [4, 2, 3]  # one sample left: BatchNorm could not train on it
    assert split_batches(203, 64) == [64, 64, 32, 43]  # 11 left: less than half a batch
    assert split_batches(160, 64) == [64, 64, 32]
    assert split_batches(40, lambda batch, samples: 32 if batch else 16) == [16, 24]
    assert split_batches(8, 4) == [4, 4]
    assert split_batches(3, 4) == [3]
    assert split_batches(17, 4, world_size=2) == [8, 4, 5]
    assert split_batches(3, 1, world_size=2) == [3]
    assert split_batches(1, 4, world_size=2) == []


@given(sizes, batch_sizes, worlds, st.booleans())
def test_split_loses_nothing_and_serves_every_rank(n, batch, world, drop_last):
    split = split_batches(n, batch, world, drop_last)
    full = batch * world
    if drop_last:
        assert split == [full] * (n // full)
    elif n >= world:
        assert sum(split) == n
        assert all(size % world == 0 for size in split[:-1])
        assert all(size >= world for size in split)
        assert max(split) <= full or (batch == 1 and max(split) < 2 * world)
        assert len(split) == -(-n // full) or batch == 1
        assert 2 * min(split) >= full - max(2 * world, full // 4) or len(split) == 1
    else:
        assert split == []


def test_a_limit_of_batches_gives_full_ones():
    assert split_batches(195, 16, max_batches=12) == [16] * 12
    assert split_batches(195, 16, max_batches=13) == [16] * 11 + [8, 11]
    assert plan_epoch(torch.arange(195), None, 16, seed=0, epoch=0, max_batches=12).sizes == (16,) * 12


@given(st.integers(128, 2000))
def test_one_to_eight_ranks_with_the_same_global_batch_have_the_same_batches(n):
    assert split_batches(n, 128) == split_batches(n, 64, 2) == split_batches(n, 32, 4) == split_batches(n, 16, 8)


@given(sizes, batch_sizes, worlds, st.booleans())
def test_a_constant_function_is_a_constant(n, batch, world, drop_last):
    assert split_batches(n, lambda b, s: batch, world, drop_last) == split_batches(n, batch, world, drop_last)


@given(sizes, batch_sizes, worlds, st.integers(0, 5), st.booleans())
def test_ranks_share_out_the_kept_samples(n, batch, world, epoch, shuffle):
    kept = torch.arange(0, 3 * n, 3)
    if n < world:
        return
    plan = plan_epoch(kept, None, batch, seed=7, epoch=epoch, world_size=world, shuffle=shuffle)
    dealt = ranks_of(plan, world)
    assert len({len(batches) for batches in dealt}) == 1
    assert all(batches_of_rank for batches in dealt for batches_of_rank in batches)
    assert sorted(i for batches in dealt for b in batches for i in b) == kept.tolist()
    for number, size in enumerate(plan.sizes):
        assert sum(len(batches[number]) for batches in dealt) == size
    if not shuffle:
        assert plan.order.tolist() == kept.tolist()


@given(sizes, batch_sizes, worlds, st.integers(0, 5), worlds)
def test_even_ranks_have_as_many_samples_of_each_batch(n, batch, world, epoch, later):
    kept = torch.arange(n)
    if n < world:
        return
    plan = plan_epoch(kept, None, batch, seed=7, epoch=epoch, world_size=world, even=True)
    assert all(size % world == 0 for size in plan.sizes)
    assert plan.num_samples == n - n % world
    if len(plan.sizes) > 1:
        rest = resume_epoch(plan, batches=1, batch_size=batch, world_size=later, same_world_size=False, even=True)
        assert all(size % later == 0 for size in rest.sizes)
        assert n - n % world - later < rest.num_samples <= n
        uneven = plan_epoch(kept, None, batch, seed=7, epoch=epoch, world_size=world)
        rest = resume_epoch(uneven, batches=1, batch_size=batch, world_size=world, even=True)
        assert all(size % world == 0 for size in rest.sizes)
        assert n - world < rest.num_samples <= n


@given(sizes.filter(lambda n: n >= 5), batch_sizes, worlds, st.integers(0, 5))
def test_order_and_weights_do_not_depend_on_ranks_or_batch_size(n, batch, world, epoch):
    kept, weights = torch.arange(n) * 2, torch.arange(n).float()
    here = plan_epoch(kept, weights, batch, seed=1, epoch=epoch, world_size=world)
    there = plan_epoch(kept, weights, 3, seed=1, epoch=epoch)
    assert torch.equal(here.order, there.order)
    assert torch.equal(here.weights, there.weights)
    assert torch.equal(here.weights * 2, here.order.float())


def test_orders_differ_between_epochs_and_seeds():
    plans = [plan_epoch(torch.arange(50), None, 5, seed=s, epoch=e).order.tolist() for s in (0, 1) for e in (0, 1)]
    assert len({tuple(order) for order in plans}) == 4


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 5), st.data())
def test_shard_by_shard(shard_sizes, epoch, data):
    n = sum(shard_sizes)
    starts = torch.tensor([sum(shard_sizes[:s]) for s in range(len(shard_sizes))])
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    weights = kept.float()
    plan = plan_epoch(kept, weights, 4, seed=5, epoch=epoch, shard_starts=starts)
    assert sorted(plan.order.tolist()) == kept.tolist()
    assert torch.equal(plan.weights, plan.order.float())
    shard_of = [s for s, size in enumerate(shard_sizes) for _ in range(size)]
    visited = [shard_of[i] for i in plan.order.tolist()]
    changes = 1 + sum(a != b for a, b in pairwise(visited))
    assert changes == len(set(visited))  # every shard in one stretch
    again = plan_epoch(kept, weights, 3, seed=5, epoch=epoch, shard_starts=starts, world_size=1)
    assert torch.equal(again.order, plan.order)


def test_shards_and_the_samples_in_them_come_in_every_order():
    starts = torch.tensor([0, 3, 6])
    orders = [plan_epoch(torch.arange(9), None, 3, seed=0, epoch=e, shard_starts=starts).order.view(3, 3) for e in range(400)]
    between = Counter(tuple((order[:, 0] // 3).tolist()) for order in orders)
    within = Counter(tuple(row.tolist()) for order in orders for row in order if row[0] < 3)
    for counts in (between, within):
        assert len(counts) == 6
        assert all(40 <= count <= 95 for count in counts.values())  # 66.7 expected, standard deviation 7.5


def test_drop_last_keeps_the_only_batch():
    plan = plan_epoch(torch.arange(5), None, 8, seed=0, epoch=0, drop_last=True)
    assert plan.sizes == (5,)


@given(sizes.filter(lambda n: n >= 5), batch_sizes, worlds, worlds, st.data())
def test_a_resumed_epoch_trains_the_rest_once(n, batch, world, new_world, data):
    plan = plan_epoch(torch.arange(n), None, batch, seed=3, epoch=2, world_size=world)
    done = data.draw(st.integers(0, plan.num_batches))
    rest = resume_epoch(plan, batches=done, batch_size=batch, world_size=new_world, same_world_size=world == new_world)
    trained = [i for batches in ranks_of(plan, world) for b in batches[:done] for i in b]
    left = [i for batches in ranks_of(rest, new_world) for b in batches for i in b]
    assert not set(trained) & set(left)
    assert len(set(trained + left)) == len(trained + left)
    assert n - len(trained + left) < new_world  # a remainder smaller than the number of ranks cannot be dealt out
    if world == new_world:
        assert ranks_of(rest, world) == [batches[done:] for batches in ranks_of(plan, world)]
    again = resume_epoch(rest, batches=done, batch_size=batch, world_size=new_world)
    assert again == rest or torch.equal(again.order, rest.order)
    assert again.sizes == rest.sizes


def test_streams_are_apart():
    seeds = {stream_seed(a, b, c) for a in range(6) for b in range(6) for c in range(6)}
    assert len(seeds) == 216
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(st.integers(1, 500), st.integers(1, 64), st.integers(1, 4))
def test_a_tail_of_half_a_batch(num_samples, batch_size, world_size):
    full = batch_size * world_size
    half = world_size * ((batch_size + 1) // 2)
    sizes = split_batches(num_samples, batch_size, world_size, tail='half')
    if num_samples < full:
        assert sizes == split_batches(num_samples, batch_size, world_size)
        return
    assert set(sizes) <= {full, half}
    assert sizes[:-1] == [full] * (len(sizes) - 1)
    assert 0 <= num_samples - sum(sizes) < half
    own = [len(range(start, min(start + full, num_samples))) for start in range(0, num_samples, full)]
    assert split_batches(num_samples, batch_size, world_size, tail='own') == [size for size in own if size >= world_size]
