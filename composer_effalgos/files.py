"""Files that are never seen half written."""

from __future__ import annotations

import os
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
