"""Distinguishes user errors from bugs. A user error becomes one line, printed by one rank."""

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

_LESS_MEMORY = 'out of memory; reduce the batch size or the model'
# RuntimeErrors of PyTorch, by a part of their message
_KNOWN = {
    'DataLoader worker': 'a DataLoader worker died: out of (shared) memory (reduce dataset.num_workers) or a crashing decoder '
    '(num_workers=0 shows where)',
    "can't allocate memory": _LESS_MEMORY,
    'by peer': 'another rank has stopped; the launcher shows its message',
}
_PATIENCE = timedelta(seconds=3)  # how far apart ranks reach the same error


def explain(error: BaseException) -> tuple[str, int] | None:
    """Explain an error that the user can fix, in one line with the exit status (2 for bad input, else 1); ``None`` for a bug."""
    if isinstance(error, InputError):
        return error.line, 2
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch.save wraps the OSError
    if isinstance(error, OSError) and error.errno is not None:
        return f'{error.filename or "a file"}: {error.strerror}; files saved before are complete', 2
    if isinstance(error, MemoryError):
        return f'{one_line(error)}; {_LESS_MEMORY}', 1
    if isinstance(error, RuntimeError):
        found = [advice for text, advice in _KNOWN.items() if text in str(error)]
        return (f'{one_line(error)[:300]}; {found[0]}', 1) if found else None
    return None


def print_any_text() -> None:
    """Let the standard streams print invalid Unicode, such as a file name in another encoding."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')


def is_ours(error: BaseException) -> bool:
    """Whether this package's code raised an error. Errors from other packages are mostly about their arguments."""
    names = modules(error)
    return bool(names) and names[0].split('.')[0] == __name__.split('.')[0]


def responsible_component(error: BaseException, components: Iterable[Component]) -> Component | None:
    """Find the component of a recipe whose code raised an error: the innermost in the traceback; ``None`` if there is none.

    Frames outside the innermost Trainer frame are ignored, because an optimizer's step calls the Trainer for the whole forward pass.
    """
    targets = {getattr(item.target, 'func', item.target).__module__: item for item in components}
    called = itertools.takewhile(lambda module: module != 'composer.trainer.trainer', modules(error))
    return next((targets[module] for module in called if module in targets), None)


def modules(error: BaseException) -> list[str]:
    """The module names in an error's traceback, innermost first."""
    return [frame.f_globals.get('__name__', '') for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]


def print_once(line: str) -> None:
    """Print an error once for all ranks that have the same one.

    Rank 0 prints it and exits, and the launcher stops the others. They wait for that as long as rank 0 may be about to fail with the same
    error; if it does not, the first of them prints it.
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
    except RuntimeError:  # rank 0, which hosts the store, has not started it or has exited
        return True
    if rank == 0:
        return True
    with contextlib.suppress(RuntimeError):
        store.wait(['fault of rank 0'], _PATIENCE)
        if store.get('fault of rank 0').decode() == line:
            first = False
            store.wait(['nothing'], _PATIENCE)  # until rank 0 exits: the launcher returns the status of the first rank to exit
    return first


def reported_by_another_rank() -> bool:
    """Whether another rank has reported an error, of which this rank's error is only a consequence."""
    if dist.get_world_size() == 1 or not torch.distributed.is_initialized():
        return False
    try:
        store = _store()
        others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_global_rank()]
        return any(store.check([f'fault of rank {rank}']) for rank in others)  # type: ignore[attr-defined]  # missing in the stubs
    except RuntimeError:
        return False


def _store() -> torch.distributed.TCPStore:
    """The rendezvous store, hosted by rank 0."""
    return torch.distributed.TCPStore(
        os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False, timeout=_PATIENCE, wait_for_workers=False
    )
