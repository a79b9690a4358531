"""What holds over ranks: equal batch counts, disjoint samples, and the decisions of one rank."""

import json

import pytest
import torch


@pytest.mark.parametrize(
    ('subset', 'options'),
    [('none', []), ('glister', ['--val-share', '0.1']), ('forgetting', ['--kappa', '0.4']), ('milo', ['--kappa', '0.2'])],
)
def test_two_ranks_train_as_one(train_small, subset, options):
    shared = ['--simple', '--subset', subset, *options, '--duration', '5ep']
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


@pytest.mark.distributed
def test_ranks_that_talk_at_every_microbatch_take_as_many(train_small):
    # in microbatches of one, a rank with a sample more would wait for the others for ever
    run = train_small('unused', '--unused', '--subset', 'none', '--microbatch', '1', '--batch-size', '5', '--duration', '5ep', ranks=2)
    kept = [epoch['kept'] for epoch in run['epochs'][0].values()]
    assert any(number % 2 for number in kept), kept
    for first, second, number in zip(*(rank.values() for rank in run['epochs']), kept, strict=True):
        assert len(first['order']) == len(second['order']) == number // 2
        assert not set(first['order']) & set(second['order'])


@pytest.mark.distributed
def test_two_nodes_train_as_two_ranks_of_one(train_small):
    """Two launchers, as on two machines; the network between them is the loopback."""
    arguments = ['--batch-size', '4', '--subset', 'glister', '--duration', '5ep']
    node, nodes = train_small('node', *arguments, ranks=2), train_small('nodes', *arguments, ranks=2, nodes=2)
    assert nodes['epochs'] == node['epochs']  # kept sets, order and weights of both ranks
    assert nodes['samples'] == node['samples']
    assert nodes['saved'] == node['saved'] > 0
    assert torch.equal(nodes['scores'].nan_to_num(-1), node['scores'].nan_to_num(-1))
    for name, value in node['model'].items():
        assert torch.equal(value, nodes['model'][name])


@pytest.mark.distributed
def test_a_recipe_on_two_nodes_goes_on_where_it_stopped(launch, tmp_path):
    train = ['-m', 'composer_effalgos.train', 'yamls/digits/digits_infobatch.yaml']
    settings = [
        f'save_folder={tmp_path}',
        'run_name=nodes',
        'dataset.limit=128',
        'progress_bar=false',
        'save_interval=1ep',
        'autoresume=true',
    ]
    for epochs in (1, 2):
        status, said = launch(*train, *settings, f'max_duration={epochs}ep', ranks=2, nodes=2)
        assert status == 0, said
        written = json.loads((tmp_path / 'nodes' / 'summary.json').read_text())
        assert written['world_size'] == 2
        assert [entry['epoch'] for entry in written['epochs']] == list(range(epochs))
    assert sum(line.startswith('nodes: accuracy') for line in said.splitlines()) == 1
