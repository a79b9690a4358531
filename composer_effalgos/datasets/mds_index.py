"""Validation of the ``index.json`` of MDS shards. mosaicml-streaming trusts it: it reads, writes and deletes the files named there."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_text
from composer_effalgos.utils.text import one_line, shown

INDEX = 'index.json'
COMPRESSIONS = {'br': 'brotli', 'bz2': 'bz2', 'gz': 'gzip', 'snappy': 'snappy', 'zstd': 'zstd'}
"""Streaming's compression names to Arrow's."""

_FILES = ('raw_data', 'raw_meta', 'zip_data', 'zip_meta')
_MOST_BYTES = 2**32  # offsets within a shard are 32-bit
_MOST_SAMPLES = 2**40
_LONGEST_NAME = 240  # bytes


def check_index(folder: Path) -> list[dict[str, Any]]:
    """Read the index of a folder of shards and reject entries that could write outside the folder or run code.

    Works for any folder that a ``StreamingDataset`` reads (``local`` with ``split``); call it before building the dataset.

    Args:
        folder: The folder that holds ``index.json``. For remote data, download that file first.

    Returns:
        The index entries of the shards.

    Raises:
        InputError: The index is unreadable; a file name is not a plain relative path, leaves the folder through a symbolic link or occurs
            twice; a column would be unpickled; or a count is out of range.
    """
    file = folder / INDEX
    try:
        index = json.loads(read_text(file, most=2**28))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f'{file}: not an index of MDS shards ({one_line(error)}); write them with effalgos convert or MDSWriter'
        ) from error
    shards = index.get('shards') if isinstance(index, dict) else None
    if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
        raise InputError(f'{file}: not an index of MDS shards: expected a list `shards` of objects; write them again')
    root = os.path.realpath(folder)
    seen = {INDEX}
    for number, shard in enumerate(shards):
        key = f'{file}: shards[{number}]'
        _check_whole_number(f'{key}.samples', shard.get('samples'), _MOST_SAMPLES)
        for kind in _FILES:
            if shard.get(kind) is not None:
                _check_file(f'{key}.{kind}', shard[kind], root, seen)
        _check_columns(key, shard)
        compression = shard.get('compression')
        if compression is not None and (not isinstance(compression, str) or compression.partition(':')[0] not in COMPRESSIONS):
            raise InputError(f'{key}.compression: expected one of {", ".join(COMPRESSIONS)}, got {shown(compression)}')
    return shards


def _check_file(key: str, info: Any, root: str, seen: set[str]) -> None:
    """Check the entry of one file: ``basename`` and ``bytes``."""
    name = info.get('basename') if isinstance(info, dict) else None
    if not isinstance(name, str) or not _is_plain(name):
        raise InputError(f'{key}.basename: expected a plain relative path inside the folder, got {shown(name)}; do not use this data')
    # NAME.tmp too: streaming decompresses into it first
    if not all(os.path.realpath(Path(root, path)).startswith(f'{root.rstrip("/")}/') for path in (name, f'{name}.tmp')):
        raise InputError(f'{key}.basename: expected a file inside the folder, got {shown(name)}, a symbolic link out of it; copy it here')
    if name in seen:
        raise InputError(f'{key}.basename: expected a unique name, got {shown(name)} twice; write the shards again')
    seen.add(name)
    _check_whole_number(f'{key}.bytes', info.get('bytes'), _MOST_BYTES)


def _is_plain(name: str) -> bool:
    """Whether a name is a normalised relative POSIX path without hidden parts."""
    parts = PurePosixPath(name).parts
    return (
        '/'.join(parts) == name
        and not name.startswith('/')
        and name.isprintable()
        and not set(name) & {'\\', ':'}
        and not any(part.startswith('.') for part in parts)  # `..`, and our own temporary folder
        and 0 < len(name.encode()) <= _LONGEST_NAME
    )


def _check_columns(key: str, shard: dict[str, Any]) -> None:
    """Reject columns that are unpickled when read."""
    encodings = shard.get('column_encodings') or []
    if not isinstance(encodings, list) or not all(isinstance(encoding, str) for encoding in encodings):
        raise InputError(f'{key}.column_encodings: expected a list of names, got {shown(encodings)}; write the shards again')
    for encoding in encodings:
        if encoding.partition(':')[0] == 'pkl':
            raise InputError(f'{key}.column_encodings: expected types that run no code when read, got {shown(encoding)}; write other types')


def _check_whole_number(key: str, value: Any, below: int) -> None:
    if type(value) is not int or not 0 <= value < below:
        raise InputError(f'{key}: expected a whole number from 0 to {below - 1}, got {shown(value)}; write the shards again')
