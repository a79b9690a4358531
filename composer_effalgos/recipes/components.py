"""The algorithms, callbacks, loggers, optimizers and schedulers that a recipe can name.

For ``blurpool: {min_channels: 32}`` in a recipe, this module finds the class of that name.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import timm.optim
import torch
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination

from composer_effalgos.recipes.faults import explain, is_ours
from composer_effalgos.recipes.schedulers import OneCycleScheduler
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean, one_line, plain


@dataclass(frozen=True)
class Component:
    """A class or function named in a recipe, with its checked arguments.

    Attributes:
        key: The recipe key, e.g. ``recipe.yaml: algorithms.infobatch``; starts every error message.
        target: The class or function to call.
        kwargs: Its keyword arguments.
    """

    key: str
    target: Callable[..., Any]
    kwargs: dict[str, Any]

    def build(self, *args: Any, **given: Any) -> Any:
        """Call the target, with further arguments that a recipe cannot express, e.g. an optimizer's parameters.

        Raises an ``InputError`` if the target rejects its arguments or needs a package that is not installed.
        """
        try:
            return self.target(*args, **given, **self.kwargs)
        except (InputError, ImportError) as error:
            raise InputError(f'{self.key}: {one_line(error)}') from error
        except Exception as error:
            raised_here = error.__traceback__ is not None and error.__traceback__.tb_next is None  # arguments do not match the signature
            if explain(error) is not None or (is_ours(error) and not raised_here):
                raise
            raise self.refused(error) from error

    def refused(self, error: Exception) -> InputError:
        """Turn an exception from another package into an ``InputError`` that names the component."""
        kind = '' if isinstance(error, (ValueError, TypeError, RuntimeError)) else f'{type(error).__name__}: '
        return InputError(f'{self.key}: {kind}{one_line(error)[:300]}')


def _snake(name: str) -> str:
    return re.sub('(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', name).lower()


def find(key: str, kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """Look up a name, ignoring case and underscores; a full class name (``tensorboard_logger``) also works.

    ``key`` starts the error message about an unknown name, and ``kind``, e.g. ``'algorithm'``, says what it should name.
    """
    by_class_name = {plain(getattr(target, '__name__', '')): target for target in known.values()}
    by_name = {plain(known_name): target for known_name, target in known.items()}
    target = (by_class_name | by_name).get(plain(name))
    if target is not None:
        return target
    raise InputError(f'{key}: unknown {kind}; {did_you_mean(name, known)}')


def _members(module: types.ModuleType, base: type, suffix: str = '') -> dict[str, type]:
    """Public subclasses of ``base`` in a Composer package, by the name of their file (``blurpool``, ``lr_monitor``)."""
    classes = [getattr(module, name) for name in module.__all__]
    return {
        item.__module__.rsplit('.', 1)[-1].removesuffix(suffix): item for item in classes if issubclass(item, base) and item is not base
    }


@functools.cache
def algorithms() -> dict[str, type]:
    """Our algorithms and Composer's, by snake_case name."""
    from composer_effalgos import ESLM, AdaBatch, InfoBatch, LinUpper, Pruning, SubsetSelection

    ours = {'infobatch': InfoBatch, 'pruning': Pruning, 'adabatch': AdaBatch, 'subset_selection': SubsetSelection}
    ours |= {'lin_upper': LinUpper, 'eslm': ESLM}
    return _members(composer.algorithms, Algorithm) | ours


@functools.cache
def callbacks() -> dict[str, type]:
    """Composer's callbacks, by snake_case name. The efficiency monitor is part of every run and not listed."""
    return _members(composer.callbacks, Callback)


@functools.cache
def loggers() -> dict[str, type]:
    """Composer's loggers, by snake_case name without ``_logger``."""
    return _members(composer.loggers, LoggerDestination, suffix='_logger')


@functools.cache
def schedulers() -> dict[str, type]:
    """Composer's schedulers and ``one_cycle``, by snake_case name without ``_scheduler``."""
    names = [name for name in composer.optim.__all__ if name.endswith('Scheduler') and name != 'ComposerScheduler']
    found = {_snake(name.removesuffix('Scheduler')): getattr(composer.optim, name) for name in names}
    return found | {'one_cycle': OneCycleScheduler}


@functools.cache
def optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """timm's optimizers, Composer's decoupled ones and torch's; later ones in this list take precedence."""
    # The excluded ones need bitsandbytes or apex
    names = [str(name) for name in timm.optim.list_optimizers(exclude_filters=['bnb*', 'fused*'])]
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {name: timm.optim.get_optimizer_class(name) for name in names}
    found |= {'decoupled_sgdw': composer.optim.DecoupledSGDW, 'decoupled_adamw': composer.optim.DecoupledAdamW}
    found |= {
        name.lower(): item
        for name, item in vars(torch.optim).items()
        if inspect.isclass(item) and issubclass(item, torch.optim.Optimizer) and item is not torch.optim.Optimizer
    }
    return found
