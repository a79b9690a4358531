"""Flat token files in nanoGPT's format: ``train.bin`` and ``val.bin``, one unsigned integer per token and no header."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from composer_effalgos.datasets.images import check_at_least, data_folder
from composer_effalgos.datasets.records import read_record
from composer_effalgos.datasets.sequences import TokenSequences, check_width, cut
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import one_line

META = 'meta.json'
LARGEST_VOCABULARY = 2**32


@dataclass(frozen=True)
class Meta:
    """The contents of ``meta.json``, which this package writes beside tokens. nanoGPT's optional ``meta.pkl`` is not read.

    Attributes:
        vocab_size: Vocabulary size; all tokens are smaller.
        tokens: Number of tokens in each split.
        source: Name of the text.
    """

    vocab_size: int
    tokens: dict[str, int]
    source: str

    def __post_init__(self) -> None:
        if not 2 <= self.vocab_size <= LARGEST_VOCABULARY:
            raise InputError(f'vocab_size: expected 2 to 2**32, got {self.vocab_size}')

    @classmethod
    def read(cls, folder: Path) -> Meta | None:
        """Read the ``meta.json`` of a folder; ``None`` if there is none.

        Raises:
            InputError: The file is unreadable or malformed.
        """
        return read_record(cls, folder / META, 'a description of tokens', 'write them again, or remove it and set dataset.vocab_size')

    def text(self) -> str:
        """The description as JSON."""
        return json.dumps(asdict(self), indent=2) + '\n'


def vocabulary(given: int | None, meta: Meta | None, folder: Path) -> int:
    """The vocabulary size: ``given``, or else from ``meta.json``.

    Raises:
        InputError: Both are missing.
    """
    if given is not None:
        return given
    if meta is None:
        raise InputError(f'dataset.vocab_size: missing, and {folder} has no {META}; expected the size of the vocabulary, 50257 for GPT-2')
    return meta.vocab_size


def token_type(vocab_size: int) -> str:
    """The smallest unsigned token dtype for a vocabulary: ``'uint16'`` (as nanoGPT) or ``'uint32'``."""
    return 'uint16' if vocab_size <= 2**16 else 'uint32'


def write_tokens(file: Path, parts: Iterable[np.ndarray], vocab_size: int) -> int:
    """Write a flat token file.

    Args:
        file: A new file.
        parts: Arrays of integers ``[M]`` in ``[0, vocab_size)``.
        vocab_size: Determines the dtype.

    Returns:
        The number of tokens.
    """
    count = 0
    with file.open('wb') as out:
        for part in parts:
            out.write(part.astype(np.dtype(token_type(vocab_size)).newbyteorder('<')).tobytes())
            count += len(part)
    return count


def tokens(
    split: Literal['train', 'eval'],
    path: str | None,
    *,
    seq_len: int = 1024,
    vocab_size: int | None = None,
    dtype: Literal['uint16', 'uint32'] | None = None,
    limit: int | None = None,
    eval_samples: int | None = None,
) -> TokenSequences:
    """Tokens in ``path/train.bin`` and ``path/val.bin``, memory-mapped and cut into non-overlapping sequences.

    nanoGPT's ``prepare.py`` writes such files; ``effalgos convert --to tokens`` also writes ``meta.json``.

    Args:
        split: ``'train'`` or ``'eval'`` (``val.bin``).
        path: Folder of the files.
        seq_len: Sequence length in tokens.
        vocab_size: Vocabulary size, e.g. 50257 for GPT-2 tokens. Null to read it from ``meta.json``.
        dtype: Token dtype in the files. Null: ``uint32`` if the vocabulary in ``meta.json``, or else ``vocab_size``, needs it; else
            ``uint16``.
        limit: Train on a random subset of this many sequences, which is the same in every run.
        eval_samples: Evaluate on a random subset of at most this many, likewise; null for all.

    Raises:
        InputError: A file or ``vocab_size`` is missing, a file is truncated or has another dtype; on access, a token is outside the
            vocabulary.
    """
    folder = data_folder('tokens', path, 'train.bin and val.bin')
    meta = Meta.read(folder)
    size = vocabulary(vocab_size, meta, folder)
    check_at_least(2, vocab_size=size)
    kind = np.dtype(dtype or token_type(size if meta is None else meta.vocab_size)).newbyteorder('<')
    name = 'train' if split == 'train' else 'val'
    found = _mapped(folder / f'{name}.bin', kind)
    expected = None if meta is None else meta.tokens.get(name)
    if expected is not None and expected != len(found):
        raise InputError(f'{folder / name}.bin: {len(found)} tokens of {kind.name}, {META} says {expected}: cut off, or of other data')
    return cut(found, size, split, seq_len=seq_len, limit=limit, eval_samples=eval_samples, source=folder / f'{name}.bin')


def _mapped(file: Path, kind: np.dtype) -> np.ndarray:
    if not file.is_file():
        raise InputError(f'{file}: no such file; expected tokens as nanoGPT writes them, or as effalgos convert --to tokens does')
    size = file.stat().st_size
    if size == 0 or size % kind.itemsize:
        raise InputError(
            f'{file}: {size} bytes, expected a multiple of {kind.itemsize} ({kind.name}): cut off, or of another dataset.dtype'
        )
    try:
        found = np.memmap(file, kind, 'r')
    except OSError as error:
        raise InputError(f'{file}: cannot be read ({one_line(error)})') from error
    check_width(found, str(file))
    return found
