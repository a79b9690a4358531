from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from composer_effalgos.landscape import alphas, evaluate, line, on_the_line, reestimate_batch_norm
from composer_effalgos.utils.errors import InputError


def _data(samples: int, features: int, classes: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(samples, features, generator=generator)
    labels = torch.randint(classes, (samples,), generator=generator)
    return list(zip(inputs.split(batch), labels.split(batch), strict=True))


def test_places_on_the_line() -> None:
    places = alphas()
    assert len(places) == len(set(places)) == 25 + 8
    assert places == sorted(places)
    assert {-1.0, -0.0625, 0.0, 0.03125, 0.125, 1.0, 1.0625, 2.0} <= set(places)
    assert {-1.0, 0.0, 1.0, 2.0} <= set(alphas(6))
    with pytest.raises(InputError, match='points: '):
        alphas(1)


def test_the_curve_of_a_linear_classifier_is_the_closed_form() -> None:
    torch.manual_seed(0)
    train, test = _data(50, 5, 3, 16), _data(31, 5, 3, 10)
    a, b = (nn.Linear(5, 3).state_dict() for _ in range(2))
    places = alphas(7)
    found = list(line(nn.Linear(5, 3), a, b, train, test, places))
    assert [point.alpha for point in found] == places
    for point in found:
        weight, bias = ((1 - point.alpha) * a[key].numpy().astype(float) + point.alpha * b[key].numpy() for key in ('weight', 'bias'))
        for batches, loss, accuracy in (
            (train, point.train_loss, point.train_accuracy),
            (test, point.test_loss, point.test_accuracy),
        ):
            inputs, labels = (np.concatenate([part[index].numpy() for part in batches]) for index in (0, 1))
            logits = inputs @ weight.T + bias
            expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
            assert loss == pytest.approx(expected.mean(), rel=1e-5)
            assert accuracy == pytest.approx((logits.argmax(1) == labels).mean())


def test_the_ends_of_the_line_are_the_solutions_to_the_last_bit() -> None:
    torch.manual_seed(0)
    a, b = (nn.BatchNorm1d(4).state_dict() | {'weight': torch.randn(4)} for _ in range(2))
    a['num_batches_tracked'] += 3
    for alpha, solution in ((0.0, a), (1.0, b)):
        mixed = on_the_line(a, b, alpha)
        assert all(torch.equal(mixed[key], value) for key, value in solution.items() if value.is_floating_point())
        assert int(mixed['num_batches_tracked']) == 3
    assert torch.allclose(on_the_line(a, b, -0.5)['weight'], 1.5 * a['weight'] - 0.5 * b['weight'])


def test_batch_norms_are_reestimated_as_by_hand() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5), nn.Linear(5, 4)
    model = nn.Sequential(first, nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), second, nn.BatchNorm1d(4, momentum=0.3))
    nn.init.normal_(model[1].weight)
    batches = _data(48, 6, 4, 16)
    model(torch.randn(9, 6))  # statistics that must go
    reestimate_batch_norm(model, batches)
    assert not any(module.training for module in model.modules())
    assert [model[1].momentum, model[5].momentum] == [0.1, 0.3]

    means: list[list[Tensor]] = [[], []]
    variances: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for inputs, _ in batches:
            x = first(inputs)
            means[0].append(x.mean(0))
            variances[0].append(x.var(0))
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * model[1].weight + model[1].bias
            x = second(x.relu())  # no dropout
            means[1].append(x.mean(0))
            variances[1].append(x.var(0))
    for norm, mean, variance in zip((model[1], model[5]), means, variances, strict=True):
        torch.testing.assert_close(norm.running_mean, torch.stack(mean).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack(variance).mean(0))


def test_without_dropout_this_is_pytorchs_own_update() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.BatchNorm1d(4))
    batches = _data(40, 6, 4, 10)
    reestimate_batch_norm(model, batches)
    ours = {key: value.clone() for key, value in model.state_dict().items()}
    update_bn(batches, model)
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


def test_every_point_of_the_curve_has_its_own_statistics() -> None:
    torch.manual_seed(0)

    def network() -> nn.Sequential:
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))

    a, b = network().state_dict(), network().state_dict()
    train, test = _data(40, 6, 4, 10), _data(20, 6, 4, 10)
    for point in line(network(), a, b, train, test, [-0.5, 0.5, 1.5]):
        model = network()
        model.load_state_dict(on_the_line(a, b, point.alpha))
        update_bn(train, model)
        assert (point.train_loss, point.train_accuracy) == evaluate(model, train)
        assert (point.test_loss, point.test_accuracy) == evaluate(model, test)


@pytest.mark.parametrize(('scale', 'finite'), [(1e30, True), (3e38, False)])
def test_a_loss_that_explodes_stays_a_number_as_long_as_the_outputs_do(scale: float, finite: bool) -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]) * scale)
    loss, accuracy = evaluate(model, [(torch.tensor([[1.0, 0.0], [5.0, 5.0]]), torch.tensor([1, 0]))])
    assert math.isfinite(loss) == finite
    if finite:
        assert loss == pytest.approx(scale, rel=1e-5)  # the first is wrong by 2 scale, the second right
    assert accuracy == (0.5 if finite else 0.0)
