"""Validation of keyword arguments from YAML against a callable's signature and type hints."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from composer.core import Callback

from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.type_hints import check_fields, describe


def check_arguments(key: str, target: Callable[..., Any], kwargs: Mapping[str, Any], *, given: Iterable[str] = ()) -> dict[str, Any]:
    """Checks the keyword arguments in ``kwargs`` against the signature of a class or function, and returns them as a new ``dict``.

    ``key`` starts the error message; ``given`` are parameters that the caller fills in and that the recipe may not set.
    """
    hints = parameters(target)
    known = {name: hint for name, hint in hints.items() if name not in given and not name.startswith('*')}
    named = {name: value for name, value in kwargs.items() if name in known or '**' not in hints or name in given}
    check_fields(f'{key}.', named, {name: parameter.hint for name, parameter in known.items()}, what='argument')
    for name, parameter in known.items():
        if parameter.required and name not in kwargs:
            raise InputError(f'{key}.{name}: missing; expected {describe(parameter.hint)}')
    return dict(kwargs)


@dataclass(frozen=True)
class Parameter:
    """A parameter of a callable: its type hint and whether it is required."""

    hint: Any
    required: bool


def parameters(target: Callable[..., Any]) -> dict[str, Parameter]:
    """The parameters of a class or function by name; ``'**'`` stands for arbitrary keyword arguments.

    A parameter without a type hint gets the type of its default.
    """
    function = target.func if isinstance(target, functools.partial) else target
    init = function.__init__ if inspect.isclass(function) else function  # type: ignore[misc]
    if init is Callback.__init__:  # accepts any argument and ignores it
        return {}
    try:
        hints = typing.get_type_hints(init)
    except (NameError, TypeError):  # names imported under TYPE_CHECKING
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
