"""The source code of Python's standard library: text data without a download."""

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

from composer_effalgos.datasets.images import check_at_least
from composer_effalgos.datasets.sequences import TokenSequences, chosen
from composer_effalgos.datasets.text import Coding, text_sequences
from composer_effalgos.utils.errors import InputError

HELD_OUT = 10  # one file in this many

# Distributions package these separately or patch them
_OMITTED = frozenset({'distutils', 'ensurepip', 'idlelib', 'lib2to3', 'sysconfig', 'test', 'tkinter', 'turtledemo', 'venv'})


def python_source(
    split: Literal['train', 'eval'],
    path: str | None = None,
    *,
    tokenizer: Coding = 'bytes',
    vocab_size: int | None = None,
    seq_len: int = 128,
    limit: int | None = None,
    eval_samples: int | None = 1024,
    seed: int = 0,
) -> TokenSequences:
    """The running Python's standard library without tests and installed packages: about 9 MB of text.

    One file in ten is held out. The files of each split are concatenated in random order and cut into non-overlapping sequences. The same
    Python version and options give the same sequences on every machine, because modules that distributions patch or package separately are
    excluded.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Ignored; the files are those of the running Python.
        tokenizer: ``'bytes'``, or ``'bpe'``: byte-pair encoding trained on the training split (about 8 s) and cached in
            ``~/.cache/composer_effalgos``.
        vocab_size: Vocabulary size for ``'bpe'``, 257 to 65,536; null for 1,024.
        seq_len: Sequence length in tokens.
        limit: Train on a random subset of this many sequences, which is the same in every run.
        eval_samples: Evaluate on a random subset of at most this many, likewise; null for all.
        seed: Seed for the held-out files and the order of files.

    Raises:
        InputError: An option is out of range, or Python's source code is not installed.
    """
    check_at_least(0, seed=seed)
    files = list(_files().values())
    numbers = _split_of(len(files), seed)
    documents = {name: [files[number] for number in members] for name, members in numbers.items()}
    options = {'seq_len': seq_len, 'limit': limit, 'eval_samples': eval_samples}
    return text_sequences(documents, 'python_source', split, tokenizer=tokenizer, vocab_size=vocab_size, **options)  # type: ignore[arg-type]


class Snippets(Dataset[dict[str, Tensor]]):
    """Labelled byte sequences; a sample is ``{'input_ids', 'labels'}``, int64 ``[T]`` and an int64 scalar.

    Args:
        sequences: uint8 ``[N, T]``.
        targets: int64 ``[N]``.
        classes: Class names.
    """

    vocab_size = 256

    def __init__(self, sequences: np.ndarray, targets: Tensor, classes: list[str]) -> None:
        self.sequences, self.targets, self.classes = sequences, targets, classes
        self.num_classes, self.seq_len = len(classes), sequences.shape[1]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {'input_ids': torch.from_numpy(self.sequences[index].astype(np.int64)), 'labels': self.targets[index]}


def python_packages(
    split: Literal['train', 'eval'],
    path: str | None = None,
    *,
    seq_len: int = 128,
    num_packages: int = 6,
    limit: int | None = None,
    eval_samples: int | None = None,
    seed: int = 0,
) -> Snippets:
    """Classify snippets of Python's standard library by package, with equally many snippets of each of the largest packages.

    One file in ten of each package is held out. The snippets do not overlap.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Ignored; the files are those of the running Python.
        seq_len: Snippet length in bytes.
        num_packages: Number of classes: the packages with the most files.
        limit: Train on a random subset of this many snippets, which is the same in every run.
        eval_samples: Evaluate on a random subset of at most this many, likewise; null for all.
        seed: Seed for the held-out files and for the snippets kept of larger packages.

    Raises:
        InputError: An option is out of range, or Python's source code is not installed.
    """
    check_at_least(2, seq_len=seq_len, num_packages=num_packages)
    check_at_least(0, seed=seed)
    packages: dict[str, list[bytes]] = {}
    for name, content in _files().items():
        if '/' in name:
            packages.setdefault(name.partition('/')[0], []).append(content)
    large = sorted(name for name, files in packages.items() if len(files) >= HELD_OUT)
    if num_packages > len(large):
        raise InputError(
            f'dataset.num_packages: expected at most {len(large)}, the packages of {HELD_OUT} files and more, got {num_packages}'
        )
    classes = sorted(sorted(large, key=lambda name: -len(packages[name]))[:num_packages])
    pieces = [_pieces(packages[name], split, seq_len, seed) for name in classes]
    fewest = min(map(len, pieces))
    if fewest == 0:
        raise InputError(f'dataset.seq_len: expected less, a package has no file of so many bytes in the {split} split, got {seq_len}')
    rng = np.random.default_rng(seed)
    sequences = np.concatenate([found[np.sort(rng.permutation(len(found))[:fewest])] for found in pieces])
    rows = chosen(len(sequences), split, limit, eval_samples)
    return Snippets(sequences[rows.numpy()], torch.arange(num_packages).repeat_interleave(fewest)[rows], classes)


def _pieces(files: list[bytes], split: str, seq_len: int, seed: int) -> np.ndarray:
    """Cut a split's files into snippets, uint8 ``[N, seq_len]``; the remainder of each file is dropped."""
    numbers = _split_of(len(files), seed)['train' if split == 'train' else 'val']
    text = b''.join(files[number][: len(files[number]) // seq_len * seq_len] for number in numbers)
    return np.frombuffer(text, np.uint8).reshape(-1, seq_len)


def _split_of(count: int, seed: int) -> dict[str, np.ndarray]:
    """Shuffled file indices of each split; one file in ten is held out."""
    order = np.random.default_rng(seed).permutation(count)
    return {'train': order[count // HELD_OUT :], 'val': order[: count // HELD_OUT]}


@functools.cache
def _files() -> dict[str, bytes]:
    """File contents by relative path, sorted by path."""
    folder = Path(sysconfig.get_path('stdlib'))
    wanted = sys.stdlib_module_names - _OMITTED
    paths = {
        path.relative_to(folder)
        for path in folder.rglob('*.py')
        if path.relative_to(folder).parts[0].removesuffix('.py') in wanted and not {'test', 'tests'} & set(path.relative_to(folder).parts)
    }
    if len(paths) < HELD_OUT:
        raise InputError(f'dataset.name: python_source: no source code in {folder}; expected the .py files of the standard library')
    return {path.as_posix(): (folder / path).read_bytes() for path in sorted(paths, key=Path.as_posix)}
