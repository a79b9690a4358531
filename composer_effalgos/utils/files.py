"""Atomic writing of files, and safe reading of files from untrusted sources."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from composer_effalgos.utils.errors import InputError


@contextmanager
def whole_file(target: Path, mark: str | None = None) -> Iterator[Path]:
    """Provides an unused path in the same folder that is renamed to the target when the block ends without an error, and removed otherwise.

    ``mark`` is the suffix of that temporary name. The default is the process ID, since two processes may write the same file by mistake.
    With a fixed one, the next attempt removes what a killed process left behind. A device, FIFO or socket, which the rename would replace,
    is an ``InputError``.
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


def write_texts(texts: Mapping[Path, str], what: str) -> None:
    """Writes UTF-8 text files, each atomically, and creates their folders.

    Lone surrogates, which names of runs may contain, are replaced. ``what`` names the content in the ``InputError`` about a file that
    cannot be written.
    """
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as unfinished:
                unfinished.write_text(text, encoding='utf-8', errors='replace')
        except OSError as error:
            raise InputError(f'{path}: {what} cannot be written ({error.strerror})') from error


def read_text(path: Path, most: int = 2**24) -> str:
    """Reads a small text file from an untrusted source; like :func:`read_bytes`, and raises ``ValueError`` if it is not UTF-8."""
    return read_bytes(path, most).decode('utf-8')


def read_bytes(path: Path, most: int) -> bytes:
    """Reads a file of at most so many bytes from an untrusted source.

    Raises an ``OSError`` if it cannot be opened, and a ``ValueError`` if it is too large or not a regular file: a FIFO or device may never
    end.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        with open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError('expected a file, got a device, FIFO or socket')
            content = file.read(most + 1)
    except IsADirectoryError as error:
        raise ValueError('expected a file, got a folder') from error
    if len(content) > most:
        raise ValueError(f'expected at most {most} bytes')
    return content
