"""State of algorithms and callbacks in FSDP's sharded checkpoints."""

from __future__ import annotations

import io
from typing import Any

import torch
from composer.core import State


def pack(state: State, saved: dict[str, Any]) -> dict[str, Any]:
    """Packs a state dict into a single value if checkpoints are sharded.

    ``torch.distributed.checkpoint`` loads only into entries that exist in the new run's state dict: it skips an entry that does not exist
    yet, and rejects a tensor of another shape. Before the first ``fit`` there is neither a plan nor a sample table.

    Args:
        state: The trainer's state.
        saved: What to save, the same on every rank.

    Returns:
        ``saved`` itself, or with sharded checkpoints a dict with one entry that always exists.
    """
    if not state.fsdp_sharded_state_dict_enabled:
        return saved
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return {'packed': buffer.getvalue()}


def unpack(saved: dict[str, Any]) -> dict[str, Any]:
    """Restores the argument of :func:`pack` from its result."""
    if 'packed' not in saved:
        return saved
    return torch.load(io.BytesIO(saved['packed']), map_location='cpu', weights_only=True)
