"""The source code of Python's standard library as sequences of bytes: text that is there without a download."""

from __future__ import annotations

import functools
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from composer_effalgos.datasets.images import check_at_least, limited
from composer_effalgos.utils.errors import InputError

VOCABULARY = 256
HELD_OUT = 10  # one file in so many

# Distributions put these into packages of their own, or patch them
_OMITTED = frozenset({'distutils', 'ensurepip', 'idlelib', 'lib2to3', 'sysconfig', 'test', 'tkinter', 'turtledemo', 'venv'})


class ByteSequences(Dataset[dict[str, Tensor]]):
    """Text as sequences of bytes of one length, for causal language models.

    Args:
        sequences: uint8 ``[N, T]``.
    """

    num_classes = VOCABULARY

    def __init__(self, sequences: np.ndarray) -> None:
        self.sequences = sequences
        self.seq_len = sequences.shape[1]

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.sequences[index].astype(np.int64))
        return {'input_ids': tokens, 'labels': tokens}


def python_source(
    split: Literal['train', 'eval'],
    path: str | None = None,
    *,
    seq_len: int = 128,
    limit: int | None = None,
    eval_samples: int | None = 1024,
    seed: int = 0,
) -> ByteSequences:
    """The modules of the running Python's standard library, tests and installed packages left out: some 9 MB.

    One file in ten is held out. The files of each split follow each other in a random order and are cut into sequences that do not
    overlap. The same version of Python, ``seed`` and ``seq_len`` give the same sequences on every machine: modules that distributions
    patch or package separately are left out.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Ignored: the files are those of the running Python.
        seq_len: Bytes in a sequence.
        limit: Train on so many sequences, chosen at random, the same ones every time.
        eval_samples: Evaluate on so many, chosen likewise; null for all.
        seed: Decides which files are held out, and their order.

    Raises:
        InputError: An option out of range, or a Python without its source code.
    """
    check_at_least(2, seq_len=seq_len)
    check_at_least(1, eval_samples=eval_samples)
    check_at_least(0, seed=seed)
    files = _files()
    order = np.random.default_rng(seed).permutation(len(files))
    held_out = len(files) // HELD_OUT
    chosen = order[held_out:] if split == 'train' else order[:held_out]
    text = np.frombuffer(b''.join(files[number] for number in chosen), np.uint8)
    count = len(text) // seq_len
    if count == 0:
        raise InputError(f'dataset.seq_len: expected at most {len(text)}, the bytes of the {split} split, got {seq_len}')
    rows = limited(count, limit if split == 'train' else None if eval_samples is None else min(eval_samples, count))
    return ByteSequences(text[: count * seq_len].reshape(count, seq_len)[rows.numpy()])


@functools.cache
def _files() -> list[bytes]:
    """The files' contents, in the order of their paths."""
    folder = Path(sysconfig.get_path('stdlib'))
    wanted = sys.stdlib_module_names - _OMITTED
    paths = {
        path.relative_to(folder)
        for path in folder.rglob('*.py')
        if path.relative_to(folder).parts[0].removesuffix('.py') in wanted and not {'test', 'tests'} & set(path.relative_to(folder).parts)
    }
    if len(paths) < HELD_OUT:
        raise InputError(f'dataset.name: python_source: no source code in {folder}; expected the .py files of the standard library')
    return [(folder / path).read_bytes() for path in sorted(paths, key=Path.as_posix)]
