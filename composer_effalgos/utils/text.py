"""Text of messages: one line, not too long, with the nearest known name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

__all__ = ['described', 'did_you_mean', 'one_line', 'plain', 'shown']

_LONGEST = 700  # characters of a message


def one_line(error: object) -> str:
    """The message of an exception on one line, or the name of its type where it has none.

    Args:
        error: The exception, or its message.

    Returns:
        The message, every run of white space as one space, cut off where it is very long.
    """
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ...'


def shown(value: Any) -> str:
    """A value from a file as it stands in a message: on one line, and not too long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        text = 'a number of more than 4300 digits'
    return text if len(text) <= 80 else f'{text[:77]}...'


def described(value: Any) -> str:
    """What a value is, for a message: the type and shape of a tensor, the length of a list, else the type."""
    if hasattr(value, 'dtype') and hasattr(value, 'shape'):
        return f'a tensor of {str(value.dtype).removeprefix("torch.")} {list(value.shape)}'
    if isinstance(value, tuple | list):
        return f'a {type(value).__name__} of {len(value)}'
    return type(value).__name__


def did_you_mean(name: object, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """The end of an "unknown name" message: the nearest known name, or all of them when none is near.

    Args:
        name: What was written.
        known: The right names.
        otherwise: What to say where none is near, in place of all of them.

    Returns:
        ``"did you mean 'x'?"`` or ``'known: x, y, z'``.
    """
    known = sorted(known)
    by_plain_name = {plain(item): item for item in known}
    near = difflib.get_close_matches(plain(str(name)), by_plain_name, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{by_plain_name[near[0]]}'?"
    return f'known: {", ".join(known) or "none"}' if otherwise is None else otherwise


def plain(name: str) -> str:
    """A name without case, underscores and signs."""
    return re.sub('[^a-z0-9]', '', name.lower())
