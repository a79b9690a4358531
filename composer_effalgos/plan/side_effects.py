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
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from composer_effalgos.plan.randomness import is_random_state, random_states, restore_random

_OF_TORCH = ('_parameters', '_buffers', '_modules')
_LEVELS = 4  # of containers and objects below an attribute
_MOST = 1000  # entries of a container whose own contents are looked at
_LIBRARIES = {'composer', 'torch', 'torchmetrics', 'torchvision', 'transformers', 'streaming', 'logging', 'composer_effalgos'}
RANDOM = 'random numbers'  # among the changes, if a generator was used

Undo = tuple[str, Callable[[], bool]]
"""The name of a value, and a function that restores it and returns whether it had changed."""


@contextlib.contextmanager
def undo_side_effects(model: nn.Module) -> Iterator[list[str]]:
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
        with torch.no_grad():
            changed += [name for name, undo in kept if undo()]


def _entries(prefix: str, owner: Any, levels: int, known: set[int], without: tuple[str, ...] = ()) -> Iterator[Undo]:
    """The entries of a mapping, and what is in them."""
    entries = dict(owner)

    def changed() -> bool:
        return list(owner) != list(entries) or any(owner[key] is not value for key, value in entries.items())

    def restore() -> None:
        for key in [key for key in owner if key not in entries]:
            del owner[key]
        for key, value in entries.items():
            owner[key] = value

    yield prefix.rstrip('.') or 'attributes', _undo(changed, restore)
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
            version, content = value._version, value.clone()
            preserved = _unsafe_preserve_version_counter(value)

            def restore() -> None:
                value.copy_(content)
                preserved.__exit__()  # a graph that saved the tensor at this version finds the content of this version

            yield name, _undo(lambda: value._version != version, restore)
    elif isinstance(value, np.ndarray):
        array = value.copy()
        yield name, _undo(lambda: value.tobytes() != array.tobytes(), lambda: value.__setitem__(..., array))
    elif isinstance(value, torch.Generator):
        state = value.get_state()
        yield RANDOM, _undo(lambda: not torch.equal(state, value.get_state()), lambda: value.set_state(state))
    elif isinstance(value, random.Random):
        numbers = value.getstate()
        yield RANDOM, _undo(lambda: numbers != value.getstate(), lambda: value.setstate(numbers))
    elif isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        before = bits.state
        yield RANDOM, _undo(lambda: str(before) != str(bits.state), lambda: setattr(bits, 'state', before))
    elif isinstance(value, dict):
        yield from _entries(f'{name}.', value, levels, known)
    elif isinstance(value, list | collections.deque | set):
        yield name, _undo_collection(value)
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


def _undo_collection(value: Any) -> Callable[[], bool]:
    items = list(value)

    def changed() -> bool:
        return len(value) != len(items) or any(ours is not theirs for ours, theirs in zip(value, items, strict=True))

    def restore() -> None:
        value.clear()
        value.update(items) if isinstance(value, set) else value.extend(items)

    return _undo(changed, restore)


def _undo(changed: Callable[[], bool], restore: Callable[[], Any]) -> Callable[[], bool]:
    def undo() -> bool:
        found = changed()
        if found:
            restore()
        return found

    return undo
