"""Everything a recipe can name: algorithms, callbacks, loggers, optimizers and schedules, with their arguments checked before use.

A recipe says ``blurpool: {min_channels: 32}``; this module finds the class behind the name, holds the arguments against the
constructor's signature, and says in one line what is wrong and what is probably meant.
"""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import timm.optim
import torch
from composer.core import Algorithm, Callback, Time
from composer.loggers import LoggerDestination

from composer_effalgos.errors import InputError, one_line
from composer_effalgos.faults import explain, is_ours
from composer_effalgos.schedulers import OneCycleScheduler

__all__ = [
    'Component',
    'algorithms',
    'callbacks',
    'check_arguments',
    'check_type',
    'did_you_mean',
    'find',
    'loggers',
    'optimizers',
    'parameters',
    'schedulers',
    'takes_time',
]


@dataclass(frozen=True)
class Component:
    """A class or function that a recipe names, with its checked arguments.

    Attributes:
        key: Where the recipe says so, e.g. ``recipe.yaml: algorithms.infobatch``; begins every error message.
        target: The class or function to call.
        kwargs: Its keyword arguments.
    """

    key: str
    target: Callable[..., Any]
    kwargs: dict[str, Any]

    def build(self, *args: Any, **given: Any) -> Any:
        """Call the target.

        Args:
            *args: What the recipe cannot say, e.g. an optimizer's parameters.
            **given: The same, by name.

        Raises:
            InputError: The target refused its arguments or needs a package that is not installed.
        """
        try:
            return self.target(*args, **given, **self.kwargs)
        except (InputError, ImportError) as error:
            raise InputError(f'{self.key}: {one_line(error)}') from error
        except Exception as error:
            raised_here = error.__traceback__ is not None and error.__traceback__.tb_next is None  # the arguments fit no signature
            if explain(error) is not None or (is_ours(error) and not raised_here):
                raise
            raise self.refused(error) from error

    def refused(self, error: Exception) -> InputError:
        """What another package's code raised, as bad input that names the component."""
        kind = '' if isinstance(error, (ValueError, TypeError, RuntimeError)) else f'{type(error).__name__}: '
        return InputError(f'{self.key}: {kind}{one_line(error)[:300]}')


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an "unknown name" message: the nearest known name, or all of them when none is near.

    Args:
        name: What was written.
        known: The right names.

    Returns:
        ``"did you mean 'x'?"`` or ``'known: x, y, z'``.
    """
    known = sorted(known)
    by_plain_name = {_plain(item): item for item in known}
    near = difflib.get_close_matches(_plain(str(name)), by_plain_name, n=1, cutoff=0.6)
    return f"did you mean '{by_plain_name[near[0]]}'?" if near else f'known: {", ".join(known) or "none"}'


def _plain(name: str) -> str:
    return re.sub('[^a-z0-9]', '', name.lower())


def _snake(name: str) -> str:
    return re.sub('(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', name).lower()


def find(key: str, kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """Look a name up, whatever its case and underscores; a class name in full (``tensorboard_logger``) will do as well.

    Args:
        key: Where the recipe says so; begins the error message.
        kind: What the name should be, e.g. ``'algorithm'``.
        name: What was written.
        known: Names and what they stand for.

    Raises:
        InputError: No such name; the message gives the nearest.
    """
    by_class_name = {_plain(getattr(target, '__name__', '')): target for target in known.values()}
    by_name = {_plain(known_name): target for known_name, target in known.items()}
    target = (by_class_name | by_name).get(_plain(name))
    if target is not None:
        return target
    raise InputError(f'{key}: unknown {kind}; {did_you_mean(name, known)}')


def _members(module: types.ModuleType, base: type, suffix: str = '') -> dict[str, type]:
    """Public subclasses of ``base`` in a Composer package, under the names of their files (``blurpool``, ``lr_monitor``)."""
    classes = [getattr(module, name) for name in module.__all__]
    return {
        item.__module__.rsplit('.', 1)[-1].removesuffix(suffix): item for item in classes if issubclass(item, base) and item is not base
    }


@functools.cache
def algorithms() -> dict[str, type]:
    """Our algorithms and Composer's, by snake_case name."""
    from composer_effalgos import AdaBatch, InfoBatch, Pruning, SubsetSelection

    ours = {'infobatch': InfoBatch, 'pruning': Pruning, 'adabatch': AdaBatch, 'subset_selection': SubsetSelection}
    return _members(composer.algorithms, Algorithm) | ours


@functools.cache
def callbacks() -> dict[str, type]:
    """Composer's callbacks, by snake_case name; the efficiency monitor is part of every run and has no name here."""
    return _members(composer.callbacks, Callback)


@functools.cache
def loggers() -> dict[str, type]:
    """Composer's loggers, by snake_case name without ``_logger``."""
    return _members(composer.loggers, LoggerDestination, suffix='_logger')


@functools.cache
def schedulers() -> dict[str, type]:
    """Composer's schedules and ``one_cycle``, by snake_case name without ``_scheduler``."""
    names = [name for name in composer.optim.__all__ if name.endswith('Scheduler') and name != 'ComposerScheduler']
    found = {_snake(name.removesuffix('Scheduler')): getattr(composer.optim, name) for name in names}
    return found | {'one_cycle': OneCycleScheduler}


@functools.cache
def optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """timm's optimizers, Composer's decoupled ones and torch's; of one name, the later in this list."""
    # Those left out need bitsandbytes or apex
    names = [str(name) for name in timm.optim.list_optimizers(exclude_filters=['bnb*', 'fused*'])]
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {name: timm.optim.get_optimizer_class(name) for name in names}
    found |= {'decoupled_sgdw': composer.optim.DecoupledSGDW, 'decoupled_adamw': composer.optim.DecoupledAdamW}
    found |= {
        name.lower(): item
        for name, item in vars(torch.optim).items()
        if inspect.isclass(item) and issubclass(item, torch.optim.Optimizer) and item is not torch.optim.Optimizer
    }
    return found


def check_arguments(key: str, target: Callable[..., Any], kwargs: Mapping[str, Any], *, given: Iterable[str] = ()) -> dict[str, Any]:
    """Hold keyword arguments against a signature.

    Args:
        key: Where the recipe says so; begins the error message.
        target: The class or function that will be called.
        kwargs: What the recipe gives it.
        given: Parameters that are filled in elsewhere and may not come from the recipe.

    Returns:
        The arguments as a new ``dict``.

    Raises:
        InputError: An unknown argument (the message gives the nearest), a missing one, or one of the wrong type.
    """
    hints = parameters(target)
    known = {name: hint for name, hint in hints.items() if name not in given and not name.startswith('*')}
    for name, value in kwargs.items():
        if name in known:
            check_type(f'{key}.{name}', value, known[name].hint)
        elif '**' not in hints or name in given:
            raise InputError(f'{key}.{name}: unknown argument; {did_you_mean(name, known)}')
    for name, parameter in known.items():
        if parameter.required and name not in kwargs:
            raise InputError(f'{key}.{name}: missing; expected {describe(parameter.hint)}')
    return dict(kwargs)


def check_type(key: str, value: Any, hint: Any) -> None:
    """Hold one value against a type hint.

    Args:
        key: Names the value in the error message.
        value: Plain data, as YAML gives it.
        hint: A type hint; what YAML cannot express (tensors, callables) matches nothing, an unknown hint matches all.

    Raises:
        InputError: The value does not fit.
    """
    if not _matches(value, hint):
        raise InputError(
            f'{key}: expected {describe(hint)}, got {value!r:.200}' + (f' ({type(value).__name__})' if value is not None else '')
        )


@dataclass(frozen=True)
class Parameter:
    """A parameter of a callable: its type hint and whether it must be given."""

    hint: Any
    required: bool


def parameters(target: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a callable.

    Args:
        target: A class or function.

    Returns:
        Names and parameters; ``'**'`` stands for open keyword arguments. A parameter without a type hint takes its default's type.
    """
    function = target.func if isinstance(target, functools.partial) else target
    init = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    if init is Callback.__init__:  # it takes anything and ignores it
        return {}
    try:
        hints = typing.get_type_hints(init)
    except (NameError, TypeError):  # names imported for the type checker alone
        hints = {}
    found = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            found['**'] = Parameter(Any, required=False)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            required = parameter.default is parameter.empty
            found[name] = Parameter(hints.get(name, Any if required else _hint_of_default(parameter.default)), required)
    return found


def _hint_of_default(default: Any) -> Any:
    if isinstance(default, (bool, str)):
        return type(default)
    return float if isinstance(default, (int, float)) else Any


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _matches(value: Any, hint: Any) -> bool:
    alternatives = _alternatives(hint)
    if len(alternatives) > 1:
        # Beside Time, a string is a time string
        if isinstance(value, str) and any(_is_time(item) for item in alternatives):
            return _matches(value, Time)
        return any(_matches(value, item) for item in alternatives)
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Any or isinstance(origin, (str, typing.TypeVar)):
        return True
    if origin is typing.Literal:
        return value in args
    if origin is None or origin is type(None):
        return value is None
    if _is_time(origin):
        return isinstance(value, str) and _is_time_string(value)
    if not inspect.isclass(origin):
        return True
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if issubclass(origin, Enum):
        return isinstance(value, str) and value.lower() in {str(item.value).lower() for item in origin}
    if origin in (list, tuple, collections.abc.Sequence, collections.abc.Iterable):
        return isinstance(value, (list, tuple)) and (not args or all(_matches(item, args[0]) for item in value))
    return isinstance(value, origin)


def _is_time(hint: Any) -> bool:
    return (typing.get_origin(hint) or hint) is Time


def takes_time(hint: Any) -> bool:
    """Whether a type hint allows a time string, or a list of them."""
    inner = [part for item in _alternatives(hint) for part in (item, *(typing.get_args(item) if typing.get_origin(item) is list else ()))]
    return any(_is_time(part) for item in inner for part in _alternatives(item))


def _is_time_string(text: str) -> bool:
    try:
        Time.from_timestring(text)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def describe(hint: Any) -> str:
    """A type hint in a reader's words, without what YAML cannot express.

    Args:
        hint: A type hint.

    Returns:
        For example ``"int, time string such as '10ep' or null"``.
    """
    alternatives = _alternatives(hint)
    times = any(_is_time(item) for item in alternatives)
    words = [_describe_one(item) for item in alternatives if not (times and item is str)]
    words = list(dict.fromkeys(word for word in words if word))
    return ' or '.join(words) or 'another type'


def _describe_one(hint: Any) -> str:
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is None or origin is type(None):
        return 'null'
    if _is_time(origin):
        return "a time string such as '10ep'"
    if origin is typing.Literal:
        return ' or '.join(repr(item) for item in args)
    if origin in (list, tuple, collections.abc.Sequence, collections.abc.Iterable):
        return f'a list of {describe(args[0])}' if args else 'a list'
    if origin in (dict, collections.abc.Mapping):
        return 'a mapping'
    if inspect.isclass(origin) and issubclass(origin, Enum):
        return 'one of ' + ', '.join(str(item.value) for item in origin)
    return {bool: 'true or false', int: 'an integer', float: 'a number', str: 'a string'}.get(origin, '')
