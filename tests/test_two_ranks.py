"""What holds over ranks: equal batch counts, disjoint samples, and the decisions of one rank."""

import pytest
import torch


@pytest.mark.parametrize('subset', ['none', 'glister'])
def test_two_ranks_train_as_one(train_small, subset):
    shared = ['--simple', '--subset', subset, '--duration', '5ep']
    one = train_small('one', *shared, '--batch-size', '8')
    two = train_small('two', *shared, '--batch-size', '4', ranks=2)
    assert two['batches'] == one['batches']
    assert two['samples'] == one['samples']
    assert two['saved'] == one['saved'] > 0
    for epoch, alone in one['epochs'][0].items():
        first, second = (rank[epoch] for rank in two['epochs'])
        assert first['batches'] == second['batches'] == alone['batches']
        assert not set(first['order']) & set(second['order'])
        assert sorted(first['order'] + second['order']) == sorted(alone['order'])
        assert first['order'] == alone['order'][::2]  # the very same order, dealt out
        assert second['order'] == alone['order'][1::2]
        assert first['weights'] == pytest.approx(alone['weights'][::2], abs=1e-4)
    # the gradient of a global batch is the same up to the order of a sum
    assert torch.allclose(one['scores'], two['scores'], atol=1e-4, equal_nan=True)
    for name, value in one['model'].items():
        assert torch.allclose(value, two['model'][name], atol=1e-4)


def test_scores_are_exactly_those_of_one_rank_where_the_arithmetic_is_the_same(train_small):
    # without learning every sample's loss is the same number on any rank
    shared = ['--simple', '--subset', 'none', '--lr', '0', '--duration', '3ep', '--batch-size', '1', '--save-interval', '1ep']
    one, two = train_small('one', *shared), train_small('two', *shared, ranks=2)
    assert torch.allclose(one['scores'], two['scores'], atol=1e-6)
    assert not one['scores'].isnan().any()
