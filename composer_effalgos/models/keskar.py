"""The convolutional networks of Keskar et al., "On Large-Batch Training for Deep Learning", arXiv 1609.04836, appendix B.

As in the authors' code: same-padded convolutions, batch norm before each ReLU and dropout after it, batch norm and dropout in the dense
layers too, and Glorot uniform initialisation. The last feature map is flattened, so a network only takes images of one size.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError

# The default of Keras, which the authors used
_EPS = 1e-3
_MOST_PIXELS = 1024  # per side; the dense layers grow with its square


def keskar_c1(num_classes: int, conv_stride: int = 1, image_size: int = 32) -> nn.Sequential:
    """C1 (C3 with 100 classes), shallow: two 5x5 convolutions of 64 channels with 3x3 pooling, dense layers of 384 and 192.

    1,757,834 parameters for 10 classes. The paper writes a convolution as ``[64, 5, 5, 2]``, where the last number is the stride, but the
    authors' code uses stride 1 and pooling of stride 2. ``conv_stride=2`` follows the paper: 283,274 parameters and a ninth of the compute.

    Args:
        num_classes: Number of classes.
        conv_stride: Stride of both convolutions.
        image_size: Height and width of the images in pixels.

    Raises:
        InputError: The stride or size is out of range.
    """
    check_number('model.conv_stride', conv_stride, least=1, most=_MOST_PIXELS)
    check_number('model.image_size', image_size, least=1, most=_MOST_PIXELS)
    side = image_size
    for stride in (conv_stride, 2, conv_stride, 2):
        side = (side - 1) // stride + 1

    def stage(in_channels: int) -> list[nn.Module]:
        convolution = nn.Conv2d(in_channels, 64, 5, stride=conv_stride, padding=2)
        return [convolution, nn.BatchNorm2d(64, eps=_EPS), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)]

    features = nn.Sequential(*stage(3), *stage(64))
    hidden = [*_dense(64 * side * side, 384), nn.Dropout(0.5), *_dense(384, 192), nn.Dropout(0.5)]
    return _network(features, hidden, nn.Linear(192, num_classes), image_size)


def keskar_c2(num_classes: int, image_size: int = 32) -> nn.Sequential:
    """C2 (C4 with 100 classes), deep: the thirteen 3x3 convolutions of VGG-16 and a dense layer of 512.

    14,991,946 parameters for 10 classes at 32x32. Dropout is 0.3 or 0.4 between the convolutions of a stack and 0.5 around the dense layer.

    Args:
        num_classes: Number of classes.
        image_size: Height and width of the images in pixels.

    Raises:
        InputError: The size is out of range.
    """
    check_number('model.image_size', image_size, least=1, most=_MOST_PIXELS)
    layers: list[nn.Module] = []
    in_channels, side = 3, image_size
    for channels, depth, dropout in ((64, 2, 0.3), (128, 2, 0.4), (256, 3, 0.4), (512, 3, 0.4), (512, 3, 0.4)):
        for position in range(depth):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels, eps=_EPS), nn.ReLU(inplace=True)]
            if position < depth - 1:
                layers.append(nn.Dropout(dropout))
            in_channels = channels
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
        side = (side + 1) // 2
    hidden = [nn.Dropout(0.5), *_dense(512 * side * side, 512), nn.Dropout(0.5)]
    return _network(nn.Sequential(*layers), hidden, nn.Linear(512, num_classes), image_size)


def _dense(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs, eps=_EPS), nn.ReLU(inplace=True)]


class _FixedSizeNetwork(nn.Sequential):
    """A network that rejects images of any other size than its own."""

    def __init__(self, layers: OrderedDict[str, nn.Module], image_size: int) -> None:
        super().__init__(layers)
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            raise InputError(
                f'model.image_size: expected the size of the images, {height}x{width} pixels, got {self.image_size}x{self.image_size}'
            )
        return super().forward(images)


def _network(features: nn.Sequential, hidden: list[nn.Module], classifier: nn.Linear, image_size: int) -> nn.Sequential:
    layers = OrderedDict[str, nn.Module](features=features, flatten=nn.Flatten(), hidden=nn.Sequential(*hidden), classifier=classifier)
    model = _FixedSizeNetwork(layers, image_size)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return model
