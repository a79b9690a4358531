"""Networks for 32x32 images: most have a 3x3 stem without early pooling and strides that leave 4x4 to 8x8 before global pooling.

All take ``[B, 3, H, W]``, pool globally and end in one ``nn.Linear``, so other image sizes (8x8 digits, progressive resizing) work too.
Convolutions use Kaiming normal initialisation (He et al. 2015, arXiv 1502.01852).
"""

from __future__ import annotations

from collections import OrderedDict

import torchvision
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.vgg import cfgs as vgg_layers
from torchvision.models.vgg import make_layers as make_vgg_layers


class _PaddedIdentity(nn.Module):
    """Shortcut option A of He et al.: strided subsampling, with zeros for the additional channels."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if channels == in_channels else _PaddedIdentity(channels - in_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.relu(self.bn1(self.conv1(x)))
        return nn.functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def _thin_resnet(depth: int, num_classes: int) -> nn.Sequential:
    """He et al. 2016 (arXiv 1512.03385), section 4.2: 3 stages of (depth - 2) / 6 basic blocks, 16, 32, 64 channels, option A shortcuts."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(3, 16, 3, padding=1, bias=False), bn=nn.BatchNorm2d(16), relu=nn.ReLU()
    )
    in_channels = 16
    for stage, channels in enumerate((16, 32, 64), start=1):
        blocks = []
        for block in range((depth - 2) // 6):
            blocks.append(_BasicBlock(in_channels, channels, stride=2 if stage > 1 and block == 0 else 1))
            in_channels = channels
        layers[f'layer{stage}'] = nn.Sequential(*blocks)
    model = nn.Sequential(layers | _head(in_channels, num_classes))
    _init_convolutions(model)
    return model


def _head(in_channels: int, num_classes: int) -> OrderedDict[str, nn.Module]:
    return OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(in_channels, num_classes))


def _init_convolutions(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def resnet20_cifar(num_classes: int) -> nn.Sequential:
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2) with zero-padded identity shortcuts (option A): 0.27 M parameters."""
    return _thin_resnet(20, num_classes)


def resnet56_cifar(num_classes: int) -> nn.Sequential:
    """ResNet-56 for CIFAR (He et al. 2016, section 4.2) with zero-padded identity shortcuts (option A): 0.85 M parameters."""
    return _thin_resnet(56, num_classes)


def resnet18_cifar(num_classes: int, zero_init_residual: bool = False) -> nn.Module:
    """torchvision's ResNet-18 with a 3x3 stem and no max-pooling: 11.17 M parameters for 10 classes.

    Args:
        num_classes: Number of classes.
        zero_init_residual: Zero-initialise the last batch norm of each block (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
    """
    return _with_small_stem(torchvision.models.resnet18(num_classes=num_classes, zero_init_residual=zero_init_residual))


def resnet50_cifar(num_classes: int, zero_init_residual: bool = False) -> nn.Module:
    """torchvision's ResNet-50 with a 3x3 stem and no max-pooling: 23.5 M parameters for 10 classes.

    Args:
        num_classes: Number of classes.
        zero_init_residual: Zero-initialise the last batch norm of each block (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
    """
    return _with_small_stem(torchvision.models.resnet50(num_classes=num_classes, zero_init_residual=zero_init_residual))


def _with_small_stem(model: torchvision.models.ResNet) -> torchvision.models.ResNet:
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    _init_convolutions(model.conv1)
    model.maxpool = nn.Identity()
    return model


def vgg11_bn_cifar(num_classes: int) -> nn.Sequential:
    """VGG-11 convolutions (Simonyan and Zisserman, arXiv 1409.1556, net A), batch norm and one linear layer: 9.2 M parameters."""
    return _vgg('A', num_classes)


def vgg19_bn_cifar(num_classes: int) -> nn.Sequential:
    """VGG-19 convolutions (Simonyan and Zisserman, arXiv 1409.1556, net E), batch norm and one linear layer: 20.0 M parameters."""
    return _vgg('E', num_classes)


def _vgg(configuration: str, num_classes: int) -> nn.Sequential:
    model = nn.Sequential(OrderedDict(features=make_vgg_layers(vgg_layers[configuration], batch_norm=True)) | _head(512, num_classes))
    _init_convolutions(model)
    return _pool_small_maps(model)


def alexnet_cifar(num_classes: int) -> nn.Sequential:
    """AlexNet (Krizhevsky, arXiv 1404.5997) in the CIFAR form used by AdaBatch: 5 convolutions, one linear layer, 2.5 M parameters.

    An 11x11 stem of stride 4 and three pooling layers reduce 32x32 to 1x1. There is no batch norm: start with a learning rate near 0.01.
    """

    def conv(in_channels: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(in_channels, channels, kernel, stride=stride, padding=kernel // 2), nn.ReLU(inplace=True)]

    features = nn.Sequential(
        *conv(3, 64, 11, stride=4),
        nn.MaxPool2d(2),
        *conv(64, 192, 5),
        nn.MaxPool2d(2),
        *conv(192, 384, 3),
        *conv(384, 256, 3),
        *conv(256, 256, 3),
        nn.MaxPool2d(2),
    )
    model = nn.Sequential(OrderedDict(features=features) | _head(256, num_classes))
    _init_convolutions(model)
    return _pool_small_maps(model)


def _pool_small_maps(model: nn.Sequential) -> nn.Sequential:
    """Let 2x2 pooling keep a 1x1 map, so that images smaller than 32x32 work. Maps with even sides are unaffected."""
    for module in model.modules():
        if isinstance(module, nn.MaxPool2d):
            module.ceil_mode = True
    return model


def mobilenet_v2_cifar(num_classes: int, dropout: float = 0.2) -> MobileNetV2:
    """torchvision's MobileNetV2 (Sandler et al., arXiv 1801.04381) with stride 1 in the stem and the second stage: 2.2 M parameters.

    Args:
        num_classes: Number of classes.
        dropout: Dropout probability before the linear layer.
    """
    # Expansion, channels, blocks, stride: table 2 of the paper, except for the stride of the second row
    stages = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2], [6, 320, 1, 1]]
    model = MobileNetV2(num_classes, inverted_residual_setting=stages, dropout=dropout)
    model.features[0][0].stride = (1, 1)
    return model
