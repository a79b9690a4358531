"""Files that are never seen half written, and reading of what may not be a regular file."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from composer_effalgos.utils.errors import InputError


@contextmanager
def whole_file(target: Path, mark: str | None = None) -> Iterator[Path]:
    """Where to write a file or folder that takes its name when it is finished, and leaves nothing behind otherwise.

    Args:
        target: The file or folder.
        mark: Ends the temporary name. By default it is this process's number: two may write the same file by mistake. With a fixed one,
            the next attempt removes what a killed process left.

    Yields:
        A path beside it, where nothing is.

    Raises:
        InputError: The target is a device, FIFO or socket, which a rename would replace.
    """
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise InputError(f'{target}: expected a regular file or a new name, got a device, FIFO or socket; give another path')
    unfinished = target.with_name(f'.{target.name}.{os.getpid() if mark is None else mark}')
    _remove(unfinished)
    try:
        yield unfinished
        unfinished.replace(target)
    finally:
        _remove(unfinished)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_file(path: Path, hint: str) -> None:
    """Refuses what is no regular file, before it is opened: a FIFO would be waited for, and a device may never end.

    Args:
        path: The file.
        hint: What would be right, for the message.

    Raises:
        InputError: It is missing, or something else.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f'{path}: expected a file, got none ({reason}); {hint}') from error
    if not stat.S_ISREG(mode):
        raise InputError(f'{path}: expected a file, got {"a folder" if stat.S_ISDIR(mode) else "a device, FIFO or socket"}; {hint}')


def read_text(path: Path, most: int = 2**24) -> str:
    """Reads a small text file that comes from elsewhere; as :func:`read_bytes`, with a ``ValueError`` where it is not UTF-8."""
    return read_bytes(path, most).decode('utf-8')


def read_bytes(path: Path, most: int) -> bytes:
    """Reads a file that comes from elsewhere.

    Args:
        path: The file.
        most: The largest size in bytes.

    Returns:
        Its content.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no regular file (a FIFO or a device may never end), or too large.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer
    with open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError('expected a regular file')
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f'expected at most {most} bytes')
    return content
