"""The device path over ranks and through interruptions, in processes of its own."""

import pytest
import torch

from composer_effalgos.datasets.convert import convert

IMAGES = ['--images', '--loader', 'device']


@pytest.mark.distributed
def test_two_ranks_train_as_one_with_augmentation(train_small):
    """Augmentation belongs to the sample, so even augmented runs are the same at any number of ranks, up to the order of a sum."""
    shared = [*IMAGES, '--simple', '--subset', 'none', '--duration', '4ep']
    one = train_small('one', *shared, '--batch-size', '8')
    two = train_small('two', *shared, '--batch-size', '4', ranks=2)
    for epoch, alone in one['epochs'][0].items():
        first, second = (rank[epoch] for rank in two['epochs'])
        assert (first['order'], second['order']) == (alone['order'][::2], alone['order'][1::2])
    assert torch.allclose(one['scores'], two['scores'], atol=1e-4, equal_nan=True)
    for name, value in one['model'].items():
        assert torch.allclose(value, two['model'][name], atol=1e-4)


@pytest.mark.distributed
def test_the_paths_deal_out_the_same_samples_to_two_ranks(train_small):
    # what is pruned later depends on scores, and these on the augmentation: the first epoch is compared
    shared = ['--images', '--simple', '--subset', 'none', '--duration', '1ep', '--batch-size', '4']
    runs = [train_small(loader, *shared, '--loader', loader, ranks=2) for loader in ('workers', 'device')]
    assert runs[0]['epochs'] == runs[1]['epochs']


@pytest.mark.distributed
@pytest.mark.parametrize('loader', ['device', 'ffcv', 'mds'])
def test_a_killed_run_goes_on_to_the_same_end(train_small, tmp_path, loader):
    if loader == 'device':
        shared = IMAGES
    else:
        pytest.importorskip({'ffcv': 'ffcv', 'mds': 'streaming'}[loader])
        convert('digits', ['limit=90'], loader, tmp_path / 'packed')
        shared = ['--loader', loader, '--packed', str(tmp_path / 'packed')]
    shared = [*shared, '--subset', 'glister', '--duration', '4ep', '--batch-size', '4']
    whole = train_small('whole', *shared, ranks=2)
    train_small('killed', *shared, '--kill-at', '17', ranks=2)  # within an epoch, and between checkpoints
    resumed = train_small('killed', *shared, ranks=2)
    assert resumed['batches'] == whole['batches']
    assert torch.equal(resumed['scores'].nan_to_num(-1), whole['scores'].nan_to_num(-1))
    for name, value in whole['model'].items():
        assert torch.equal(value, resumed['model'][name])
