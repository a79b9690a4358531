import random

import numpy as np
import pytest
import torch
from composer.algorithms.blurpool import apply_blurpool
from composer.algorithms.squeeze_excite import apply_squeeze_excite
from composer.models import ComposerClassifier
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, log_softmax, mse_loss, nll_loss, one_hot
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18, squeezenet1_1

from composer_effalgos.plan.classes import NO_CLASS
from composer_effalgos.subset_selection.gradients import (
    LastLayerGradients,
    last_layer_gradients,
    preserve_rng,
)
from composer_effalgos.utils.errors import InputError


class Net(nn.Module):
    """The head is registered first and called last; what follows it has no parameters."""

    def __init__(self, head_first: bool = True, log_probabilities: bool = False) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(6, 4)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5))
        if not head_first:
            self.head = nn.Linear(6, 4)
        self.log_probabilities = log_probabilities

    def forward(self, x):
        logits = self.head(self.body(x))
        return log_softmax(logits, dim=1) if self.log_probabilities else logits


def per_sample_cross_entropy(outputs, batch):
    return cross_entropy(outputs, batch[1], reduction='none')


def batches(n=23, size=8, classes=4):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(n, 5, generator=generator), torch.randint(classes, (n,), generator=generator)
    return list(DataLoader(TensorDataset(x, y), batch_size=size))


def autograd_rows(module, data, loss):
    """The gradient of every sample by one backward pass each: the definition."""
    module.eval()
    rows = []
    for x, y in data:
        for i in range(len(x)):
            module.zero_grad()
            loss(module(x[i : i + 1]), (x[i : i + 1], y[i : i + 1])).sum().backward()
            rows.append(torch.cat([module.head.bias.grad, module.head.weight.grad.flatten()]))
    return torch.stack(rows)


@pytest.mark.parametrize('head_first', [True, False])
def test_equals_autograd_one_sample_at_a_time(head_first):
    torch.manual_seed(0)
    module, data = Net(head_first), batches()
    gradients, labels = last_layer_gradients(ComposerClassifier(module, num_classes=4), data, per_sample_cross_entropy)
    torch.testing.assert_close(gradients.dense(), autograd_rows(module, data, per_sample_cross_entropy))
    assert torch.equal(labels, torch.cat([y for _, y in data]))
    torch.testing.assert_close(gradients.error, cross_entropy_error(module, data))


def cross_entropy_error(module, data):
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        return torch.softmax(module(x), dim=1) - one_hot(y, 4)


@pytest.mark.parametrize('loss', ['nll_after_log_softmax', 'mse', 'weighted'])
def test_any_per_sample_loss_and_what_follows_the_last_layer(loss):
    torch.manual_seed(1)
    module, data = Net(log_probabilities=loss == 'nll_after_log_softmax'), batches()
    losses = {
        'nll_after_log_softmax': lambda outputs, batch: nll_loss(outputs, batch[1], reduction='none'),
        'mse': lambda outputs, batch: mse_loss(outputs, one_hot(batch[1], 4).float(), reduction='none').mean(dim=1),
        'weighted': lambda outputs, batch: cross_entropy(outputs, batch[1], weight=torch.tensor([1.0, 2, 3, 4]), reduction='none'),
    }
    gradients, _ = last_layer_gradients(ComposerClassifier(module, num_classes=4), data, losses[loss])
    torch.testing.assert_close(gradients.dense(), autograd_rows(module, data, losses[loss]))


def test_leaves_modes_generators_and_parameters_alone():
    torch.manual_seed(2)
    module = Net()
    module.train()
    module.body[1].eval()  # a frozen normalisation layer
    model = ComposerClassifier(module, num_classes=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [m.training for m in model.modules()]

    def draws():
        return torch.rand(3), np.random.rand(3), random.random()

    loader = DataLoader(batches(n=8)[0][0], batch_size=4, shuffle=True)
    with preserve_rng():
        expected = draws()

    def shuffled():
        for x in loader:
            random.random()
            np.random.rand()
            yield x, torch.zeros(len(x), dtype=torch.int64)

    last_layer_gradients(model, shuffled(), per_sample_cross_entropy)
    actual = draws()
    assert torch.equal(actual[0], expected[0])
    assert np.array_equal(actual[1], expected[1])
    assert actual[2] == expected[2]
    assert [m.training for m in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error():
    model = ComposerClassifier(Net(), num_classes=4).train()
    with pytest.raises(InputError, match='one row per sample'):
        last_layer_gradients(model, batches(), lambda outputs, batch: cross_entropy(outputs, batch[1]))
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize('kind', ['several labels', 'several numbers'])
def test_labels_that_are_no_classes_give_the_gradients_of_their_own_loss(kind):
    torch.manual_seed(1)
    module = Net()
    labels = (torch.rand(23, 4) < 0.4).float() if kind == 'several labels' else torch.randn(23, 4)
    data = [(x, y) for (x, _), y in zip(batches(), labels.split(8), strict=True)]

    def loss(outputs, batch):
        function = binary_cross_entropy_with_logits if kind == 'several labels' else mse_loss
        return function(outputs, batch[1], reduction='none').mean(dim=1)

    gradients, found = last_layer_gradients(ComposerClassifier(module, num_classes=4), data, loss)
    torch.testing.assert_close(gradients.dense(), autograd_rows(module, data, loss))
    one_positive = (labels.sum(dim=1) == 1) & (kind == 'several labels')
    assert torch.equal(found, torch.where(one_positive, labels.argmax(dim=1), NO_CLASS))


def test_soft_labels_and_mappings():
    model = ComposerClassifier(Net(), num_classes=4)
    x, y = batches()[0]
    soft = 0.9 * one_hot(y, 4) + 0.025
    _, labels = last_layer_gradients(model, [(x, soft)], per_sample_cross_entropy)
    assert torch.equal(labels, y)

    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, batch):
            return {'logits': self.net(batch['x'])}

    gradients, labels = last_layer_gradients(
        Keyed(), [{'x': x, 'labels': y}], lambda out, batch: cross_entropy(out['logits'], batch['labels'], reduction='none')
    )
    assert gradients.embedding is not None
    assert gradients.embedding.shape == (8, 6)
    assert torch.equal(labels, y)


def test_bias_gradients_alone_need_no_linear_layer():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = ComposerClassifier(module, num_classes=4)
    data = [(torch.randn(6, 3, 5, 5), torch.arange(6) % 4)]
    with pytest.raises(InputError, match='expected a linear layer'):
        last_layer_gradients(model, data, per_sample_cross_entropy)
    gradients, _ = last_layer_gradients(model, data, per_sample_cross_entropy, linear_layer=False)
    assert gradients.embedding is None
    torch.testing.assert_close(gradients.error, torch.softmax(module(data[0][0]), dim=1).detach() - one_hot(data[0][1], 4))


def test_a_linear_layer_that_is_not_last_is_refused():
    module = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    with pytest.raises(InputError, match='ends in LayerNorm'):
        last_layer_gradients(ComposerClassifier(module, num_classes=4), batches(), per_sample_cross_entropy)


@pytest.mark.parametrize('surgery', [None, 'blurpool', 'squeeze_excite'])
def test_finds_the_classifier_after_surgery(surgery):
    model = resnet18(num_classes=7)
    if surgery == 'blurpool':
        apply_blurpool(model)
    elif surgery == 'squeeze_excite':
        apply_squeeze_excite(model, latent_channels=8, min_channels=8)
    data = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 6]))]
    gradients, _ = last_layer_gradients(ComposerClassifier(model, num_classes=7), data, per_sample_cross_entropy)
    assert gradients.error.shape == (2, 7)
    assert gradients.embedding is not None
    assert gradients.embedding.shape == (2, 512)


def test_squeeze_excite_gates_are_no_classifier():
    model = squeezenet1_1(num_classes=128)
    apply_squeeze_excite(model, latent_channels=8, min_channels=8)
    with pytest.raises(InputError, match='expected a linear layer'):
        last_layer_gradients(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 6]))], per_sample_cross_entropy)


def test_takes_distributed_data_parallel_off(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = ComposerClassifier(Net(head_first=False), num_classes=4)
        wrapped = nn.parallel.DistributedDataParallel(model)
        ours, _ = last_layer_gradients(wrapped, batches(), per_sample_cross_entropy)
        theirs, _ = last_layer_gradients(model, batches(), per_sample_cross_entropy)
        assert torch.equal(ours.dense(), theirs.dense())
    finally:
        torch.distributed.destroy_process_group()


def test_reduced_precision_keeps_the_error_in_float32():
    model = ComposerClassifier(Net(), num_classes=4)
    gradients, _ = last_layer_gradients(
        model, batches(), per_sample_cross_entropy, context=lambda: torch.autocast('cpu', dtype=torch.bfloat16)
    )
    exact, _ = last_layer_gradients(model, batches(), per_sample_cross_entropy)
    assert gradients.error.dtype == gradients.dense().dtype == torch.float32
    torch.testing.assert_close(gradients.error.sum(dim=1), torch.zeros(23), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients.dense(), exact.dense(), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        ([], 'batches: expected at least one'),
        ([torch.zeros(3, 5)], 'got no labels'),
        ([(torch.zeros(3, 5), torch.rand(3, 2, 2))], 'class indices'),
    ],
)
def test_bad_batches(data, message):
    with pytest.raises(InputError, match=message):
        last_layer_gradients(nn.Sequential(nn.Flatten(0)) if not data else ComposerClassifier(Net(), num_classes=4), data, None)


@pytest.mark.parametrize(
    ('error', 'embedding', 'message'),
    [
        (torch.zeros(3), None, 'gradients.error'),
        (torch.zeros(3, 2, dtype=torch.int64), None, 'gradients.error'),
        (None, None, 'gradients.error: expected a float tensor .*, got NoneType'),
        (torch.zeros(3, 2), torch.zeros(4, 2), 'as many rows in embedding as in error, 3, got 4'),
        (torch.zeros(3, 2), torch.zeros(3), 'gradients.embedding'),
    ],
)
def test_factors_of_the_wrong_shape(error, embedding, message):
    with pytest.raises(InputError, match=message):
        LastLayerGradients(error, embedding)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), m=st.integers(1, 6), classes=st.integers(1, 4), dim=st.none() | st.integers(1, 5), seed=st.integers(0, 99))
def test_factored_algebra_equals_the_written_out_rows(n, m, classes, dim, seed):
    generator = torch.Generator().manual_seed(seed)

    def rows(count):
        embedding = None if dim is None else torch.randn(count, dim, generator=generator, dtype=torch.float64)
        return LastLayerGradients(torch.randn(count, classes, generator=generator, dtype=torch.float64), embedding)

    a, b = rows(n), rows(m)
    x, y = a.dense(), b.dense()
    assert x.shape == (n, a.dim)
    assert len(a) == n
    torch.testing.assert_close(a.gram(b), x @ y.T)
    torch.testing.assert_close(a.gram(), x @ x.T)
    torch.testing.assert_close(a.squared_distances(b), torch.cdist(x, y).square())
    torch.testing.assert_close(a.squared_norms(), x.square().sum(dim=1))
    torch.testing.assert_close(a.sum(), x.sum(dim=0))
    torch.testing.assert_close(a.mean(), x.mean(dim=0))
    torch.testing.assert_close(a.dot(y[0]), x @ y[0])
    torch.testing.assert_close(a.take(torch.tensor([n - 1, 0])).dense(), x[[n - 1, 0]])
