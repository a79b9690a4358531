"""The 1cycle learning rate schedule, which Composer lacks."""

from __future__ import annotations

import itertools
import math
from typing import Any

from composer.core import State, Time
from composer.optim import ComposerScheduler
from composer.optim.scheduler import _convert_time

from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError


def one_cycle_lr(
    step: float,
    total_steps: float,
    max_lr: float,
    *,
    pct_start: float = 0.3,
    anneal_strategy: str = 'cos',
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    three_phase: bool = False,
) -> float:
    """Learning rate of the 1cycle policy at one step, as in ``torch.optim.lr_scheduler.OneCycleLR``.

    The learning rate rises from ``max_lr / div_factor`` to ``max_lr`` over the first fraction ``pct_start`` of the steps, then falls to
    ``max_lr / (div_factor * final_div_factor)`` at step ``total_steps - 1``, and stays there. Steps count from 0 and may be fractional. The
    other arguments are those of :class:`OneCycleScheduler`.

    Source: Smith and Topin, "Super-Convergence", arXiv 1708.07120.
    """
    first = max_lr / div_factor
    last = first / final_div_factor
    climb_end, end = pct_start * total_steps - 1, total_steps - 1
    if three_phase:
        knots = [(0.0, first), (climb_end, max_lr), (2 * pct_start * total_steps - 2, first), (end, last)]
    else:
        knots = [(0.0, first), (climb_end, max_lr), (end, last)]
    for (left, left_lr), (right, right_lr) in itertools.pairwise(knots):
        if step <= right:
            share = (step - left) / (right - left) if right > left else 1.0
            if anneal_strategy == 'cos':
                share = (1 - math.cos(math.pi * share)) / 2
            return left_lr + share * (right_lr - left_lr)
    return last


class OneCycleScheduler(ComposerScheduler):
    """The 1cycle learning rate as a stateless Composer scheduler; momentum is unchanged.

    Composer schedulers return a factor on the optimizer's own learning rate, so this one divides by that rate: the learning rate peaks at
    ``max_lr`` whatever the optimizer's ``lr`` is.

    Args:
        max_lr: Peak learning rate, above 0.
        pct_start: Fraction of the cycle spent increasing the learning rate, in [0, 1].
        anneal_strategy: ``'cos'`` or ``'linear'``.
        div_factor: Peak divided by the initial learning rate, above 0.
        final_div_factor: Initial divided by the final learning rate, above 0.
        three_phase: Decrease to the initial learning rate as fast as it rose, then to the final one.
        t_max: Length of the cycle, a Composer time string.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        max_lr: float,
        pct_start: float = 0.3,
        anneal_strategy: str = 'cos',
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        t_max: str | Time = '1dur',
    ) -> None:
        for name, value in (('max_lr', max_lr), ('div_factor', div_factor), ('final_div_factor', final_div_factor)):
            check_number(name, value, above=0)
        check_number('pct_start', pct_start, least=0, most=1)
        if anneal_strategy not in ('cos', 'linear'):
            raise InputError(f"anneal_strategy: expected 'cos' or 'linear', got {anneal_strategy!r}")
        self.max_lr = max_lr
        self.shape: dict[str, Any] = {
            'pct_start': pct_start,
            'anneal_strategy': anneal_strategy,
            'div_factor': div_factor,
            'final_div_factor': final_div_factor,
            'three_phase': three_phase,
        }
        self.t_max = t_max

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        t_max = _convert_time(self.t_max, state, ssr=ssr)
        step = state.timestamp.get(t_max.unit).value
        base_lr = state.optimizers[0].defaults['lr']
        return one_cycle_lr(step, t_max.value, self.max_lr, **self.shape) / base_lr
