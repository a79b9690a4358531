"""Pruning on ranks of which each keeps its own part of the samples, against one straight line over all of them; and what is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from composer.core import State
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks_in_threads import on_ranks
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import AdaBatch, InfoBatch, InputError, Pruning, PruningRule, SubsetSelection
from composer_effalgos.plan import SampleRows, Shard, ShardTable
from composer_effalgos.plan.bijection import Bijection
from composer_effalgos.plan.shard_loader import ShardPlan
from composer_effalgos.pruning.prune import prune_part
from composer_effalgos.pruning.rules import Epoch, find_rule
from composer_effalgos.utils.errors import CheckpointError

RANKS = st.sampled_from([1, 2, 4])


def kept_of(parts, world_size):
    """Samples and weights of all ranks, ascending."""
    samples = torch.cat([positions * world_size + rank for rank, (positions, _) in enumerate(parts)])
    order = samples.argsort()
    weights = None if parts[0][1] is None else torch.cat([weights for _, weights in parts])[order].tolist()
    return samples[order].tolist(), weights


@settings(max_examples=60)
@given(RANKS, st.integers(4, 80), st.floats(0, 0.95), st.booleans(), st.integers(0, 99))
def test_infobatch_drops_those_with_the_smallest_keys(world_size, size, ratio, banded, seed):
    draw = np.random.default_rng(seed)
    scores = torch.from_numpy(draw.normal(size=size)).float()
    scores[torch.from_numpy(draw.random(size) < 0.1)] = math.nan
    bands = [(0.3, 0.8), (0.6, ratio)] if banded else None

    parts = on_ranks(world_size, lambda ranks: prune_part(Shard(size, ranks).part(scores), ratio, seed, Shard(size, ranks), bands=bands))
    samples, weights = kept_of(parts, world_size)

    finite = scores[scores.isfinite()].double().numpy()
    limits = (
        ([-np.inf] + [np.quantile(finite, quantile) for quantile, _ in bands] if banded else [-np.inf, finite.mean()])
        if len(finite)
        else []
    )
    keys = Bijection(size, seed)(torch.arange(size))
    expected = dict.fromkeys(range(size), 1.0)
    for low, high, share in zip(limits[:-1], limits[1:], [ratio for _, ratio in bands] if banded else [ratio], strict=True):
        members = sorted((i for i in range(size) if low <= float(scores[i]) < high), key=keys.__getitem__)
        dropped = len(members) - math.floor(len(members) * (1 - share) + 1e-9)
        for sample in members[:dropped]:
            del expected[sample]
        for sample in members[dropped:]:
            expected[sample] = 1 / (1 - share)
    assert samples == list(expected)
    assert weights == pytest.approx(list(expected.values()))


@settings(max_examples=30)
@given(RANKS, st.integers(4, 60), st.floats(0, 0.95), st.integers(0, 99))
def test_random_takes_the_least_trained_first(world_size, size, ratio, seed):
    trained = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, size)).int()

    def keep(ranks):
        shard = Shard(size, ranks)
        table = SampleRows(torch.zeros(0, len(shard)), torch.zeros(0), torch.zeros(0), shard.part(trained))
        return find_rule('random').keep_part(table, Epoch(1, 5, 0.2, ratio, torch.Generator().manual_seed(seed)), shard)

    samples, _ = kept_of(on_ranks(world_size, keep), world_size)
    seed_drawn = Epoch(1, 5, 0.2, ratio, torch.Generator().manual_seed(seed)).draw_seed()
    keys = Bijection(size, seed_drawn)(torch.arange(size))
    straight = sorted(range(size), key=lambda sample: (int(trained[sample]), int(keys[sample])))
    assert samples == sorted(straight[: max(1, round(size * (1 - ratio)))])


@pytest.mark.parametrize('decay', [0.0, 0.9])
@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_scores_come_back_to_their_owners(world_size, decay):
    """Three epochs, of which each trains on some samples, against a loop over samples."""
    size, history = 30, 2

    def run(ranks):
        planner = SimpleNamespace()
        table = ShardTable(planner, history, decay, ranks)
        table.reset(size)
        for epoch in range(3):
            draw = np.random.default_rng(epoch)
            shard = Shard(size, ranks)
            keep, losses = torch.from_numpy(draw.random(size) < 0.6), torch.from_numpy(draw.random(size)).float()
            kept = shard.part(keep).nonzero()[:, 0]
            plan = ShardPlan(kept, None, (int(keep.sum()),), shard=shard, seed=epoch).dealt()
            order = plan.rank_order(ranks.rank, world_size)
            planner.loader = SimpleNamespace(plan=plan, rank_order=order)
            for start in range(0, len(order), 4):
                table.note(losses[order[start : start + 4]], slice(start, min(start + 4, len(order))))
            if table.noted != bool(len(order)):
                raise AssertionError
            table.end_epoch(None)
        saved = table.state_dict(None)
        again = ShardTable(planner, history, decay, ranks)
        loaded = [value if ranks.rank == 0 else None for value in saved.values()]
        if world_size == 1:
            again.load_state_dict(dict(zip(saved, loaded, strict=True)))
            assert torch.equal(again.rows.history, table.rows.history)
        return saved

    found = on_ranks(world_size, run)[0]
    expected = torch.zeros(history, size)
    counts = torch.zeros(size, dtype=torch.int32)
    for epoch in range(3):
        draw = np.random.default_rng(epoch)
        keep, losses = torch.from_numpy(draw.random(size) < 0.6), torch.from_numpy(draw.random(size)).float()
        for sample in keep.nonzero()[:, 0].tolist():
            old = expected[0, sample].clone()
            expected[1, sample] = old
            expected[0, sample] = decay * old + (1 - decay) * losses[sample] if decay and counts[sample] else losses[sample]
            counts[sample] += 1
    assert torch.allclose(found['history'], expected)
    assert torch.equal(found['trained'], counts)
    assert torch.equal(found['scored'], counts > 0)


# ---------------------------------------------------------------------- runs


def test_checkpoints_of_the_ends_of_epochs_go_over_to_runs_without_it(make_trainer, tmp_path):
    settings = {'max_duration': '4ep', 'save_folder': str(tmp_path), 'save_interval': '5ba', 'save_filename': '{epoch}-{batch_in_epoch}.pt'}
    settings['save_latest_filename'] = None
    make_trainer([InfoBatch(delta=1.0, shard=True)], **{**settings, 'save_interval': '1ep'}).fit()
    make_trainer([InfoBatch(delta=1.0, shard=True)], **settings, save_overwrite=True).fit()
    at_end, within = tmp_path / '2-0.pt', sorted(tmp_path.glob('1-[1-9]*.pt'))[0]
    resumed = make_trainer([InfoBatch(delta=1.0)], max_duration='3ep', load_path=str(at_end))
    resumed.fit()
    assert resumed.state.algorithms[0].samples_saved > 0
    with pytest.raises(CheckpointError, match='by a run with shard=True'):
        make_trainer([InfoBatch(delta=1.0)], max_duration='3ep', load_path=str(within)).fit()


def test_a_checkpoint_from_within_an_epoch_without_it_is_refused(make_trainer, tmp_path):
    names = {'save_folder': str(tmp_path), 'save_filename': '{epoch}-{batch_in_epoch}.pt', 'save_latest_filename': None}
    make_trainer([InfoBatch(delta=1.0)], max_duration='2ep', save_interval='5ba', **names).fit()
    within = sorted(tmp_path.glob('1-[1-9]*.pt'))[0]
    with pytest.raises(CheckpointError, match='by a run without shard=True'):
        make_trainer([InfoBatch(delta=1.0, shard=True)], max_duration='3ep', load_path=str(within)).fit()


class Pointwise(PruningRule):
    pointwise = True

    def keep(self, table, epoch):
        assert table.scored.all()
        return (table.scores > 1.0).nonzero()[:, 0], None


def test_a_rule_of_ones_own_that_looks_at_each_row_alone(make_trainer):
    kept = []
    for shard in (False, True):
        trainer = make_trainer([Pruning(Pointwise(), delta=1.0, shard=shard), AdaBatch(2, '2ep')], max_duration='3ep', lr=0.0)
        trainer.fit()
        kept.append([sum(sizes) for sizes in trainer.recorder.sizes])
        assert trainer.state.algorithms[0].samples_saved > 0
    assert kept[0] == kept[1]  # without learning the scores are the same, so the rule decides alike


class NeedsAll(PruningRule):
    def keep(self, table, epoch):
        return None


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (
            lambda: Pruning('seta', shard=True),
            r'shard: expected a rule .*\(infobatch, random, pdd, ies, or .* got SetaRule; leave shard out',
        ),
        (lambda: Pruning('rho', shard=True), 'got RhoRule'),
        (lambda: Pruning(NeedsAll(), shard=True), 'got NeedsAll'),
        (lambda: InfoBatch(class_balanced=True, shard=True), r'InfoBatch\(shard=True\) cannot be combined with class_balanced=True'),
        (lambda: Pruning('random', labels=[0, 1], shard=True), r'Pruning\(shard=True\) cannot be combined with labels'),
        (lambda: InfoBatch(shard=1), 'shard: expected True or False, got 1'),
    ],
)
def test_refused_when_made(make, message):
    # a name alone gives rho without its losses, which are refused first
    if 'RhoRule' in message:
        make = lambda: Pruning({'name': 'rho', 'irreducible': torch.zeros(3)}, shard=True)  # noqa: E731
    with pytest.raises(InputError, match=message) as error:
        make()
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('first', [0, 1])
def test_refused_with_a_subset(make_trainer, first):
    algorithms = [InfoBatch(shard=True), SubsetSelection('random', 0.5, '2ep')]
    with pytest.raises(InputError, match=r'InfoBatch\(shard=True\) cannot be combined with SubsetSelection'):
        make_trainer(algorithms[::-1] if first else algorithms)


def test_refused_with_sharded_checkpoints(make_trainer, monkeypatch):
    monkeypatch.setattr(State, 'fsdp_sharded_state_dict_enabled', True)
    with pytest.raises(InputError, match="shard: cannot be combined with FSDP's sharded checkpoints"):
        make_trainer([InfoBatch(shard=True)])


def test_refused_where_the_order_goes_by_shards(make_trainer, problem):
    class InShards(TensorDataset):
        shard_starts = torch.tensor([0, 100])

    loader = DataLoader(InShards(*problem.tensors), batch_size=16, shuffle=True)
    with pytest.raises(InputError, match='shard: expected samples that are shuffled individually, got InShards'):
        make_trainer([InfoBatch(shard=True)], train_loader=loader).fit()


def test_a_recipe_takes_it(tmp_path):
    from composer_effalgos.recipes.build import build_trainer
    from composer_effalgos.recipes.schema import load_recipe

    settings = [
        'algorithms.infobatch={shard: true}',
        'max_duration=3ep',
        'dataset.limit=128',
        'progress_bar=false',
        f'save_folder={tmp_path}',
    ]
    trainer = build_trainer(load_recipe('yamls/digits/digits_infobatch.yaml', settings))
    trainer.fit()
    pruning = next(algorithm for algorithm in trainer.state.algorithms if isinstance(algorithm, InfoBatch))
    assert pruning.shard
    assert pruning.samples_saved > 0
