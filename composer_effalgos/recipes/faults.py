"""Tells user errors from bugs: a user error becomes one line, printed by one rank."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
import traceback
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed
from composer.utils import dist

from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import one_line

if TYPE_CHECKING:
    from composer_effalgos.recipes.components import Component

__all__ = ['blamed', 'explain', 'is_ours', 'modules', 'print_any_text', 'said_by_another_rank', 'say_once']

_LESS_MEMORY = 'too little memory; smaller sizes need less'
# PyTorch raises these as plain RuntimeErrors
_KNOWN = {
    'DataLoader worker': 'a process that reads data died: too little memory or shared memory (fewer dataset.num_workers need less), '
    'or a decoder that crashed (dataset.num_workers=0 shows where)',
    "can't allocate memory": _LESS_MEMORY,
    'by peer': 'another rank has stopped; the launcher shows its message',
}
_PATIENCE = timedelta(seconds=3)  # by how much the ranks' paths to the same error differ


def explain(error: BaseException) -> tuple[str, int] | None:
    """What a user can do something about.

    Args:
        error: What was raised.

    Returns:
        One line and the exit status (2 for bad input, else 1); None for a fault of the program.
    """
    if isinstance(error, InputError):
        return error.line, 2
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save wraps what the file system said
    if isinstance(error, OSError) and error.errno is not None:
        return f'{error.filename or "a file"}: {error.strerror}; what was saved before is whole', 2
    if isinstance(error, MemoryError):
        return f'{one_line(error)}; {_LESS_MEMORY}', 1
    if isinstance(error, RuntimeError):
        found = [advice for text, advice in _KNOWN.items() if text in str(error)]
        return (f'{one_line(error)[:300]}; {found[0]}', 1) if found else None
    return None


def print_any_text() -> None:
    """Lets the standard streams show what is no valid Unicode, such as a file's name in another encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def is_ours(error: BaseException) -> bool:
    """Whether this package's code raised an error; errors of other packages are mostly about the arguments that they were given."""
    names = modules(error)
    return bool(names) and names[0].split('.')[0] == __name__.split('.')[0]


def blamed(error: BaseException, components: Iterable[Component]) -> Component | None:
    """The component of a recipe in whose code an error was raised.

    Args:
        error: What was raised.
        components: What the recipe names.

    Returns:
        The one whose code is innermost in the traceback; None where it is none of them. What the Trainer calls is no further blamed on
        what has called the Trainer: an optimizer's step runs the whole forward pass.
    """
    targets = {getattr(item.target, 'func', item.target).__module__: item for item in components}
    called = itertools.takewhile(lambda module: module != 'composer.trainer.trainer', modules(error))
    return next((targets[module] for module in called if module in targets), None)


def modules(error: BaseException) -> list[str]:
    """The names of the modules in an error's traceback, the innermost first."""
    return [frame.f_globals.get('__name__', '') for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]


def say_once(line: str) -> None:
    """Prints an error, once for all the ranks that have the same one.

    Rank 0 says it and ends, and the launcher then stops the others. They wait for that as long as rank 0 may be about to fail alike; where
    it does not, the first of them says it.

    Args:
        line: What is to be said.
    """
    rank = dist.get_global_rank()
    if dist.get_world_size() > 1 and (rank > 0 or torch.distributed.is_initialized()) and not _is_first(line, rank):
        return
    print(f'error: {line}', file=sys.stderr, flush=True)


def _is_first(line: str, rank: int) -> bool:
    try:
        store = _store()
        store.set(f'fault of rank {rank}', line)
        first = store.add(f'fault: {line}', 1) == 1
    except RuntimeError:  # rank 0, which holds the store, has not come or has gone
        return True
    if rank == 0:
        return True
    with contextlib.suppress(RuntimeError):
        store.wait(['fault of rank 0'], _PATIENCE)
        if store.get('fault of rank 0').decode() == line:
            first = False
            store.wait(['nothing'], _PATIENCE)  # ends with rank 0, whose exit status the launcher passes on if it is the first to end
    return first


def said_by_another_rank() -> bool:
    """Whether another rank has said why it stops, so that an error of this one only follows from that."""
    if dist.get_world_size() == 1 or not torch.distributed.is_initialized():
        return False
    try:
        store = _store()
        others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_global_rank()]
        return any(store.check([f'fault of rank {rank}']) for rank in others)  # type: ignore[attr-defined]  # left out of the stubs
    except RuntimeError:
        return False


def _store() -> torch.distributed.TCPStore:
    """The store that the ranks met through, which is rank 0's."""
    return torch.distributed.TCPStore(
        os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False, timeout=_PATIENCE, wait_for_workers=False
    )
