from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from composer.core import Time, Timestamp
from hypothesis import given, settings

from composer_effalgos.recipes.schedulers import OneCycleScheduler, one_cycle_lr
from composer_effalgos.utils.errors import InputError


def torch_curve(total_steps: int, **options) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, total_steps=total_steps, cycle_momentum=False, **options)
    curve = []
    for _ in range(total_steps):
        curve.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        if len(curve) < total_steps:
            schedule.step()
    return curve


@settings(max_examples=60, deadline=None)
@given(
    total_steps=st.integers(8, 60),
    max_lr=st.floats(1e-3, 10),
    pct_start=st.floats(0.2, 0.45),
    anneal_strategy=st.sampled_from(['cos', 'linear']),
    div_factor=st.floats(1, 100),
    final_div_factor=st.floats(1, 1e5),
    three_phase=st.booleans(),
)
def test_the_curve_is_torchs(total_steps, **options):
    ours = [one_cycle_lr(step, total_steps, **options) for step in range(total_steps)]
    assert ours == pytest.approx(torch_curve(total_steps, **options), rel=1e-9)


def test_after_the_cycle_the_rate_stays_at_its_last_value():
    assert one_cycle_lr(500, 100, 1.0, div_factor=10, final_div_factor=10) == pytest.approx(0.01)


def test_the_whole_cycle_may_be_the_climb():
    assert one_cycle_lr(9, 10, 2.0, pct_start=1.0) == pytest.approx(2.0)


@pytest.mark.parametrize('base_lr', [0.1, 3.0])
@pytest.mark.parametrize('t_max', ['1dur', '5ep', '40ba'])
def test_the_scheduler_gives_the_curve_whatever_the_optimizers_own_rate(base_lr, t_max):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base_lr)
    state = SimpleNamespace(optimizers=[optimizer], max_duration=Time.from_timestring('5ep'), dataloader_len=Time.from_timestring('8ba'))
    schedule = OneCycleScheduler(0.5, t_max=t_max)
    rates = []
    for batch in range(40):
        state.timestamp = Timestamp(batch=batch)
        rates.append(base_lr * schedule(state))
    assert rates == pytest.approx(torch_curve(40, max_lr=0.5), rel=1e-9)


@pytest.mark.parametrize(
    ('settings', 'named'),
    [
        ({'max_lr': 0.0}, 'max_lr'),
        ({'max_lr': 1.0, 'pct_start': 1.5}, 'pct_start'),
        ({'max_lr': 1.0, 'div_factor': -1.0}, 'div_factor'),
        ({'max_lr': 1.0, 'final_div_factor': 0.0}, 'final_div_factor'),
        ({'max_lr': 1.0, 'anneal_strategy': 'cosine'}, 'anneal_strategy'),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(InputError, match=f'^{named}: '):
        OneCycleScheduler(**settings)
