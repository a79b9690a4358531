"""The registry of image models by name."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torchvision
from torch import Tensor, nn

from composer_effalgos.models import cifar, keskar
from composer_effalgos.models.pretrained import load_weights, read_weights
from composer_effalgos.recipes.arguments import check_arguments
from composer_effalgos.utils.checks import MOST_CLASSES, check_number
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean, one_line

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    'resnet18_cifar': cifar.resnet18_cifar,
    'resnet20_cifar': cifar.resnet20_cifar,
    'resnet50_cifar': cifar.resnet50_cifar,
    'resnet56_cifar': cifar.resnet56_cifar,
    'vgg11_bn_cifar': cifar.vgg11_bn_cifar,
    'vgg19_bn_cifar': cifar.vgg19_bn_cifar,
    'alexnet_cifar': cifar.alexnet_cifar,
    'mobilenet_v2_cifar': cifar.mobilenet_v2_cifar,
    'keskar_c1': keskar.keskar_c1,
    'keskar_c2': keskar.keskar_c2,
}


def build_model(name: str, num_classes: int, *, pretrained: bool | str = False, **options: Any) -> nn.Module:
    """Build a network that maps float ``[B, 3, H, W]`` to logits ``[B, num_classes]``.

    Args:
        name: A name in :data:`MODELS`, torchvision's classification models or timm, looked up in this order; ``torchvision/NAME`` and
            ``timm/NAME`` choose the library.
        num_classes: Number of classes.
        pretrained: True for the library's own weights (downloaded or from its cache); the name of torchvision weights, e.g.
            ``MobileNet_V2_Weights.IMAGENET1K_V1``, which also works for a model in :data:`MODELS` with the same layers; or the path of a
            local weights file (see :func:`~composer_effalgos.models.pretrained.read_weights`). If the weights have another number of
            classes, the head is initialised at random and a warning is logged.
        **options: Arguments of the network's constructor.

    Raises:
        InputError: A name or option is unknown, or the weights are unavailable or do not match.
    """
    check_number('model.num_classes', num_classes, least=1, most=MOST_CLASSES)
    library, plain_name = _find(name)
    if library == 'cifar' and pretrained is True:
        raise InputError(
            "model.pretrained: expected false, the name of torchvision's weights for the same layers, or the path of a file of weights, "
            f'got true; {name} has no published weights'
        )
    by_name = isinstance(pretrained, str) and re.fullmatch(r'\w+_Weights\.[A-Z]\w*', pretrained) is not None
    try:
        model = _BUILDERS[library](plain_name, num_classes, pretrained is True, options)
        if by_name:
            load_weights(model, _published(str(pretrained)), str(pretrained))
    except InputError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f'model: {name} refuses its options: {_explain(error, library, plain_name)}') from error
    except (OSError, RuntimeError) as error:
        if not (pretrained is True or by_name):
            raise
        weights = pretrained if by_name else f'the weights of {name}'
        raise InputError(
            f'model.pretrained: {weights} cannot be loaded ({one_line(error)}); expected a download or the path of a local file'
        ) from error
    if isinstance(pretrained, str) and not by_name:
        load_weights(model, read_weights(pretrained), pretrained)
    return model


def _published(name: str) -> Mapping[str, Tensor]:
    """torchvision weights by name, downloaded or from the cache."""
    models = torchvision.models
    enums = [models.get_model_weights(model) for model in models.list_models(module=models)]
    known = {str(weights): weights for enum in enums for weights in enum}
    if name not in known:
        named = 'they are called as in torchvision.models, e.g. ResNet18_Weights.IMAGENET1K_V1'
        raise InputError(f'model.pretrained: expected weights of torchvision, got {name!r}; {did_you_mean(name, known, otherwise=named)}')
    return known[name].get_state_dict(check_hash=True)


def _find(name: str) -> tuple[str, str]:
    """The library that has a model, and the model's name in it."""
    known = {'cifar': list(MODELS), 'torchvision': torchvision.models.list_models(module=torchvision.models), 'timm': timm.list_models()}
    prefix, _, rest = name.partition('/')
    if rest and prefix in ('torchvision', 'timm'):
        known, name = {prefix: known[prefix]}, rest
    for library, names in known.items():
        # timm names may carry a weights tag, which list_models() omits: resnet18.a1_in1k
        if name in names or (library == 'timm' and timm.is_model(name)):
            return library, name
    every = [item for names in known.values() for item in names]
    listed = f'known: {", ".join(MODELS)}, and what torchvision.models.list_models() and timm.list_models() list'
    raise InputError(
        f'model.name: expected a model of this package, torchvision or timm, got {name!r}; {did_you_mean(name, every, otherwise=listed)}'
    )


def _from_cifar(name: str, num_classes: int, download: bool, options: dict[str, Any]) -> nn.Module:
    return MODELS[name](num_classes, **check_arguments('model', MODELS[name], options, given=('num_classes',)))


def _from_torchvision(name: str, num_classes: int, download: bool, options: dict[str, Any]) -> nn.Module:
    if name in ('googlenet', 'inception_v3'):
        # Auxiliary heads would make the output a tuple; the published weights expect inputs scaled by transform_input
        options = {'aux_logits': False, 'init_weights': not download, 'transform_input': download} | options
    model = torchvision.models.get_model(name, num_classes=num_classes, **options)
    if download:
        weights = torchvision.models.get_model(name, weights='DEFAULT').state_dict()
        load_weights(model, {key: value for key, value in weights.items() if not key.startswith('AuxLogits.')}, 'torchvision')
    return model


def _from_timm(name: str, num_classes: int, download: bool, options: dict[str, Any]) -> nn.Module:
    return timm.create_model(name, pretrained=download, num_classes=num_classes, **options)


_BUILDERS: Mapping[str, Callable[[str, int, bool, dict[str, Any]], nn.Module]] = {
    'cifar': _from_cifar,
    'torchvision': _from_torchvision,
    'timm': _from_timm,
}


def _explain(error: BaseException, library: str, name: str) -> str:
    """Why a torchvision or timm constructor failed; for an unknown option, suggests the closest known one."""
    text = one_line(error)
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unexpected is None:
        return text
    function = torchvision.models.get_model_builder(name) if library == 'torchvision' else timm.model_entrypoint(name)
    network = typing.get_type_hints(function).get('return')
    hint = f'; {did_you_mean(unexpected[1], inspect.signature(network).parameters)}' if inspect.isclass(network) else ''
    return f'unknown option {unexpected[1]!r}{hint}'
