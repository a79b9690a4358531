from __future__ import annotations

import math

import composer.functional as cf
import pytest
import torch
import torchvision
from composer.algorithms.blurpool.blurpool_layers import BlurConv2d, BlurMaxPool2d
from composer.algorithms.squeeze_excite.squeeze_excite import SqueezeExcite2d
from torch import nn

from composer_effalgos.models import MODELS, build_model
from composer_effalgos.models.cifar import _PaddedIdentity


def _conv(in_channels: int, channels: int, kernel: int = 3, bias: bool = False) -> int:
    return in_channels * channels * kernel**2 + bias * channels


def _thin_resnet_parameters(blocks: int) -> int:
    """Counted from the table in He et al. 2016, section 4.2; batch norm has two parameters a channel, option A has none."""
    stages = [(16, 16), (16, 32), (32, 64)]
    convolutions = sum(_conv(before, after) + (2 * blocks - 1) * _conv(after, after) for before, after in stages)
    norms = 2 * 16 + sum(2 * after * 2 * blocks for _, after in stages)
    return _conv(3, 16) + convolutions + norms + 64 * 10 + 10


def _vgg_parameters(channels: list[int]) -> int:
    pairs = zip([3, *channels], channels, strict=False)
    return sum(_conv(before, after, bias=True) + 2 * after for before, after in pairs) + 512 * 10 + 10


PARAMETERS = {
    'resnet20_cifar': _thin_resnet_parameters(3),
    'resnet56_cifar': _thin_resnet_parameters(9),
    # torchvision's own count for 1000 classes, with its 7x7 stem and its head replaced
    'resnet18_cifar': 11_689_512 - _conv(3, 64, 7) + _conv(3, 64) - 513 * 1000 + 513 * 10,
    'resnet50_cifar': 25_557_032 - _conv(3, 64, 7) + _conv(3, 64) - 2049 * 1000 + 2049 * 10,
    'mobilenet_v2_cifar': 3_504_872 - 1281 * 1000 + 1281 * 10,
    'vgg11_bn_cifar': _vgg_parameters([64, 128, 256, 256, 512, 512, 512, 512]),
    'vgg19_bn_cifar': _vgg_parameters([64, 64, 128, 128, *[256] * 4, *[512] * 8]),
    'alexnet_cifar': _conv(3, 64, 11, True)
    + _conv(64, 192, 5, True)
    + _conv(192, 384, 3, True)
    + _conv(384, 256, 3, True)
    + _conv(256, 256, 3, True)
    + 257 * 10,
}
CIFAR = [name for name, builder in MODELS.items() if builder.__module__.endswith('.cifar')]
ABOUT = {'resnet20_cifar': 0.27, 'resnet56_cifar': 0.85, 'resnet18_cifar': 11.17, 'vgg19_bn_cifar': 20.04, 'alexnet_cifar': 2.47}


@pytest.mark.parametrize('name', CIFAR)
def test_parameter_counts(name: str) -> None:
    count = sum(parameter.numel() for parameter in build_model(name, 10).parameters())
    assert count == PARAMETERS[name]
    assert count / 1e6 == pytest.approx(ABOUT.get(name, count / 1e6), abs=0.005)


@pytest.mark.parametrize('name', CIFAR)
def test_every_model_maps_images_of_several_sizes_to_logits_of_a_last_linear_layer(name: str) -> None:
    model = build_model(name, 7).eval()
    head = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(head) == 1
    seen = []
    head[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        for size in (8, 16, 32, 40):
            logits = model(torch.randn(2, 3, size, size))
            assert logits.shape == (2, 7)
            assert logits is seen[-1]


@pytest.mark.parametrize(('name', 'side'), [('resnet18_cifar', 4), ('resnet20_cifar', 8), ('mobilenet_v2_cifar', 4), ('vgg11_bn_cifar', 1)])
def test_strides_fit_32x32(name: str, side: int) -> None:
    model = build_model(name, 10).eval()
    shapes = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape[-1]))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert shapes[0] == 32  # the stem keeps every pixel
    assert shapes[-1] == max(side, 2)  # of vgg11 the last convolution is before the last pooling


@pytest.mark.parametrize('name', CIFAR)
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    model = build_model(name, 3)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 0])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        if not key.endswith('bias'):  # a bias before batch norm has none
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize('name', CIFAR)
def test_channels_last_gives_the_same_logits(name: str) -> None:
    model, images = build_model(name, 5).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        found = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', CIFAR)
def test_convolutions_start_from_kaimings_distribution(name: str) -> None:
    for module in build_model(name, 10).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() >= 5000 and module.groups == 1:
            fan_out = module.out_channels * math.prod(module.kernel_size)
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
            assert module.bias is None or not module.bias.any()


# Strided convolutions and poolings with at least 16 input channels, which BlurPool replaces
@pytest.mark.parametrize(
    ('name', 'count'),
    [
        ('resnet18_cifar', 3 * 2),  # a block's first convolution and its shortcut
        ('resnet50_cifar', 3 * 2),
        ('resnet20_cifar', 2),
        ('resnet56_cifar', 2),
        ('vgg11_bn_cifar', 5),
        ('vgg19_bn_cifar', 5),
        ('alexnet_cifar', 3),
        ('mobilenet_v2_cifar', 3),
    ],
)
def test_composers_surgery_finds_something_to_replace(name: str, count: int) -> None:
    model = build_model(name, 10)
    cf.apply_blurpool(model)
    assert sum(isinstance(module, (BlurConv2d, BlurMaxPool2d)) for module in model.modules()) == count
    cf.apply_squeeze_excite(model, min_channels=16, latent_channels=8)
    assert sum(isinstance(module, SqueezeExcite2d) for module in model.modules()) > 0
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert isinstance([module for module in model.modules() if isinstance(module, nn.Linear)][-1], nn.Linear)
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1].split('.')[0] in ('fc', 'classifier')


def test_option_a_takes_every_second_pixel_and_adds_zero_channels() -> None:
    x = torch.randn(2, 16, 9, 8)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        out = _PaddedIdentity(16, 2)(x.to(memory_format=memory_format))
        assert out.shape == (2, 32, 5, 4)
        for channel in range(32):
            for row in range(5):
                for column in range(4):
                    expected = x[:, channel, 2 * row, 2 * column] if channel < 16 else torch.zeros(2)
                    assert torch.equal(out[:, channel, row, column], expected)


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_resnets_are_torchvisions_but_for_the_stem(name: str) -> None:
    ours, theirs = build_model(f'{name}_cifar', 10).eval(), torchvision.models.get_model(name, num_classes=10).eval()
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if key != 'conv1.weight'}, strict=False)
    theirs.conv1, theirs.maxpool = ours.conv1, nn.Identity()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_residual_branches_can_start_at_zero() -> None:
    assert not build_model('resnet18_cifar', 10, zero_init_residual=True).layer1[0].bn2.weight.any()
    assert build_model('resnet18_cifar', 10).layer1[0].bn2.weight.all()


def test_pooling_of_small_maps_changes_nothing_at_32x32() -> None:
    model, images = build_model('alexnet_cifar', 10).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        small = model(images)
        for module in model.modules():
            if isinstance(module, nn.MaxPool2d):
                module.ceil_mode = False
        assert torch.equal(model(images), small)


def test_resnet20_learns_digits() -> None:
    from composer_effalgos.datasets import build_dataset

    dataset = build_dataset('digits', 'train', augment=False, limit=64)
    images, labels = torch.stack([image for image, _ in dataset]), dataset.targets
    model = build_model('resnet20_cifar', 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2  # from log 10
