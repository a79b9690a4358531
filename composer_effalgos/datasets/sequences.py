"""Fixed-length token sequences for language models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from composer_effalgos.datasets.images import check_at_least, limited
from composer_effalgos.utils.errors import InputError


class TokenSequences(Dataset[dict[str, Tensor]]):
    """Token sequences; a sample is ``{'input_ids', 'labels'}``, int64 ``[T]``, with unshifted labels as Hugging Face models expect.

    Args:
        sequences: Integers ``[N, T]``; may be memory-mapped.
        num_classes: Vocabulary size.
        source: Where the tokens come from; starts the error message.
    """

    def __init__(self, sequences: np.ndarray, num_classes: int, source: str | Path = 'tokens') -> None:
        self.sequences, self.num_classes, self.source = sequences, num_classes, source
        self.seq_len = sequences.shape[1]

    def __len__(self) -> int:
        return len(self.sequences)

    def stored(self, index: int) -> np.ndarray:
        """A sequence, int64 ``[T]``.

        Raises:
            InputError: A token is outside the vocabulary.
        """
        tokens = self.sequences[index].astype(np.int64)
        check_vocabulary(tokens, self.num_classes, f'{self.source}: sequence {index}')
        return tokens

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.stored(index))
        return {'input_ids': tokens, 'labels': tokens}


def check_vocabulary(tokens: np.ndarray, num_classes: int, source: str) -> None:
    """Reject tokens for which the model has no embedding.

    Raises:
        InputError: A token is not in ``[0, num_classes)``.
    """
    wrong = tokens[(tokens < 0) | (tokens >= num_classes)]
    if len(wrong):
        raise InputError(
            f'{source}: expected tokens from 0 to {num_classes - 1}, got {wrong[0]}; set dataset.vocab_size and the type of a token as '
            'they were written'
        )


def check_width(tokens: np.ndarray, source: str) -> None:
    """Reject wider integers that were read with half their width: each would become a token followed by a zero.

    Args:
        tokens: Unsigned integers ``[M]``; the first 4,096 are looked at, and fewer than 64 are accepted.
        source: Prefix of the message.

    Raises:
        InputError: Every second token is 0, and not every other one.
    """
    first = tokens[:4096]
    if len(first) >= 64 and first[::2].any() and not first[1::2].any():
        raise InputError(f'{source}: every second token read as {tokens.dtype.name} is 0, so they are wider integers; set dataset.dtype')


def cut(
    tokens: np.ndarray,
    num_classes: int,
    split: str,
    *,
    seq_len: int,
    limit: int | None,
    eval_samples: int | None,
    source: str | Path = 'tokens',
) -> TokenSequences:
    """Cut a text into non-overlapping sequences; the remainder is dropped.

    Args:
        tokens: Concatenated documents, integers ``[M]``.
        num_classes: Vocabulary size.
        split: ``'train'`` or ``'eval'``.
        seq_len: Sequence length in tokens.
        limit: Train on a random subset of this many sequences, which is the same in every run.
        eval_samples: Evaluate on a random subset of at most this many, likewise; ``None`` for all.
        source: Where the text comes from, for messages.

    Raises:
        InputError: An option is out of range, or there are fewer than ``seq_len`` tokens.
    """
    check_at_least(2, seq_len=seq_len)
    count = len(tokens) // seq_len
    if count == 0:
        raise InputError(f'dataset.seq_len: expected at most {len(tokens)}, the tokens of the {split} split, got {seq_len}')
    sequences = tokens[: count * seq_len].reshape(count, seq_len)
    rows = chosen(count, split, limit, eval_samples)
    return TokenSequences(sequences if len(rows) == count else sequences[rows.numpy()], num_classes, source)


def chosen(count: int, split: str, limit: int | None, eval_samples: int | None) -> Tensor:
    """Indices of a split's samples, int64, ascending: ``limit`` for training, at most ``eval_samples`` for evaluation."""
    check_at_least(1, eval_samples=eval_samples)
    return limited(count, limit if split == 'train' else None if eval_samples is None else min(eval_samples, count))
