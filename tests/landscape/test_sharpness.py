from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from composer_effalgos.landscape import box_maximum, random_basis, sharpness, training_loss
from composer_effalgos.utils.errors import InputError


def _bowl(curvature: Tensor, minimum: Tensor, floor: float = 0.3) -> Callable[[Tensor], tuple[float, Tensor]]:
    def f(x: Tensor) -> tuple[float, Tensor]:
        return floor + float((curvature * (x - minimum) ** 2).sum()) / 2, curvature * (x - minimum)

    return f


@pytest.mark.parametrize('epsilon', [1e-3, 5e-4, 0.5])
@pytest.mark.parametrize('steepness', [1e-6, 1.0, 1e4])
def test_a_bowl_has_its_maximum_in_the_corners_of_the_box(epsilon: float, steepness: float) -> None:
    generator = torch.Generator().manual_seed(0)
    curvature = steepness * (0.1 + torch.rand(40, generator=generator, dtype=torch.float64))
    x = 3 * torch.randn(40, generator=generator, dtype=torch.float64)
    half_widths = epsilon * (x.abs() + 1)
    # at the minimum itself
    expected = 100 * float((curvature * half_widths**2).sum() / 2) / 1.3
    assert sharpness(_bowl(curvature, x), x, epsilon) == pytest.approx(expected, rel=1e-9)
    # and on a slope, where one corner is the highest
    minimum = x + half_widths * (torch.rand(40, generator=generator, dtype=torch.float64) + 0.1)
    f = _bowl(curvature, minimum)
    highest = 0.3 + float((curvature * ((x - minimum).abs() + half_widths) ** 2).sum() / 2)
    assert sharpness(f, x, epsilon) == pytest.approx(100 * (highest - f(x)[0]) / (1 + f(x)[0]), rel=1e-6)


def test_the_box_of_a_subspace() -> None:
    """Along the columns of A = 3 I, whose pseudo-inverse takes a third of each coordinate."""
    curvature = torch.tensor([1.0, 2.0, 5.0, 7.0], dtype=torch.float64)
    x = torch.tensor([0.0, -6.0, 100.0, 100.0], dtype=torch.float64)
    basis = 3 * torch.eye(4, dtype=torch.float64)[:, :2]
    half_widths = [0.01 * 1, 0.01 * (2 + 1)]
    highest = (1.0 * (3 * half_widths[0]) ** 2 + 2.0 * (3 * half_widths[1]) ** 2) / 2
    assert sharpness(_bowl(curvature, x), x, 0.01, basis=basis) == pytest.approx(100 * highest / 1.3, rel=1e-9)


def test_a_basis_that_spans_everything_and_the_pseudo_inverse() -> None:
    generator = torch.Generator().manual_seed(1)
    basis = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(5, generator=generator, dtype=torch.float64)
    slope = torch.randn(5, generator=generator, dtype=torch.float64)
    # of a linear function the maximum is exact: every coordinate at the wall that its slope points to
    half_widths = 0.1 * ((torch.linalg.pinv(basis) @ x).abs() + 1)
    rise = float(((basis.T @ slope).abs() * half_widths).sum())
    found = sharpness(lambda w: (float(slope @ (w - x)), slope), x, 0.1, basis=basis)
    assert found == pytest.approx(100 * rise, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_between_nothing_and_the_highest_corner(p: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(p, p))
    hessian, slope, half_widths = root @ root.T, rng.normal(size=p), rng.uniform(0.1, 2, size=p)

    def f(y: np.ndarray) -> tuple[float, np.ndarray]:
        return float(slope @ y + y @ hessian @ y / 2), slope + hessian @ y

    corners = [np.array(signs) * half_widths for signs in itertools.product((-1, 1), repeat=p)]
    origin, highest = box_maximum(f, half_widths, seed=seed)
    assert origin == 0
    assert 0 <= highest <= max(f(corner)[0] for corner in corners) * (1 + 1e-12)
    # a local maximum of a convex function in a box is a corner
    assert min(abs(f(corner)[0] - highest) for corner in corners) <= 1e-6 * (1 + abs(highest))
    assert box_maximum(f, half_widths, seed=seed) == (origin, highest)


def test_flat_and_broken_functions() -> None:
    x = torch.ones(3)
    assert sharpness(lambda w: (2.0, torch.zeros(3)), x, 1e-3) == 0
    broken = sharpness(lambda w: (2.0 if torch.equal(w, x) else math.nan, torch.ones(3)), x, 1e-3)
    assert broken == math.inf
    for epsilon in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match='epsilon'):
            sharpness(lambda w: (0.0, w), x, epsilon)
    with pytest.raises(InputError, match='subspace'):
        random_basis(3, 4, 0)


def test_random_bases_are_normal_and_reproducible() -> None:
    basis = random_basis(2000, 10, 5)
    assert torch.equal(basis, random_basis(2000, 10, 5))
    assert not torch.equal(basis, random_basis(2000, 10, 6))
    assert float(basis.mean()) == pytest.approx(0, abs=0.03)
    assert float(basis.std()) == pytest.approx(1, abs=0.03)


def test_the_training_loss_is_that_of_batch_statistics_without_dropout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)
    inputs, labels = torch.randn(24, 6), torch.randint(3, (24,))
    batches = list(zip(inputs.tensor_split(3), labels.tensor_split(3), strict=True))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.cat([parameter.detach().flatten() for parameter in trainable]) + 0.1
    value, gradient = training_loss(model, batches)(weights)

    plain = nn.Sequential(*(module for module in model if not isinstance(module, nn.Dropout))).train()
    loss = torch.stack([nn.functional.cross_entropy(plain(x), y) for x, y in batches]).mean()  # batches of one size
    expected = torch.autograd.grad(loss, trainable)
    assert value == pytest.approx(float(loss), rel=1e-6)
    torch.testing.assert_close(gradient, torch.cat([part.flatten() for part in expected]))
    again, same = training_loss(model, batches)(weights)
    assert again == value
    assert torch.equal(same, gradient)
