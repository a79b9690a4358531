"""Evaluates a loss more often than the training step does, without side effects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from composer_effalgos.plan.randomness import is_random_state, random_states, restore_random

_OF_TORCH = ('_parameters', '_buffers', '_modules')


@contextlib.contextmanager
def repeated(model: nn.Module) -> Iterator[list[str]]:
    """Undoes changes that the block makes to the model's state and to the random states.

    A loss may count its calls, keep a moving average or draw random numbers. Without this, evaluating it again for a check would change the
    rest of the run.

    Args:
        model: The model whose loss is evaluated. Its attributes and buffers, and those of its modules, are restored; lists and dicts among
            them by their entries.

    Yields:
        A list that contains, after the block, the names of what it changed.
    """
    changed: list[str] = []
    kept = [
        (f'{name}.' if name else '', owner, dict(owner), {key: _content(value) for key, value in owner.items() if key not in _OF_TORCH})
        for name, module in model.named_modules()
        for owner in (vars(module), module._buffers)
    ]
    random, on_gpu = random_states(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield changed
    finally:
        if not is_random_state(random):
            changed.append('random numbers')
        if on_gpu and not all(map(torch.equal, on_gpu, torch.cuda.get_rng_state_all())):
            changed.append('random numbers')
            torch.cuda.set_rng_state_all(on_gpu)
        restore_random(random)
        for prefix, owner, entries, contents in kept:
            changed += [f'{prefix}{name}' for name in _put_back(owner, entries, contents)]


def _content(value: Any) -> Any:
    """A copy of the content that an in-place change would destroy; ``None`` if there is none to restore."""
    if type(value) is Tensor and not value.requires_grad and not value.is_inference():  # others may be views of FSDP's parameters
        return value._version, value.clone()
    return value.copy() if type(value) in (list, dict) else None


def _put_back(owner: dict[str, Any], entries: dict[str, Any], contents: dict[str, Any]) -> list[str]:
    changed = [name for name in owner if name not in entries]
    for name in changed:
        del owner[name]
    for name, value in entries.items():
        content: Any = contents.get(name)
        if name not in owner or owner[name] is not value:
            owner[name] = value
            changed.append(name)
        if content is None:
            continue
        if isinstance(value, Tensor) and value._version != content[0]:
            with torch.no_grad():
                value.copy_(content[1])
            changed.append(name)
        elif isinstance(value, list | dict) and not _same_entries(value, content):
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
            changed.append(name)
    return changed


def _same_entries(ours: Any, theirs: Any) -> bool:
    if len(ours) != len(theirs):
        return False
    if isinstance(ours, dict):
        return all(key in ours and ours[key] is value for key, value in theirs.items())
    return all(value is held for value, held in zip(ours, theirs, strict=True))
