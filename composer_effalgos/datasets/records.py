"""Descriptions of data in JSON files beside it."""

from __future__ import annotations

import json
import typing
from pathlib import Path

from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_text
from composer_effalgos.utils.text import one_line
from composer_effalgos.utils.type_hints import check_type

Record = typing.TypeVar('Record')


def read_record(cls: type[Record], file: Path, what: str, hint: str) -> Record | None:
    """Read a dataclass from a JSON file; ``None`` if there is no file.

    Args:
        cls: The dataclass. It checks the range of its fields in ``__post_init__``; their types are checked here.
        file: A JSON object with its fields.
        what: What the file should be, for the message.
        hint: What to do if it is not, for the message.

    Raises:
        InputError: The file is unreadable or malformed.
    """
    if not file.exists():
        return None
    try:
        found = json.loads(read_text(file))
        for key, kind in typing.get_type_hints(cls).items():
            if key in found:
                check_type(key, found[key], kind)
        return cls(**found)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f'{file}: not {what} ({one_line(error)[:200]}); {hint}') from error
