from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from composer_effalgos.models import build_model
from composer_effalgos.utils.errors import InputError


def _conv(inputs: int, outputs: int, kernel: int) -> int:
    """Weights, biases and the batch norm behind it."""
    return inputs * outputs * kernel**2 + 3 * outputs


def _dense(inputs: int, outputs: int) -> int:
    return inputs * outputs + 3 * outputs


def _c1(side: int, classes: int = 10) -> int:
    return _conv(3, 64, 5) + _conv(64, 64, 5) + _dense(64 * side**2, 384) + _dense(384, 192) + 193 * classes


def _c2(classes: int = 10) -> int:
    channels = [64, 64, 128, 128, *[256] * 3, *[512] * 6]
    convolutions = sum(_conv(before, after, 3) for before, after in zip([3, *channels], channels, strict=False))
    return convolutions + _dense(512, 512) + 513 * classes


@pytest.mark.parametrize(
    ('name', 'classes', 'options', 'count'),
    [
        ('keskar_c1', 10, {}, _c1(8)),  # 32 -> pool 16 -> pool 8
        ('keskar_c1', 100, {}, _c1(8, 100)),  # C3
        ('keskar_c1', 10, {'conv_stride': 2}, _c1(2)),  # 32 -> 16 -> 8 -> 4 -> 2
        ('keskar_c1', 10, {'image_size': 8}, _c1(2)),
        ('keskar_c2', 10, {}, _c2()),
        ('keskar_c2', 100, {}, _c2(100)),  # C4
        ('keskar_c2', 10, {'image_size': 8}, _c2()),
    ],
)
def test_parameter_counts(name: str, classes: int, options: dict[str, int], count: int) -> None:
    assert sum(parameter.numel() for parameter in build_model(name, classes, **options).parameters()) == count


def test_the_counts_that_the_docstrings_give() -> None:
    assert (_c1(8), _c1(2), _c2()) == (1_757_834, 283_274, 14_991_946)


@pytest.mark.parametrize('size', [8, 9, 31, 32])
@pytest.mark.parametrize(('name', 'options'), [('keskar_c1', {}), ('keskar_c1', {'conv_stride': 2}), ('keskar_c2', {})])
def test_logits_and_gradients(name: str, options: dict[str, int], size: int) -> None:
    torch.manual_seed(0)
    model = build_model(name, 7, image_size=size, **options)
    logits = model(torch.randn(4, 3, size, size))
    assert logits.shape == (4, 7)
    nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def _kinds(model: nn.Module) -> str:
    letters = {nn.Conv2d: 'c', nn.BatchNorm2d: 'b', nn.BatchNorm1d: 'b', nn.ReLU: 'r', nn.Dropout: 'd', nn.MaxPool2d: 'p', nn.Linear: 'l'}
    return ''.join(letters[type(module)] for module in model.modules() if type(module) in letters)


def test_the_order_of_the_layers() -> None:
    assert _kinds(build_model('keskar_c1', 10)) == 'cbrp' * 2 + 'lbrd' * 2 + 'l'
    stack = {2: 'cbrdcbrp', 3: 'cbrdcbrdcbrp'}
    assert _kinds(build_model('keskar_c2', 10)) == stack[2] * 2 + stack[3] * 3 + 'dlbrdl'
    rates = [module.p for module in build_model('keskar_c2', 10).modules() if isinstance(module, nn.Dropout)]
    assert rates == [0.3, 0.4, *[0.4] * 6, 0.5, 0.5]


def test_weights_start_from_glorots_uniform_distribution() -> None:
    torch.manual_seed(0)
    for module in build_model('keskar_c1', 10).modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            fan_out = module.weight.numel() // module.weight.shape[1]
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert 0.98 * bound < module.weight.abs().max() <= bound
            assert not module.bias.any()


@pytest.mark.parametrize(('options', 'message'), [({'conv_stride': 0}, 'model.conv_stride: '), ({'image_size': 0}, 'model.image_size: ')])
def test_impossible_sizes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model('keskar_c1', 10, **options)
