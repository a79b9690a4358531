"""Text as bytes or as byte-level BPE tokens, trained on the text (Sennrich et al. 2016, arXiv 1508.07909; byte level as in GPT-2)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from composer_effalgos.datasets.images import data_folder
from composer_effalgos.datasets.sequences import TokenSequences, cut
from composer_effalgos.datasets.tokens import META, Meta, tokens, write_tokens
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import whole_file
from composer_effalgos.utils.text import one_line

END = '<|endoftext|>'  # as in GPT-2, but token 0; follows each document
TOKENIZER = 'tokenizer.json'
LEAST_VOCABULARY = 257  # 256 bytes and END
_FORMAT = 'bpe 1'

Coding = Literal['bytes', 'bpe']


def text_sequences(
    documents: Mapping[str, Sequence[bytes]],
    source: str,
    split: Literal['train', 'eval'],
    *,
    tokenizer: Coding,
    vocab_size: int | None,
    seq_len: int,
    limit: int | None,
    eval_samples: int | None,
) -> TokenSequences:
    """Concatenate the documents of the splits ``'train'`` and ``'val'``, and cut them into sequences. The options are :func:`text_files`'.

    Raises:
        InputError: An option is out of range.
    """
    options = {'seq_len': seq_len, 'limit': limit, 'eval_samples': eval_samples}
    if tokenizer == 'bpe':
        return tokens(split, str(bpe_tokens(documents, 1024 if vocab_size is None else vocab_size, source)), **options)  # type: ignore[arg-type]
    if vocab_size not in (None, 256):
        raise InputError(f'dataset.vocab_size: expected null or 256 with tokenizer bytes, got {vocab_size}; set dataset.tokenizer=bpe')
    content = np.frombuffer(b''.join(documents['train' if split == 'train' else 'val']), np.uint8)
    return cut(content, 256, split, source=source, **options)  # type: ignore[arg-type]


def text_files(
    split: Literal['train', 'eval'],
    path: str | None,
    *,
    tokenizer: Coding = 'bytes',
    vocab_size: int | None = None,
    seq_len: int = 128,
    limit: int | None = None,
    eval_samples: int | None = None,
) -> TokenSequences:
    """All files in ``path/train`` and ``path/val`` (any name, recursively), sorted by path; each file is a UTF-8 document.

    Args:
        split: ``'train'`` or ``'eval'`` (``val``).
        path: The folder that holds ``train`` and ``val``.
        tokenizer: ``'bytes'``, or ``'bpe'``: byte-pair encoding trained on the training split and cached in
            ``~/.cache/composer_effalgos``.
        vocab_size: Vocabulary size for ``'bpe'``, 257 to 65,536; null for 1,024.
        seq_len: Sequence length in tokens.
        limit: Train on a random subset of this many sequences, which is the same in every run.
        eval_samples: Evaluate on a random subset of at most this many, likewise; null for all.

    Raises:
        InputError: A folder is missing, a file cannot be read, or the text is shorter than a sequence.
    """
    folder = data_folder('text_files', path, 'text files in train/ and val/')
    documents = {}
    for name in ('train', 'val'):
        files = sorted(file for file in (folder / name).rglob('*') if file.is_file())
        if not files:
            raise InputError(f'{folder / name}: no files; expected text files')
        try:
            documents[name] = [file.read_bytes() for file in files]
        except OSError as error:
            raise InputError(f'{folder / name}: cannot be read ({one_line(error)})') from error
    options = {'seq_len': seq_len, 'limit': limit, 'eval_samples': eval_samples}
    return text_sequences(documents, 'text_files', split, tokenizer=tokenizer, vocab_size=vocab_size, **options)  # type: ignore[arg-type]


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/composer_effalgos``, or ``~/.cache/composer_effalgos``."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'composer_effalgos'


def bpe_tokens(documents: Mapping[str, Sequence[bytes]], vocab_size: int, source: str) -> Path:
    """Train a BPE tokenizer on the training split and encode both splits with it; the result is cached.

    Args:
        documents: Documents of the splits ``'train'`` and ``'val'``.
        vocab_size: Vocabulary size, 257 to 65,536.
        source: Name of the text, for ``meta.json``.

    Returns:
        A folder in :func:`cache_folder` that :func:`~composer_effalgos.datasets.tokens.tokens` reads; it also holds ``tokenizer.json``. The
        same documents and vocabulary size give the same tokens.

    Raises:
        InputError: ``vocab_size`` is out of range, ``tokenizers`` is not installed, or the folder cannot be written.
    """
    if not LEAST_VOCABULARY <= vocab_size <= 2**16:
        raise InputError(f'dataset.vocab_size: expected {LEAST_VOCABULARY} to {2**16} with tokenizer bpe, got {vocab_size}')
    try:
        import tokenizers
    except ImportError as error:
        raise InputError("dataset.tokenizer: bpe needs tokenizers; pip install 'composer-effalgos[text]'") from error
    digest = hashlib.sha256(f'{_FORMAT} {vocab_size} {tokenizers.__version__}'.encode())
    for split in ('train', 'val'):
        digest.update(split.encode())
        for document in documents[split]:
            digest.update(len(document).to_bytes(8, 'little') + document)
    folder = cache_folder() / f'{source}-{vocab_size}-{digest.hexdigest()[:16]}'
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{folder}.lock'):
            if not (folder / META).is_file():
                with whole_file(folder, 'unfinished') as unfinished:
                    unfinished.mkdir()
                    _write(unfinished, documents, vocab_size, source)
    except OSError as error:
        raise InputError(f'{folder}: cannot be written ({one_line(error)}); set XDG_CACHE_HOME to a folder with room') from error
    return folder


def _write(folder: Path, documents: Mapping[str, Sequence[bytes]], vocab_size: int, source: str) -> None:
    tokenizer = train_tokenizer(documents['train'], vocab_size)
    tokenizer.save(str(folder / TOKENIZER))
    size = tokenizer.get_vocab_size()  # smaller than requested if the text is short
    counts = {split: write_tokens(folder / f'{split}.bin', encode(tokenizer, documents[split]), size) for split in ('train', 'val')}
    (folder / META).write_text(Meta(size, counts, source).text(), encoding='utf-8')


def train_tokenizer(documents: Sequence[bytes], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer.

    Args:
        documents: UTF-8; invalid bytes count as the replacement character.
        vocab_size: Maximum vocabulary size.

    Returns:
        A ``tokenizers.Tokenizer``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((characters(document) for document in documents), trainer)
    return tokenizer


def encode(tokenizer: Any, documents: Sequence[bytes]) -> Iterator[np.ndarray]:
    """Encode documents, each followed by the end-of-text token.

    Args:
        tokenizer: A tokenizer from :func:`train_tokenizer`.
        documents: UTF-8.

    Yields:
        int64 ``[M]`` for each document.
    """
    tokenizer.encode_special_tokens = True  # END in a document's text is plain text
    for document in documents:
        yield np.array([*tokenizer.encode(characters(document)).ids, tokenizer.token_to_id(END)], dtype=np.int64)


def characters(document: bytes) -> str:
    """Decode UTF-8, with the replacement character for invalid bytes."""
    return document.decode('utf-8', errors='replace')
