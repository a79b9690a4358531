"""Keyword arguments from YAML, checked against a callable's signature and type hints."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from composer.core import Callback, Time

from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean

__all__ = ['Parameter', 'check_arguments', 'check_type', 'describe', 'parameters', 'takes_time']


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
