"""State of algorithms and callbacks in FSDP's sharded checkpoints."""

from __future__ import annotations

import io
from typing import Any

import torch
from composer.core import State


def pack(state: State, saved: dict[str, Any]) -> dict[str, Any]:
    """Makes one value of a state dict where checkpoints are sharded.

    ``torch.distributed.checkpoint`` loads into what the new run's state dict holds, and only that: an entry that it has not yet is not
    read, and a tensor of another shape is refused. Before the first ``fit`` there is no plan, and no table of samples.

    Args:
        state: The trainer's state.
        saved: What to save, the same on every rank.

    Returns:
        ``saved`` itself, or with sharded checkpoints a dict with one entry, which is always there.
    """
    if not state.fsdp_sharded_state_dict_enabled:
        return saved
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return {'packed': buffer.getvalue()}


def unpack(saved: dict[str, Any]) -> dict[str, Any]:
    """What :func:`pack` was given.

    Args:
        saved: What it returned.
    """
    if 'packed' not in saved:
        return saved
    return torch.load(io.BytesIO(saved['packed']), map_location='cpu', weights_only=True)
