"""Evaluates a loss more often than the training step does, without side effects."""

from __future__ import annotations

import collections
import contextlib
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from composer_effalgos.plan.randomness import is_random_state, random_states, restore_random

_OF_TORCH = ('_parameters', '_buffers', '_modules')
_LEVELS = 4  # of containers and objects below an attribute
_MOST = 1000  # entries of a container whose own contents are looked at
_LIBRARIES = {'composer', 'torch', 'torchmetrics', 'torchvision', 'transformers', 'streaming', 'logging', 'composer_effalgos'}
RANDOM = 'random numbers'  # among the changes, if a generator was used

Undo = tuple[str, Callable[[], bool]]
"""The name of a value, and a function that restores it and returns whether it had changed."""


@contextlib.contextmanager
def repeated(model: nn.Module) -> Iterator[list[str]]:
    """Undoes changes that the block makes to the model's state and to the random states.

    A loss may count its calls, keep a moving average or draw random numbers. Without this, evaluating it again for a check would change the
    rest of the run.

    Args:
        model: The model whose loss is evaluated. Its attributes and buffers, and those of its modules, are restored, with containers,
            arrays, generators and plain objects among them; iterators and objects of libraries cannot be.

    Yields:
        A list that contains, after the block, the names of what it changed.
    """
    changed: list[str] = []
    known: set[int] = set()
    kept: list[Undo] = []
    for name, module in model.named_modules():
        prefix = f'{name}.' if name else ''
        kept += [*_entries(prefix, vars(module), _LEVELS, known, _OF_TORCH), *_entries(prefix, module._buffers, 1, known)]
    states, on_gpu = random_states(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield changed
    finally:
        if not is_random_state(states):
            changed.append(RANDOM)
        if on_gpu and not all(map(torch.equal, on_gpu, torch.cuda.get_rng_state_all())):
            changed.append(RANDOM)
            torch.cuda.set_rng_state_all(on_gpu)
        restore_random(states)
        changed += [name for name, undo in kept if undo()]


def _entries(prefix: str, owner: Any, levels: int, known: set[int], without: tuple[str, ...] = ()) -> Iterator[Undo]:
    """The entries of a mapping, and what is in them."""
    entries = dict(owner)

    def undo() -> bool:
        same = list(owner) == list(entries) and all(owner[key] is value for key, value in entries.items())
        if not same:
            for key in [key for key in owner if key not in entries]:
                del owner[key]
            for key, value in entries.items():
                owner[key] = value
        return not same

    yield prefix.rstrip('.') or 'attributes', undo
    if len(entries) <= _MOST:
        for key, value in entries.items():
            if key not in without:
                yield from _contents(f'{prefix}{key}', value, levels - 1, known)


def _contents(name: str, value: Any, levels: int, known: set[int]) -> Iterator[Undo]:
    """What an in-place change of a value would destroy."""
    if id(value) in known or levels < 0:
        return
    known.add(id(value))
    if isinstance(value, Tensor):
        if type(value) is Tensor and not value.requires_grad and not value.is_inference():  # others may be views of FSDP's parameters
            yield name, _tensor(value)
    elif isinstance(value, np.ndarray):
        yield name, _array(value)
    elif isinstance(value, torch.Generator):
        yield RANDOM, _state(value.get_state(), value.get_state, value.set_state, torch.equal)
    elif isinstance(value, random.Random):
        yield RANDOM, _state(value.getstate(), value.getstate, value.setstate, lambda ours, theirs: ours == theirs)
    elif isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        yield RANDOM, _state(bits.state, lambda: bits.state, lambda state: setattr(bits, 'state', state), lambda a, b: str(a) == str(b))
    elif isinstance(value, dict):
        yield from _entries(f'{name}.', value, levels, known)
    elif isinstance(value, list | collections.deque | set):
        yield name, _collection(value)
        for number, item in enumerate(value if len(value) <= _MOST else ()):
            yield from _contents(f'{name}.{number}', item, levels - 1, known)
    elif isinstance(value, tuple):
        for number, item in enumerate(value if len(value) <= _MOST else ()):
            yield from _contents(f'{name}.{number}', item, levels - 1, known)
    elif _is_plain_object(value):
        yield from _entries(f'{name}.', vars(value), levels, known)


def _is_plain_object(value: Any) -> bool:
    if isinstance(value, nn.Module | type | types.ModuleType | types.FunctionType | types.MethodType) or not hasattr(value, '__dict__'):
        return False
    return type(value).__module__.partition('.')[0] not in _LIBRARIES


def _tensor(value: Tensor) -> Callable[[], bool]:
    version, content = value._version, value.clone()

    def undo() -> bool:
        if value._version == version:
            return False
        with torch.no_grad():
            value.copy_(content)
        return True

    return undo


def _array(value: np.ndarray) -> Callable[[], bool]:
    content = value.copy()

    def undo() -> bool:
        if value.tobytes() == content.tobytes():
            return False
        value[...] = content
        return True

    return undo


def _collection(value: Any) -> Callable[[], bool]:
    items = list(value)

    def undo() -> bool:
        if len(value) == len(items) and all(ours is theirs for ours, theirs in zip(value, items, strict=True)):
            return False
        value.clear()
        value.update(items) if isinstance(value, set) else value.extend(items)
        return True

    return undo


def _state(before: Any, get: Callable[[], Any], put: Callable[[Any], Any], alike: Callable[[Any, Any], bool]) -> Callable[[], bool]:
    def undo() -> bool:
        if alike(before, get()):
            return False
        put(before)
        return True

    return undo
