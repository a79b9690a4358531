"""Text for messages: on one line, of limited length, with suggestions for misspelled names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

_LONGEST = 700  # maximum characters of a message


def one_line(error: object) -> str:
    """The message of an exception on one line, truncated if very long; the name of its type if there is no message."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ...'


def shown(value: Any) -> str:
    """The ``repr`` of a value for a message, truncated to 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        text = 'a number of more than 4300 digits'
    return text if len(text) <= 80 else f'{text[:77]}...'


def described(value: Any) -> str:
    """Describes a value for a message: type and shape of a tensor, length of a list, otherwise the type."""
    if hasattr(value, 'dtype') and hasattr(value, 'shape'):
        return f'a tensor of {str(value.dtype).removeprefix("torch.")} {list(value.shape)}'
    if isinstance(value, tuple | list):
        return f'a {type(value).__name__} of {len(value)}'
    return type(value).__name__


def did_you_mean(name: object, known: Iterable[str], *, otherwise: str | None = None) -> str:
    """The end of an "unknown name" message: ``"did you mean 'x'?"``, or ``'known: x, y, z'`` if no known name is close.

    ``otherwise`` is the text to use if none is close, instead of all names.
    """
    known = sorted(known)
    by_plain_name = {plain(item): item for item in known}
    near = difflib.get_close_matches(plain(str(name)), by_plain_name, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{by_plain_name[near[0]]}'?"
    return f'known: {", ".join(known) or "none"}' if otherwise is None else otherwise


def plain(name: str) -> str:
    """A name in lower case without underscores and punctuation."""
    return re.sub('[^a-z0-9]', '', name.lower())
