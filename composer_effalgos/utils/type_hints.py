"""Validation of plain data against type hints."""

from __future__ import annotations

import collections.abc
import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from composer.core import Time

from composer_effalgos.utils.checks import is_whole
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean, plain, shown


def check_type(key: str, value: Any, hint: Any) -> None:
    """Checks plain data, as loaded from YAML, against a type hint; ``key`` starts the error message.

    ``Annotated[float, Range(...)]`` is a number within bounds. Types that YAML cannot express (tensors, callables) match nothing, unknown
    hints match everything.
    """
    if _matches(value, hint):
        return
    choices = [item for part in _alternatives(hint) if typing.get_origin(part) is typing.Literal for item in typing.get_args(part)]
    # the message lists all choices, so suggest one only for a difference in case or punctuation
    near = next((f"; did you mean '{item}'?" for item in choices if plain(str(item)) == plain(str(value))), '')
    ranges = any(typing.get_origin(part) is typing.Annotated for part in _alternatives(hint))
    kind = '' if value is None or ranges or choices else f' ({type(value).__name__})'
    raise InputError(f'{key}: expected {describe(hint)}, got {shown(value)}{kind}{near}')


def check_fields(
    prefix: str, values: Mapping[Any, Any], hints: Mapping[str, Any], *, what: str = 'key', beside: Iterable[str] = ()
) -> None:
    """Checks that every name among plain data is known, and its value with :func:`check_type`; ``prefix`` comes before the name.

    The message about an unknown ``what`` also suggests the names in ``beside``.
    """
    for name, value in values.items():
        if name not in hints:
            raise InputError(f'{prefix}{name}: unknown {what}; {did_you_mean(name, {*hints, *beside})}')
        check_type(f'{prefix}{name}', value, hints[name])


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _matches(value: Any, hint: Any) -> bool:
    alternatives = _alternatives(hint)
    if len(alternatives) > 1:
        # If Time is among the alternatives, a string must be a time string.
        if isinstance(value, str) and any(_is_time(item) for item in alternatives):
            return _matches(value, Time)
        return any(_matches(value, item) for item in alternatives)
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Annotated:
        number, allowed = args
        return value in allowed and (number is not int or is_whole(value))
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
    """Describes a type hint in words, without the types that YAML cannot express: ``'a number or null'`` for ``float | None``."""
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
    if origin is typing.Annotated:
        return f'a {"whole " if args[0] is int else ""}number {args[1]}'
    if origin is typing.Literal:
        return ' or '.join(repr(item) for item in args)
    if origin in (list, tuple, collections.abc.Sequence, collections.abc.Iterable):
        return f'a list of {describe(args[0])}' if args else 'a list'
    if origin in (dict, collections.abc.Mapping):
        return 'a mapping'
    if inspect.isclass(origin) and issubclass(origin, Enum):
        return 'one of ' + ', '.join(str(item.value) for item in origin)
    return {bool: 'true or false', int: 'an integer', float: 'a number', str: 'a string'}.get(origin, '')
