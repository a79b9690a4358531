from __future__ import annotations

import urllib.error
from typing import Any

import pytest
import timm
import torch
import torchvision
from torchvision.models._api import WeightsEnum

from composer_effalgos.models import build_model
from composer_effalgos.utils.errors import InputError


@pytest.mark.parametrize(
    ('name', 'module'),
    [
        ('resnet18', 'torchvision.models.resnet'),  # timm has it too
        ('torchvision/resnet18', 'torchvision.models.resnet'),
        ('timm/resnet18', 'timm.models.resnet'),
        ('shufflenet_v2_x0_5', 'torchvision.models.shufflenetv2'),
        ('resnet10t', 'timm.models.resnet'),
        ('resnet10t.c3_in1k', 'timm.models.resnet'),
        ('timm/resnet10t.c3_in1k', 'timm.models.resnet'),
    ],
)
def test_names_are_looked_up_in_torchvision_then_timm(name: str, module: str) -> None:
    model = build_model(name, 6).eval()
    assert type(model).__module__ == module
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64)).shape == (1, 6)


@pytest.mark.parametrize('name', ['googlenet', 'inception_v3'])
def test_auxiliary_heads_are_left_out(name: str) -> None:
    model = build_model(name, 4).train()
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 96, 96))
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == (2, 4)


def test_options_reach_the_constructor() -> None:
    assert build_model('mobilenet_v2_cifar', 10, dropout=0.35).classifier[0].p == 0.35
    assert build_model('mobilenet_v2', 10, dropout=0.35).classifier[0].p == 0.35
    assert build_model('timm/resnet10t', 10, drop_rate=0.35).drop_rate == 0.35


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'name': 'resnet18_cifra'}, r"model\.name: .*'resnet18_cifra'.*did you mean 'resnet18_cifar'"),
        ({'name': 'torchvision/rsnet50'}, r"did you mean 'resnet50'"),
        ({'name': 'timm/rsnet50'}, r"did you mean 'resnet50'"),
        ({'name': 'timm/resnet18_cifar'}, r"model\.name: expected a model .*'resnet18_cifar'"),
        ({'name': 'qqqqqq'}, r'known: resnet18_cifar, .*timm\.list_models'),
        ({'name': ''}, r'model\.name'),
        ({'name': 'resnet18/'}, r'model\.name'),
        ({'name': 'fasterrcnn_resnet50_fpn'}, r'model\.name'),  # torchvision's, but no classifier
        ({'name': 'resnet18_cifar', 'zero_init': True}, r"model\.zero_init: .*'zero_init_residual'"),
        ({'name': 'mobilenet_v2_cifar', 'dropout': 'much'}, r'model\.dropout: expected a number'),
        ({'name': 'resnet18', 'zero_init': True}, r"resnet18 refuses .*'zero_init'; did you mean 'zero_init_residual'"),
        ({'name': 'timm/resnet18', 'drop_rat': 0.1}, r"timm/resnet18 refuses .*'drop_rat'; did you mean 'drop_rate'"),
        ({'name': 'vit_b_16', 'image_size': 30}, r'vit_b_16 refuses'),
        ({'name': 'resnet18_cifar', 'num_classes': 10**11}, r'model\.num_classes: expected .*, got 100000000000$'),
        ({'name': 'resnet18_cifar', 'num_classes': 0}, r'model\.num_classes: expected a number in \[1, 1048576\]'),
        ({'name': 'resnet18_cifar', 'pretrained': True}, r'model\.pretrained: expected false, .*; resnet18_cifar has no published weights'),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_model(**{'num_classes': 10} | arguments)
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ('name', 'num_classes'), [('squeezenet1_1', 5), ('mobilenet_v3_small', 5), ('resnet18', 1000), ('inception_v3', 5), ('googlenet', 5)]
)
def test_torchvisions_weights_are_loaded_but_for_a_head_of_another_size(
    name: str, num_classes: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # The published files hold the auxiliary heads as well
    auxiliary = {'aux_logits': True, 'init_weights': False} if name in ('inception_v3', 'googlenet') else {}
    published = torchvision.models.get_model(name, **auxiliary).state_dict()
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda *_, **__: published)
    model = build_model(name, num_classes, pretrained=True)
    own = model.state_dict()
    other = {key for key in own if own[key].shape != published[key].shape or not torch.equal(own[key], published[key])}
    head = {'squeezenet1_1': 'classifier.1', 'mobilenet_v3_small': 'classifier.3'}.get(name, 'fc')
    assert other == (set() if num_classes == 1000 else {f'{head}.weight', f'{head}.bias'})
    assert own[f'{head}.weight'].shape[0] == num_classes
    assert ('keeps its random initialisation' in caplog.text) == (num_classes != 1000)
    if auxiliary:
        assert model.transform_input


def test_timms_weights_are_loaded_but_for_a_head_of_another_size(tmp_path: Any) -> None:
    published = timm.create_model('resnet10t')
    torch.save(published.state_dict(), tmp_path / 'weights.pth')
    model = build_model('timm/resnet10t', 5, pretrained=True, pretrained_cfg_overlay={'file': str(tmp_path / 'weights.pth')})
    assert torch.equal(model.layer4[0].conv1.weight, published.layer4[0].conv1.weight)
    assert model.fc.weight.shape[0] == 5


def test_a_download_that_fails_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError('no network')

    monkeypatch.setattr(WeightsEnum, 'get_state_dict', refuse)
    with pytest.raises(InputError, match=r'model\.pretrained: the weights of resnet18 cannot be loaded .*no network'):
        build_model('resnet18', 10, pretrained=True)
    with pytest.raises(InputError, match=r'model\.pretrained: ResNet18_Weights\.IMAGENET1K_V1 cannot be loaded .*no network'):
        build_model('resnet18', 10, pretrained='ResNet18_Weights.IMAGENET1K_V1')


def test_a_network_of_ours_takes_torchvisions_weights_by_name(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    published = torchvision.models.mobilenet_v2().state_dict()
    asked = []
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda weights, **_: asked.append(str(weights)) or published)
    own = build_model('mobilenet_v2_cifar', 10, pretrained='MobileNet_V2_Weights.IMAGENET1K_V1').state_dict()
    assert asked == ['MobileNet_V2_Weights.IMAGENET1K_V1']
    other = {key for key in own if own[key].shape != published[key].shape or not torch.equal(own[key], published[key])}
    assert own.keys() == published.keys()
    assert other == {'classifier.1.weight', 'classifier.1.bias'}
    assert 'classifier.1 keeps its random initialisation' in caplog.text


@pytest.mark.parametrize(
    ('name', 'weights', 'message'),
    [
        (
            'mobilenet_v2_cifar',
            'MobileNet_V2_Weights.IMAGENET1K_V7',
            r"expected weights of torchvision, .*did you mean 'MobileNet_V2_Weights\.IMAGENET1K_V[12]'",
        ),
        ('mobilenet_v2_cifar', 'X_Weights.Y', r'expected weights of torchvision, .*as in torchvision\.models'),
        ('resnet20_cifar', 'MobileNet_V2_Weights.IMAGENET1K_V1', r'of another model \(missing: '),
    ],
)
def test_torchvisions_weights_that_do_not_exist_or_fit(name: str, weights: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightsEnum, 'get_state_dict', lambda *_, **__: torchvision.models.mobilenet_v2().state_dict())
    with pytest.raises(InputError, match=message) as caught:
        build_model(name, 10, pretrained=weights)
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 400
