"""``effalgos convert``: write a dataset as ffcv ``.beton`` files, MDS shards or flat token files.

Conversion is lossless: encoded images are copied unchanged and decoded images are stored losslessly. Output is written under a temporary
name that starts with a dot and renamed when complete; the next attempt removes leftovers.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track

from composer_effalgos.datasets import DATASETS, build_dataset
from composer_effalgos.datasets.mds import LABELS
from composer_effalgos.datasets.mds_index import INDEX
from composer_effalgos.datasets.packed import DESCRIPTION, TRANSFORM_OPTIONS, Description
from composer_effalgos.datasets.registry import TEXT
from composer_effalgos.datasets.text import TOKENIZER
from composer_effalgos.datasets.tokens import META, Meta, write_tokens
from composer_effalgos.recipes.schema import load_recipe
from composer_effalgos.recipes.settings import merge_settings
from composer_effalgos.utils.digest import labels_digest
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import whole_file
from composer_effalgos.utils.text import did_you_mean, one_line

SPLITS = ('train', 'eval')


def convert(source: str, overrides: Sequence[str], to: str, out: Path, *, shard_bytes: int = 1 << 26, shuffle: int | None = None) -> str:
    """Convert both splits of a dataset.

    Args:
        source: A recipe file or the name of a dataset.
        overrides: ``key=value`` settings of the recipe, or options of the dataset.
        to: ``'ffcv'`` or ``'mds'`` for images, ``'mds'`` or ``'tokens'`` for text.
        out: Output folder. It must not yet contain the outputs ``train`` and ``eval`` (``val`` for text) in this format.
        shard_bytes: Maximum shard size in bytes, 1 to 2**32 - 1 (MDS offsets are 32-bit).
        shuffle: Seed for shuffling the training samples, so that each shard holds all classes; ``None`` keeps the order.

    Returns:
        A one-line description of what was written.

    Raises:
        InputError: A name is unknown, the data cannot be read, or the output exists or cannot be written.
    """
    if to not in {**FORMATS, **TEXT_FORMATS}:
        raise InputError(f'--to: expected a format, got {to!r}; {did_you_mean(to, {**FORMATS, **TEXT_FORMATS})}')
    name, settings = _source(source, overrides)
    formats: Mapping[str, tuple[Callable[..., None], str]] = TEXT_FORMATS if name in TEXT else FORMATS
    if to not in formats:
        raise InputError(f'--to: expected {" or ".join(formats)} for {name}, got {to}')
    write, ending = formats[to]
    targets = {split: out / f'{"val" if split == "eval" and name in TEXT else split}{ending}' for split in SPLITS}
    for target in targets.values():
        if target.exists():
            raise InputError(f'--out: expected none of its files to exist, got {target}; remove it or give another --out')
    if name in TEXT:
        return _convert_text(source, name, settings, to, targets, shard_bytes, shuffle)
    datasets = {split: build_dataset(name, split, **settings) for split in SPLITS}  # type: ignore[arg-type]
    if not hasattr(datasets['train'], 'stored'):
        raise InputError(f'{source}: {name} holds no images to convert')
    orders: dict[str, np.ndarray] = {split: np.arange(len(dataset)) for split, dataset in datasets.items()}  # type: ignore[arg-type]
    if shuffle is not None:
        orders['train'] = np.random.default_rng(shuffle).permutation(orders['train'])
    labels = {split: torch.as_tensor(datasets[split].targets)[torch.from_numpy(orders[split])] for split in SPLITS}  # type: ignore[attr-defined]
    described = Description.read(Path(settings['path'])) if name in ('beton', 'mds') else None
    description = Description(
        like=name if described is None else described.like,
        classes=[str(label) for label in datasets['train'].classes],  # type: ignore[attr-defined]
        labels={split: labels_digest(labels[split]) for split in SPLITS},
        options=({} if described is None else described.options)
        | {key: settings[key] for key in TRANSFORM_OPTIONS if settings.get(key) is not None},
    )
    if Description.read(out) not in (None, description):
        raise InputError(f'{out / DESCRIPTION} describes other data, or another order of them; give another --out')
    try:
        out.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            samples = Samples(datasets[split], orders[split], labels[split].tolist(), split)
            with whole_file(targets[split], 'unfinished') as unfinished:
                write(unfinished, samples, shard_bytes)
        with whole_file(out / DESCRIPTION, 'unfinished') as unfinished:
            unfinished.write_text(description.text(), encoding='utf-8')
    except OSError as error:
        raise InputError(f'{error.filename or out}: {error.strerror or one_line(error)}; nothing unfinished was kept') from error
    return f'{out}: {len(orders["train"])} training and {len(orders["eval"])} evaluation samples of {source} as {to}'


def _convert_text(
    source: str, name: str, settings: dict[str, Any], to: str, targets: Mapping[str, Path], shard_bytes: int, shuffle: int | None
) -> str:
    """Write both splits of a text dataset, ``meta.json``, and ``tokenizer.json`` if the source has one."""
    datasets: dict[str, Any] = {split: build_dataset(name, split, **settings) for split in SPLITS}  # type: ignore[arg-type]
    orders: dict[str, np.ndarray] = {split: np.arange(len(dataset)) for split, dataset in datasets.items()}
    if shuffle is not None:
        orders['train'] = np.random.default_rng(shuffle).permutation(orders['train'])
    vocab_size, out = datasets['train'].num_classes, targets['train'].parent
    counts = {target.stem: len(datasets[split]) * datasets[split].seq_len for split, target in targets.items()}
    meta = Meta(vocab_size, counts, name)
    if Meta.read(out) not in (None, meta):
        raise InputError(f'{out / META} describes other data; give another --out')
    read_from = getattr(datasets['train'], 'source', None)
    tokenizer = read_from.with_name(TOKENIZER) if isinstance(read_from, Path) else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        for split, target in targets.items():
            sequences: Iterable[np.ndarray] = map(datasets[split].stored, orders[split].tolist())
            if sys.stdout.isatty():
                sequences = track(sequences, split, total=len(orders[split]), transient=True)
            with whole_file(target, 'unfinished') as unfinished:
                TEXT_FORMATS[to][0](unfinished, sequences, vocab_size, shard_bytes)
        with whole_file(out / META, 'unfinished') as unfinished:
            unfinished.write_text(meta.text(), encoding='utf-8')
        if tokenizer is not None and tokenizer.is_file():
            with whole_file(out / TOKENIZER, 'unfinished') as unfinished:
                shutil.copyfile(tokenizer, unfinished)
    except OSError as error:
        raise InputError(f'{error.filename or out}: {error.strerror or one_line(error)}; nothing unfinished was kept') from error
    total = sum(counts.values())
    return f'{out}: {len(orders["train"])} training and {len(orders["eval"])} evaluation sequences of {source} as {to}, {total} tokens'


def _source(source: str, overrides: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The dataset's name and build options."""
    if source.endswith(('.yaml', '.yml')):
        data = load_recipe(source, overrides).dataset
        return data.name, {'path': data.path, **data.options}
    if source not in DATASETS:
        raise InputError(f'SOURCE: expected a recipe (*.yaml) or the name of a dataset, got {source!r}; {did_you_mean(source, DATASETS)}')
    for override in overrides:
        if '=' not in override:
            raise InputError(f'override {override!r}: expected key=value, an option of {source} such as path=data')
    settings = merge_settings(source, {}, overrides, example='path=data')
    for key in ('name', 'split'):
        if key in settings:
            raise InputError(f'override {key!r}: both splits of {source} are converted; expected an option of {source} such as path=data')
    return source, {str(key): value for key, value in settings.items()}


class Samples:
    """The stored images and labels of a split, in the order in which they are written.

    Args:
        dataset: A dataset with a ``stored(index)`` method.
        order: Sample indices, int64 ``[N]``.
        labels: Labels in this order.
        split: Name for the progress bar.
    """

    def __init__(self, dataset: Any, order: np.ndarray, labels: Sequence[int], split: str) -> None:
        self.dataset, self.order, self.labels, self.split = dataset, order, labels, split

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[bytes | np.ndarray, int]]:
        pairs: Iterable[tuple[int, int]] = zip(self.order.tolist(), self.labels, strict=True)
        if sys.stdout.isatty():
            pairs = track(pairs, self.split, total=len(self), transient=True)
        for index, label in pairs:
            yield self.dataset.stored(index), label


def write_mds(folder: Path, samples: Samples, shard_bytes: int = 1 << 26) -> None:
    """Write MDS shards with the columns ``image`` (encoded bytes; decoded images become PNG) and ``label``.

    Args:
        folder: A new folder.
        samples: Samples to write.
        shard_bytes: Maximum shard size in bytes.

    Raises:
        InputError: mosaicml-streaming is not installed.
        OSError: The disk is full or not writable.
    """
    writer = _mds_writer(folder, {'image': 'bytes', 'label': 'int'}, shard_bytes)
    try:
        for image, label in samples:
            writer.write({'image': image if isinstance(image, bytes) else _as_png(image), 'label': label})
        writer.finish()
    finally:
        writer.executor.shutdown()
    np.save(folder / LABELS, np.array(samples.labels, dtype=np.int64))
    assert (folder / INDEX).exists()


def write_mds_tokens(folder: Path, sequences: Iterable[np.ndarray], vocab_size: int, shard_bytes: int) -> None:
    """Write MDS shards with the column ``tokens`` (int32), one sequence per sample, as llm-foundry does.

    Args:
        folder: A new folder.
        sequences: Sequences of int64 ``[T]``.
        vocab_size: Unused; part of the signature of a text format.
        shard_bytes: Maximum shard size in bytes.

    Raises:
        InputError: mosaicml-streaming is not installed.
        OSError: The disk is full or not writable.
    """
    writer = _mds_writer(folder, {'tokens': 'ndarray:int32'}, shard_bytes)
    try:
        for sequence in sequences:
            writer.write({'tokens': sequence.astype(np.int32)})
        writer.finish()
    finally:
        writer.executor.shutdown()


def _write_flat(file: Path, sequences: Iterable[np.ndarray], vocab_size: int, shard_bytes: int) -> None:
    write_tokens(file, sequences, vocab_size)


def _mds_writer(folder: Path, columns: dict[str, str], shard_bytes: int) -> Any:
    try:
        from streaming import MDSWriter
    except ImportError as error:
        raise InputError('--to mds needs mosaicml-streaming; `make setup` installs it') from error
    return MDSWriter(out=str(folder), columns=columns, size_limit=shard_bytes)


def _as_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'PNG')
    return buffer.getvalue()


def write_beton(file: Path, samples: Samples, shard_bytes: int = 0) -> None:
    """Write an ffcv file with the fields ``image`` and ``label``: JPEG files unchanged, all other images as pixels.

    ffcv's own writer uses worker processes and hangs if a full disk stops one of them. This does the same work with ffcv's components in
    the calling process.

    Args:
        file: A new file.
        samples: Samples to write.
        shard_bytes: Unused; part of the signature of an image format.

    Raises:
        InputError: ffcv is not installed, or an image is broken or too large for a page of the file.
        OSError: The disk is full or not writable.
    """
    from composer_effalgos.datasets.beton import check_beton, ffcv_field, import_ffcv

    import_ffcv('--to ffcv')
    from ffcv.fields import IntField, RGBImageField
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.writer import DatasetWriter, handle_sample

    writer = DatasetWriter(str(file), {'image': RGBImageField(), 'label': IntField()}, num_workers=1)
    fields = {'image': ffcv_field(), 'label': IntField()}
    writer.num_samples = len(samples)
    writer.prepare()
    try:
        metadata = np.zeros(len(samples), dtype=writer.metadata_type)
        allocator = MemoryAllocator(str(file), writer.data_region_start, writer.page_size)
        with allocator:
            for number, sample in enumerate(samples):
                try:
                    handle_sample(sample, number, metadata.dtype.names, metadata, allocator, fields)
                except ValueError as error:
                    raise InputError(f'{samples.split}: sample {samples.order[number]}: {one_line(error)}') from error
        writer.metadata_sm.buf[: metadata.nbytes] = metadata.tobytes()
        writer.finalize([allocator.allocations])
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    with file.open('rb') as written:
        os.fsync(written.fileno())
    try:
        check_beton(file)
    except InputError as error:  # on a full disk, an unbuffered write may be truncated without raising
        raise OSError(f'{file}: not written in full, the disk may be full') from error


FORMATS: Mapping[str, tuple[Callable[[Path, Samples, int], None], str]] = {'ffcv': (write_beton, '.beton'), 'mds': (write_mds, '')}
TEXT_FORMATS: Mapping[str, tuple[Callable[[Path, Iterable[np.ndarray], int, int], None], str]] = {
    'mds': (write_mds_tokens, ''),
    'tokens': (_write_flat, '.bin'),
}
