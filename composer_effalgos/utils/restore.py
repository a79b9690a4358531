"""Validation of plain data from a checkpoint."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from composer_effalgos.utils.errors import CheckpointError
from composer_effalgos.utils.text import shown

_Record = typing.TypeVar('_Record')


def check_entries(saved: Any, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Returns checkpoint data after checking that it is a mapping with entries of given types; raises a ``CheckpointError`` otherwise.

    An ``int`` is accepted for a ``float``, and for ``list[int]`` only ``list`` is checked.
    """
    if not isinstance(saved, dict):
        raise CheckpointError(f'expected a mapping in the checkpoint, got {shown(saved)}')
    for name, kind in kinds.items():
        plain = typing.get_origin(kind) if isinstance(kind, types.GenericAlias) else kind
        value = saved.get(name)
        if not isinstance(value, plain) and not (type(value) is int and isinstance(0.0, plain)):
            raise CheckpointError(f"the checkpoint's {name}: expected {getattr(kind, '__name__', kind)}, got {shown(value)}")
    return saved


def restored(kind: type[_Record], saved: Any) -> _Record:
    """Restores a dataclass from the result of ``asdict``, checked as by :func:`check_entries`.

    Fields with a default may be missing, and unknown ones are ignored, as in older checkpoints.
    """
    hints = typing.get_type_hints(kind)
    defaults = {item.name for item in fields(kind) if item.default is not MISSING or item.default_factory is not MISSING}  # type: ignore[arg-type]
    lacking = defaults - saved.keys() if isinstance(saved, dict) else set()
    checked = check_entries(saved, {name: hint for name, hint in hints.items() if name not in lacking})
    return kind(**{name: value for name, value in checked.items() if name in hints})
