"""Killed and resumed runs end bit-identical to the run that was not killed."""

import random

import pytest
import torch
from test_resume_entries import differences


def assert_identical(one: dict, other: dict) -> None:
    for name in ('model', 'optimizer'):
        flat = [torch.utils._pytree.tree_leaves(run[name]) for run in (one, other)]
        assert len(flat[0]) == len(flat[1]) > 0
        for a, b in zip(*flat, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert torch.equal(one['scores'].nan_to_num(-1), other['scores'].nan_to_num(-1))  # NaN: never selected
    for name in ('saved', 'batches', 'samples'):
        assert one[name] == other[name]


CASES = {
    'no workers': (2, []),
    'workers': (1, ['--workers', '2']),
    'microbatches': (1, ['--microbatch', '3']),
    'checkpoints at epoch ends': (1, ['--save-interval', '1ep']),
    'forgetting, validation held out': (2, ['--subset', 'forgetting', '--kappa', '0.5', '--val-share', '0.1']),
    'milo': (2, ['--subset', 'milo', '--kappa', '0.1']),
}


@pytest.mark.parametrize('case', CASES)
def test_killed_at_random_batches(train_small, case):
    kills, arguments = CASES[case]
    whole = train_small('whole', *arguments)
    draw = random.Random(case)
    for kill_at in sorted(draw.sample(range(3, whole['batches']), kills)):
        train_small('killed', *arguments, '--kill-at', str(kill_at))
    assert_identical(whole, train_small('killed', *arguments))
    assert whole['saved'] > 0


def test_killed_at_random_batches_on_two_ranks(train_small):
    """One training, killed again and again."""
    arguments = ['--batch-size', '4', '--workers', '1']
    whole = train_small('whole', *arguments, ranks=2)
    draw = random.Random(0)
    # checkpoints are three batches apart: each kill comes after the last one's checkpoint
    kill_ats = sorted(draw.choices(range(4, whole['batches']), k=5))
    for kill_at in kill_ats:
        train_small('killed', *arguments, '--kill-at', str(kill_at), ranks=2)
    assert_identical(whole, train_small('killed', *arguments, ranks=2))


@pytest.mark.distributed
def test_killed_on_two_ranks_that_keep_their_own_scores(train_small, tmp_path):
    """The checkpoints too are those of the run that was not killed, entry by entry, within an epoch and at its end."""
    arguments = ['--batch-size', '4', '--simple', '--subset', 'none', '--shard']
    whole = train_small('whole', *arguments, ranks=2)
    train_small('killed', *arguments, '--kill-at', '17', ranks=2)
    assert_identical(whole, train_small('killed', *arguments, ranks=2))
    assert whole['saved'] > 0
    saved = sorted(path.relative_to(tmp_path / 'whole') for path in (tmp_path / 'whole').rglob('checkpoints/**/ep*.pt'))
    plans = []
    for path in saved:
        one, other = (torch.load(tmp_path / run / path, weights_only=False) for run in ('whole', 'killed'))
        assert not differences(one['rng'], other['rng'])
        assert not differences(one['state'], other['state'])
        plans.append(one['state']['callbacks']['EpochPlanner']['plan'])
    assert any(plan is not None for plan in plans)


@pytest.mark.parametrize('shard', [[], ['--shard']], ids=['', 'sharded'])
@pytest.mark.parametrize(('before', 'after'), [(1, 2), (2, 1)])
def test_saved_on_some_ranks_and_resumed_on_others(train_small, before, after, shard):
    def batch(ranks):
        return ['--simple', '--batch-size', str(8 // ranks), '--subset', 'none', *shard]

    whole = train_small('whole', *batch(before), ranks=before)
    kill_at = 16  # within the second epoch, of 12 batches
    train_small('killed', *batch(before), '--kill-at', str(kill_at), ranks=before)
    resumed = train_small('killed', *batch(after), ranks=after)
    # the same global batches, whose gradients are summed in another order
    assert resumed['samples'] == whole['samples']
    assert resumed['batches'] == whole['batches']
    assert torch.allclose(resumed['scores'], whole['scores'], atol=1e-4)
    for name, value in whole['model'].items():
        assert torch.allclose(value, resumed['model'][name], atol=1e-4)
