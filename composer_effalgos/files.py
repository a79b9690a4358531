"""Files that are never seen half written, and reading of what may not be a file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Where to write a file that takes its name when it is finished, and leaves nothing behind otherwise.

    Args:
        target: The file.

    Yields:
        A path beside it, of this process alone: two may write the same file by mistake.
    """
    unfinished = target.with_name(f'.{target.name}.{os.getpid()}')
    try:
        yield unfinished
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def read_text(path: Path, most: int = 2**24) -> str:
    """Reads a small text file that comes from elsewhere.

    Args:
        path: The file.
        most: The largest size in bytes.

    Returns:
        Its content.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is no regular file (a FIFO or a device may never end), too large, or not UTF-8.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer
    with open(path, 'rb', opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError('expected a regular file')
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f'expected at most {most} bytes')
    return content.decode('utf-8')
