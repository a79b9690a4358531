"""Token sequences in MDS shards, as llm-foundry's data preparation writes them."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from composer_effalgos.datasets.images import check_at_least
from composer_effalgos.datasets.mds import Shards, located
from composer_effalgos.datasets.sequences import check_vocabulary, chosen
from composer_effalgos.datasets.tokens import META, Meta, vocabulary
from composer_effalgos.utils.errors import InputError

_TOKENS = ('bytes', 'ndarray')


class MdsTokens(Dataset[dict[str, Tensor]]):
    """Token sequences in MDS shards; a sample is ``{'input_ids', 'labels'}``, int64 ``[T]``, labels unshifted.

    Args:
        shards: The split's shards.
        rows: int64 ``[N]``, ascending: the samples that belong to the dataset.
        num_classes: Size of the vocabulary.
        seq_len: Tokens in a sequence; those of longer samples that come after are left out, null for the length of the first sample.
        column: Name of the column.
        dtype: Type of a token where the column holds bytes.
        by_shard: Whether the plan goes shard by shard.

    Attributes:
        shard_starts: First sample of each shard among ``rows``, int64 ``[S]``, where the plan goes shard by shard; else ``None``.

    Raises:
        InputError: The first sample is shorter than ``seq_len``.
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
                raise InputError(f'{self.shards.folder}: sample {row}: {len(tokens)} bytes are no {self.dtype.name}; set dataset.dtype')
            tokens = np.frombuffer(tokens, self.dtype)
        if tokens.ndim != 1 or tokens.dtype.kind not in 'iu':
            where = f'{self.shards.folder}: sample {row}'
            raise InputError(f'{where}: expected whole numbers in one dimension, got {list(tokens.shape)} of {tokens.dtype}')
        return tokens

    def stored(self, index: int) -> np.ndarray:
        """A sequence, int64 ``[T]``.

        Raises:
            InputError: It is too short, damaged, or has a token beyond the vocabulary.
        """
        row = int(self.rows[index])
        tokens = self._read(row)[: self.seq_len].astype(np.int64)
        if len(tokens) < self.seq_len:
            raise InputError(f'{self.shards.folder}: sample {row}: expected {self.seq_len} tokens, got {len(tokens)}; set dataset.seq_len')
        check_vocabulary(tokens, self.num_classes, f'{self.shards.folder}: sample {row}')
        return tokens

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.stored(index))
        return {'input_ids': tokens, 'labels': tokens}


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
    """Token sequences in MDS shards in ``path/train`` and ``path/val``, as llm-foundry and ``effalgos convert --to mds`` write them.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Folder on this machine that holds the splits, or what was fetched of them.
        seq_len: Tokens in a sequence, at most those of the shortest sample; null for those of the first sample.
        vocab_size: Tokens are below this. Null: as ``meta.json`` says, which ``effalgos convert`` writes.
        dtype: Type of a token where the column is of MDS's type ``bytes``: llm-foundry's ``token_encoding_type``.
        limit: Train on this many sequences, chosen at random, the same ones every time.
        eval_samples: Evaluate on at most this many, chosen likewise; null for all.
        shuffle: ``'shards'`` shuffles the shards, and the samples in each; ``'samples'`` all samples together.
        remote: A folder like ``path`` elsewhere, e.g. ``s3://bucket/data``: shards are fetched into ``path`` when they are first read, and
            stay there.
        train_folder: Name of the training split's folder.
        eval_folder: Name of the evaluation split's folder.
        column: Column of the tokens, of MDS's type ``bytes`` or ``ndarray``.

    Raises:
        InputError: Missing shards or column, shards cut off, sequences that are too short, no ``vocab_size``, a token beyond it.
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
