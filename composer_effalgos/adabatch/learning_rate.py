"""Couples the learning rate to the batch size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from composer.core import State
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler

from composer_effalgos.utils.errors import InputError

LR_RULES = ('none', 'sqrt', 'linear', 'auto')
_ADAPTIVE = ('rmsprop', 'adagrad', 'adadelta', 'adafactor')  # no betas, but like Adam they normalise by the gradient's magnitude


def lr_exponent(rule: str, state: State) -> float:
    """The exponent with which the learning rate scales with the batch size.

    Args:
        rule: One of :data:`LR_RULES`.
        state: The trainer's state, for ``'auto'``.

    Returns:
        0, 0.5 or 1. Source: linear for SGD, Goyal et al., arXiv 1706.02677; square root for adaptive optimizers, Malladi et al., arXiv
        2205.10287.

    Raises:
        InputError: For ``'auto'`` with another kind of optimizer.
    """
    if rule != 'auto':
        return {'none': 0.0, 'sqrt': 0.5, 'linear': 1.0}[rule]
    optimizer = state.optimizers[0]
    name = type(optimizer).__name__
    if 'betas' in optimizer.param_groups[0] or any(part in name.lower() for part in _ADAPTIVE):
        return 0.5
    if isinstance(optimizer, torch.optim.SGD):
        return 1.0
    raise InputError(f"lr: expected 'sqrt', 'linear' or 'none' with the optimizer {name}, which 'auto' does not know, got 'auto'")


def note_originals(state: State, *, beta2: bool) -> None:
    """Stores the original values with the schedules and the parameter groups, so that checkpoints contain them.

    Sharded checkpoints are loaded into existing entries: an entry that is only created at the first growth would not be read.

    Args:
        state: The trainer's state at ``BEFORE_LOAD``.
        beta2: Whether the optimizer's ``beta2`` is scaled too.
    """
    for group in _groups(state):  # schedulers of a later fit start from the original rate, not from a scaled one
        group.setdefault('initial_lr', group['lr'])
    for scheduler in state.schedulers:
        scheduler.adabatch_lr_scale = getattr(scheduler, 'adabatch_lr_scale', 1.0)  # type: ignore[attr-defined]
    if beta2:
        rescale_beta2(state, 1.0)


def scale_learning_rate(state: State, factor: float) -> None:
    """Multiplies the current learning rates, but not the base rates of schedules."""
    for group in _groups(state):
        group['lr'] = group['lr'] * factor


def rescale_beta2(state: State, ratio: float) -> None:
    """Keeps the half-life of Adam's second moment in samples: ``beta2 ** ratio`` (Marek et al., arXiv 2507.07101).

    The original ``beta2`` is stored in the optimizer's parameter groups, and so in checkpoints.

    Args:
        state: The trainer's state.
        ratio: Ratio of the batch size to the one that the optimizer's ``beta2`` is meant for.

    Raises:
        InputError: For an optimizer without ``beta2``.
    """
    for group in _groups(state):
        if len(group.get('betas', ())) != 2:
            raise InputError(f"beta2: expected 'keep' with {type(state.optimizers[0]).__name__}, which has no beta2, got 'rescale'")
        beta1, beta2 = group['betas']
        group['betas'] = (beta1, group.setdefault('initial_beta2', beta2) ** ratio)


def rescale_schedules(state: State, scale: float) -> None:
    """Makes every schedule set ``scale`` times its original learning rates.

    The scale is stored in the schedule and its checkpoint, so a restored schedule is not scaled twice.

    Args:
        state: The trainer's state.
        scale: The factor.
    """
    for scheduler in state.schedulers:
        factor = scale / getattr(scheduler, 'adabatch_lr_scale', 1.0)
        if factor == 1:
            continue
        _scale_base(scheduler, factor)
        scheduler.adabatch_lr_scale = scale  # type: ignore[attr-defined]
        for group in scheduler.optimizer.param_groups:
            if 'max_lr' in group and 'min_lr' in group:  # OneCycleLR keeps its base here
                for key in ('initial_lr', 'max_lr', 'min_lr'):
                    group[key] = group[key] * factor


def scale_new_schedules(state: State, scale: float) -> None:
    """Scales schedulers that a later ``fit`` was given, and the learning rates that they have set.

    A scheduler sets its first rate when it is created, either from the original rate (``LambdaLR``, ``OneCycleLR``) or from the current one
    (``LinearLR``, ``StepLR``), which contains the scale already.

    Args:
        state: The trainer's state at the start of the fit.
        scale: The factor of the learning rate so far.
    """
    new = [scheduler for scheduler in state.schedulers if getattr(scheduler, 'adabatch_lr_scale', 1.0) != scale]
    if not all(map(_follows_current_rate, new)):
        scale_learning_rate(state, scale)
    rescale_schedules(state, scale)


def _follows_current_rate(scheduler: Any) -> bool:
    """Whether the first rate of a new scheduler is a multiple of the optimizer's current one."""
    if isinstance(scheduler, ChainedScheduler):
        return all(map(_follows_current_rate, scheduler._schedulers))
    groups = scheduler.optimizer.param_groups
    before = [dict(group) for group in groups]
    rates = []
    try:
        scheduler._get_lr_called_within_step = True  # get_lr() warns otherwise
        for factor in (1, 2):
            for group, kept in zip(groups, before, strict=True):
                group['lr'] = factor * kept['lr']
            rates.append([float(rate) for rate in scheduler.get_lr()])
    except (AttributeError, NotImplementedError):  # SequentialLR starts from the original rate
        return False
    finally:
        scheduler._get_lr_called_within_step = False
        for group, kept in zip(groups, before, strict=True):
            group.update(kept)
    return all(math.isclose(twice, 2 * once) for once, twice in zip(*rates, strict=True))


def _scale_base(scheduler: LRScheduler, factor: float) -> None:
    for name in ('base_lrs', 'max_lrs'):  # CyclicLR has max_lrs
        if hasattr(scheduler, name):
            setattr(scheduler, name, [lr * factor for lr in getattr(scheduler, name)])
    if hasattr(scheduler, 'eta_min'):  # cosine schedules
        scheduler.eta_min = scheduler.eta_min * factor
    for part in getattr(scheduler, '_schedulers', []):  # SequentialLR, ChainedScheduler
        _scale_base(part, factor)


def _groups(state: State) -> Iterator[dict[str, Any]]:
    return (group for optimizer in state.optimizers for group in optimizer.param_groups)
