"""Token sequences in MDS shards, as written by llm-foundry's data preparation."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from composer_effalgos.datasets.images import check_at_least
from composer_effalgos.datasets.mds import Shards, located
from composer_effalgos.datasets.sequences import TokenSequences, check_vocabulary, check_width, chosen
from composer_effalgos.datasets.tokens import META, Meta, vocabulary
from composer_effalgos.utils.errors import InputError

_TOKENS = ('bytes', 'ndarray')


class MdsTokens(TokenSequences):
    """Token sequences in MDS shards; a sample is ``{'input_ids', 'labels'}``, int64 ``[T]``, labels unshifted.

    Args:
        shards: The split's shards.
        rows: Samples of the shards that belong to the dataset, int64 ``[N]``, ascending.
        num_classes: Vocabulary size.
        seq_len: Sequence length in tokens; longer samples are truncated. ``None`` for the length of the first sample.
        column: Name of the token column.
        dtype: Token dtype if the column holds bytes.
        by_shard: Whether the epoch plan reads shard by shard.

    Attributes:
        shard_starts: Index in ``rows`` of each shard's first sample, int64 ``[S]``, if ``by_shard``; else ``None``.

    Raises:
        InputError: The first sample is damaged, shorter than ``seq_len`` or has a token outside the vocabulary.
    """

    def __init__(
        self, shards: Shards, rows: Tensor, num_classes: int, seq_len: int | None, *, column: str, dtype: str, by_shard: bool
    ) -> None:
        self.shards, self.rows, self.num_classes, self.column, self.dtype = shards, rows, num_classes, column, np.dtype(dtype)
        self.seq_len = len(self._read(int(rows[0]))) if seq_len is None else seq_len
        self.shard_starts = torch.searchsorted(rows, shards.starts) if by_shard else None
        self.stored(0)

    def __len__(self) -> int:
        return len(self.rows)

    def _read(self, row: int) -> np.ndarray:
        tokens = self.shards[row][self.column]
        if isinstance(tokens, bytes):
            if len(tokens) % self.dtype.itemsize:
                raise InputError(f'{self.shards.folder}: sample {row}: {len(tokens)} bytes do not fit {self.dtype.name}; set dataset.dtype')
            tokens = np.frombuffer(tokens, self.dtype)
            check_width(tokens, f'{self.shards.folder}: sample {row}')
        if tokens.ndim != 1 or tokens.dtype.kind not in 'iu':
            where = f'{self.shards.folder}: sample {row}'
            raise InputError(f'{where}: expected whole numbers in one dimension, got {list(tokens.shape)} of {tokens.dtype}')
        return tokens

    def stored(self, index: int) -> np.ndarray:
        """A sequence, int64 ``[T]``.

        Raises:
            InputError: The sample is too short, damaged, or has a token outside the vocabulary.
        """
        row = int(self.rows[index])
        tokens = self._read(row)[: self.seq_len].astype(np.int64)
        if len(tokens) < self.seq_len:
            raise InputError(f'{self.shards.folder}: sample {row}: expected {self.seq_len} tokens, got {len(tokens)}; set dataset.seq_len')
        check_vocabulary(tokens, self.num_classes, f'{self.shards.folder}: sample {row}')
        return tokens


def mds_tokens(
    split: Literal['train', 'eval'],
    path: str | None,
    *,
    seq_len: int | None = None,
    vocab_size: int | None = None,
    dtype: Literal['uint16', 'uint32', 'int32', 'int64'] = 'int64',
    limit: int | None = None,
    eval_samples: int | None = None,
    shuffle: Literal['samples', 'shards'] = 'samples',
    remote: str | None = None,
    train_folder: str = 'train',
    eval_folder: str = 'val',
    column: str = 'tokens',
) -> MdsTokens:
    """Token sequences in MDS shards in ``path/train`` and ``path/val``, as written by llm-foundry and ``effalgos convert --to mds``.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Local folder of the splits, or of the part downloaded so far.
        seq_len: Sequence length in tokens, at most that of the shortest sample; null for the length of the first sample.
        vocab_size: Vocabulary size. Null to read it from ``meta.json``, which ``effalgos convert`` writes.
        dtype: Token dtype if the column has MDS type ``bytes``; llm-foundry's ``token_encoding_type``.
        limit: Train on a random subset of this many sequences, which is the same in every run.
        eval_samples: Evaluate on a random subset of at most this many, likewise; null for all.
        shuffle: ``'shards'`` shuffles the shards, and the samples within each; ``'samples'`` shuffles all samples together.
        remote: Remote folder with the layout of ``path``, e.g. ``s3://bucket/data``. Shards are downloaded to ``path`` on first access and
            kept there.
        train_folder: Name of the training split's folder.
        eval_folder: Name of the evaluation split's folder.
        column: Token column, of MDS type ``bytes`` or ``ndarray``.

    Raises:
        InputError: Shards, the column or ``vocab_size`` are missing, a shard is truncated, a sequence is too short, or a token is outside
            the vocabulary.
    """
    check_at_least(2, seq_len=seq_len, vocab_size=vocab_size)
    name = train_folder if split == 'train' else eval_folder
    folder = located('mds_tokens', path, remote, (train_folder, eval_folder), META)
    size = vocabulary(vocab_size, Meta.read(folder), folder)
    place = None if remote is None else f'{remote.rstrip("/")}/{name}'
    shards = Shards(folder / name, place, {'column': (column, _TOKENS)})
    rows = chosen(shards.num_samples, split, limit, eval_samples)
    by_shard = shuffle == 'shards' and split == 'train'
    return MdsTokens(shards, rows, size, seq_len, column=column, dtype=dtype, by_shard=by_shard)
