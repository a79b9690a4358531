"""``effalgos convert``: write a dataset as ffcv ``.beton`` files, MDS shards or flat token files.

Conversion is lossless: encoded images are copied unchanged and decoded images are stored losslessly. Output is written under a temporary
name that starts with a dot and renamed when complete; the next attempt removes leftovers.
"""

from __future__ import annotations

import functools
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
from torch import Tensor

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
    formats = TEXT_FORMATS if name in TEXT else FORMATS
    if to not in formats:
        raise InputError(f'--to: expected {" or ".join(formats)} for {name}, got {to}')
    write, ending = formats[to]
    targets = {split: out / f'{"val" if split == "eval" and name in TEXT else split}{ending}' for split in SPLITS}
    for target in targets.values():
        if target.exists():
            raise InputError(f'--out: expected none of its files to exist, got {target}; remove it or give another --out')
    samples = {
        split: Samples(build_dataset(name, split, **settings), split, shuffle if split == 'train' else None)  # type: ignore[arg-type]
        for split in SPLITS
    }
    train = samples['train'].dataset
    if name not in TEXT and not hasattr(train, 'stored'):
        raise InputError(f'{source}: {name} holds no images to convert')
    unit, total, tokenizer = 'samples', '', None
    record: Meta | Description
    if name in TEXT:
        counts = {target.stem: len(samples[split]) * samples[split].dataset.seq_len for split, target in targets.items()}
        file, record, other = out / META, Meta(train.num_classes, counts, name), 'other data'
        unit, total = 'sequences', f', {sum(counts.values())} tokens'
        read_from = getattr(train, 'source', None)
        tokenizer = read_from.with_name(TOKENIZER) if isinstance(read_from, Path) else None
    else:
        file, record, other = out / DESCRIPTION, _described(name, settings, samples), 'other data, or another order of them'
    if type(record).read(out) not in (None, record):
        raise InputError(f'{file} describes {other}; give another --out')
    try:
        out.mkdir(parents=True, exist_ok=True)
        for split, target in targets.items():
            with whole_file(target, 'unfinished') as unfinished:
                write(unfinished, samples[split], shard_bytes)
        with whole_file(file, 'unfinished') as unfinished:
            unfinished.write_text(record.text(), encoding='utf-8')
        if tokenizer is not None and tokenizer.is_file():
            with whole_file(out / TOKENIZER, 'unfinished') as unfinished:
                shutil.copyfile(tokenizer, unfinished)
    except OSError as error:
        raise InputError(f'{error.filename or out}: {error.strerror or one_line(error)}; nothing unfinished was kept') from error
    return f'{out}: {len(samples["train"])} training and {len(samples["eval"])} evaluation {unit} of {source} as {to}{total}'


def _described(name: str, settings: dict[str, Any], samples: Mapping[str, Samples]) -> Description:
    """The description of converted images; that of converted data is kept."""
    before = Description.read(Path(settings['path'])) if name in ('beton', 'mds') else None
    return Description(
        like=name if before is None else before.like,
        classes=[str(label) for label in samples['train'].dataset.classes],
        labels={split: labels_digest(samples[split].labels) for split in SPLITS},
        options=({} if before is None else before.options)
        | {key: settings[key] for key in TRANSFORM_OPTIONS if settings.get(key) is not None},
    )


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
    """The stored images or token sequences of a split, in the order in which they are written.

    Args:
        dataset: A dataset with a ``stored(index)`` method.
        split: Name for the progress bar.
        shuffle: Seed of the order; ``None`` keeps that of the dataset.
    """

    def __init__(self, dataset: Any, split: str, shuffle: int | None = None) -> None:
        self.dataset, self.split = dataset, split
        self.order: np.ndarray = np.arange(len(dataset))
        if shuffle is not None:
            self.order = np.random.default_rng(shuffle).permutation(self.order)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Any]:
        indices: Iterable[int] = self.order.tolist()
        if sys.stdout.isatty():
            indices = track(indices, self.split, total=len(self), transient=True)
        return map(self.dataset.stored, indices)

    @functools.cached_property
    def labels(self) -> Tensor:
        """The labels of images in this order, int64 ``[N]``."""
        return torch.as_tensor(self.dataset.targets)[torch.from_numpy(self.order)]


def write_mds(folder: Path, samples: Samples, shard_bytes: int) -> None:
    """Write MDS shards with the columns ``image`` (encoded bytes; decoded images become PNG) and ``label``.

    Raises:
        InputError: mosaicml-streaming is not installed.
        OSError: The disk is full or not writable.
    """
    writer = _mds_writer(folder, {'image': 'bytes', 'label': 'int'}, shard_bytes)
    try:
        for image, label in zip(samples, samples.labels.tolist(), strict=True):
            writer.write({'image': image if isinstance(image, bytes) else _as_png(image), 'label': label})
        writer.finish()
    finally:
        writer.executor.shutdown()
    np.save(folder / LABELS, samples.labels.numpy().astype(np.int64))
    assert (folder / INDEX).exists()


def write_mds_tokens(folder: Path, samples: Samples, shard_bytes: int) -> None:
    """Write MDS shards with the column ``tokens`` (int32), one sequence per sample, as llm-foundry does.

    Raises:
        InputError: mosaicml-streaming is not installed.
        OSError: The disk is full or not writable.
    """
    writer = _mds_writer(folder, {'tokens': 'ndarray:int32'}, shard_bytes)
    try:
        for sequence in samples:
            writer.write({'tokens': sequence.astype(np.int32)})
        writer.finish()
    finally:
        writer.executor.shutdown()


def _write_flat(file: Path, samples: Samples, shard_bytes: int) -> None:
    write_tokens(file, samples, samples.dataset.num_classes)


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


def write_beton(file: Path, samples: Samples, shard_bytes: int) -> None:
    """Write an ffcv file with the fields ``image`` and ``label``: JPEG files unchanged, all other images as pixels.

    ffcv's own writer uses worker processes and hangs if a full disk stops one of them. This does the same work with ffcv's components in
    the calling process.

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
            for number, sample in enumerate(zip(samples, samples.labels.tolist(), strict=True)):
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


Formats = Mapping[str, tuple[Callable[[Path, Samples, int], None], str]]
"""Writers ``(new file or folder, samples, maximum shard size in bytes)``, and the ending of the name."""
FORMATS: Formats = {'ffcv': (write_beton, '.beton'), 'mds': (write_mds, '')}
TEXT_FORMATS: Formats = {'mds': (write_mds_tokens, ''), 'tokens': (_write_flat, '.bin')}
