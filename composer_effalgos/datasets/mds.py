"""MDS shards of mosaicml-streaming, on this machine or in a remote folder, as a map-style dataset."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from composer_effalgos.datasets.images import MOST_SIDE, StoredImages, check_at_least, check_pixels, data_folder, limited
from composer_effalgos.datasets.mds_index import COMPRESSIONS, INDEX, check_index
from composer_effalgos.datasets.packed import DESCRIPTION, Description, class_names, pipeline
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_bytes
from composer_effalgos.utils.text import one_line, shown

LABELS = 'labels.npy'
_IMAGES = ('bytes', 'jpeg', 'png', 'pil', 'ndarray')
_LABELS = ('int', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64', 'str_int')


class Shards:
    """The shards of one split, read at random; those that are missing are fetched when a sample of theirs is read.

    Args:
        folder: The split's folder on this machine.
        remote: Its place in a remote folder, of any kind that mosaicml-streaming knows; ``None`` where all shards must be here.
        columns: The columns to read, by the option that names them, each with MDS's types that it may be of.

    Attributes:
        starts: First sample of each shard, int64 ``[S]``.
        num_samples: Samples in all shards.

    Raises:
        InputError: No index, a broken one, one that is not the remote folder's or that lacks the columns.
    """

    def __init__(self, folder: Path, remote: str | None, columns: Mapping[str, tuple[str, Sequence[str]]]) -> None:
        try:
            from streaming.base.format import reader_from_json
        except ImportError as error:
            raise InputError('dataset.name: mds needs mosaicml-streaming; `make setup` installs it') from error
        self.folder, self.remote = folder, remote
        file = folder / INDEX
        fetch(remote, folder, INDEX)
        entries = check_index(folder)
        try:
            self.shards: list[Any] = [reader_from_json(str(folder), '', entry) for entry in entries]
            for shard in self.shards:
                shard.validate(allow_unsafe_types=False)
                if len({len(shard.column_names), len(shard.column_encodings), len(shard.column_sizes)}) > 1 or not all(
                    size is None or (type(size) is int and 0 <= size < 2**32) for size in shard.column_sizes
                ):
                    raise ValueError('its columns have not one name, type and size each')
                if 4 * (shard.samples + 2) > shard.raw_data.bytes:
                    raise ValueError(f'{shard.samples} samples in {shard.raw_data.bytes} bytes')
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise InputError(
                f'{file}: not an index of MDS shards ({one_line(error)[:200]}); effalgos convert or MDSWriter writes one'
            ) from error
        self._pil = [self._choose(shard, columns) for shard in self.shards]
        sizes = np.array([shard.samples for shard in self.shards], dtype=np.int64)
        if not sizes.sum():
            raise InputError(f'{file}: has no samples; expected at least one')
        self.num_samples = int(sizes.sum())
        self.starts = torch.from_numpy(np.cumsum(sizes) - sizes)
        self._starts = self.starts.tolist()
        self._here = [False] * len(sizes)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """A sample's columns.

        Raises:
            InputError: Its shard is missing, cut off or damaged, or cannot be fetched.
        """
        shard = bisect_right(self._starts, row) - 1
        if not self._here[shard]:
            self._ensure(shard)
            self._here[shard] = True
        place = row - self._starts[shard]
        try:
            with np.errstate(over='ignore'):  # offsets of damaged shards
                sample = self.shards[shard].get_item(place)
            if (column := self._pil[shard]) is not None:
                sample[column] = _decode_pil(sample[column])
        except Exception as error:  # what damaged bytes lead to depends on the columns
            reason = one_line(error)[:200]
            raise InputError(f'{self._file(shard)}: sample {place} cannot be read ({reason}); the shard is damaged') from error
        return sample

    def _choose(self, shard: Any, columns: Mapping[str, tuple[str, Sequence[str]]]) -> str | None:
        """Has no column decoded but those of numbers and arrays; gives that of MDS's type ``pil``.

        The type ``jpeg`` would open any image that Pillow knows; all others are of no use here.
        """
        encodings = dict(zip(shard.column_names, shard.column_encodings, strict=True))
        kept, pil = set(), None
        for key, (column, known) in columns.items():
            if column not in encodings:
                raise InputError(
                    f'dataset.{key}: expected a column of {self.folder}, got {column!r}; it has {", ".join(sorted(encodings))[:200]}'
                )
            kind = encodings[column].partition(':')[0]
            if kind not in known:
                wanted = ', '.join(known)
                raise InputError(f'dataset.{key}: expected a column of type {wanted}, got {column!r} of type {shown(encodings[column])}')
            if kind in ('ndarray', *_LABELS):
                kept.add(column)
            pil = column if kind == 'pil' else pil
        shard.column_encodings = [encoding if column in kept else 'bytes' for column, encoding in encodings.items()]
        return pil

    def _file(self, shard: int) -> Path:
        return self.folder / self.shards[shard].raw_data.basename

    def _ensure(self, shard: int) -> None:
        """Sees that a shard is here in full, from the remote folder or from its compressed form."""
        reader, file = self.shards[shard], self._file(shard)
        packed, wanted = reader.zip_data, reader.raw_data.bytes
        if _size(file) == wanted:
            return
        source = file if packed is None else self.folder / packed.basename
        if self.remote is not None:
            fetch(self.remote, self.folder, str(source.relative_to(self.folder)), size=wanted if packed is None else packed.bytes)
        elif packed is None or not source.is_file():
            have = _size(file)
            raise InputError(
                f'{file}: no such shard, and no dataset.remote to fetch it from'
                if have is None
                else f'{file}: {have} bytes, its index says {wanted}: cut off, or of another data set; write the shards again'
            )
        if packed is not None:
            with _room(self.folder, str(file.relative_to(self.folder))) as came:
                try:
                    _decompress(source, reader.compression, came, wanted)
                except Exception as error:  # what damaged bytes lead to is not specified
                    raise InputError(f'{source}: cannot be decompressed ({one_line(error)[:200]}); the shard is damaged') from error
                came.replace(file)


def _decode_pil(data: bytes) -> np.ndarray:
    """MDS's type ``pil``: width, height and length of the mode's name, uint32 each, the name, and the pixels."""
    width, height, length = np.frombuffer(data[:12], '<u4').tolist()
    check_pixels(width, height, 'image')  # Pillow makes room before it compares
    image = Image.frombytes(data[12 : 12 + length].decode(), (width, height), data[12 + length :])
    return np.asarray(image.convert('RGB'))


def _decompress(source: Path, compression: str, target: Path, size: int) -> None:
    """Decompresses piece by piece: a small file can hold a very large one.

    Raises:
        ValueError: It does not hold ``size`` bytes.
        OSError: It is damaged.
    """
    codec = COMPRESSIONS[compression.partition(':')[0]]
    if codec == 'snappy':  # which Arrow decompresses whole, into this many bytes
        target.write_bytes(pa.decompress(read_bytes(source, size + size // 6 + 32), size, codec, asbytes=True))
    else:
        with target.open('wb') as out, pa.input_stream(str(source), compression=codec) as stream:
            while out.tell() <= size and (block := stream.read(2**20)):
                out.write(block)
    if (have := target.stat().st_size) != size:
        raise ValueError(f'{have} bytes or more, its index says {size}')


def _size(file: Path) -> int | None:
    """Bytes of a file; ``None`` where there is none."""
    return file.stat().st_size if file.is_file() else None


@contextmanager
def _room(folder: Path, name: str) -> Iterator[Path]:
    """A place for a file that is on its way into ``folder``, for one process at a time; what a killed process left there is removed."""
    place = folder / '.fetching'
    came, lock = place / name, place / f'{name}.lock'
    for path in (came, lock):
        if os.path.realpath(path) != str(Path(os.path.realpath(folder)) / path.relative_to(folder)):
            raise InputError(f'{path}: expected a file of its own, got a symbolic link or a path through one; remove it')
    try:
        came.parent.mkdir(parents=True, exist_ok=True)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            came.unlink(missing_ok=True)
            try:
                yield came
            finally:
                came.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f'{folder / name}: cannot be written ({one_line(error)[:200]})') from error


def fetch(remote: str | None, folder: Path, name: str, *, size: int | None = None, optional: bool = False) -> None:
    """Bring a file of a remote folder here; several processes may want it at once.

    A shard, whose size is known, is fetched once. What describes the data is fetched again, to find out that the folder holds other data.

    Args:
        remote: The remote folder; ``None`` does nothing.
        folder: Where the file goes.
        name: Name of the file.
        size: Its size, in bytes, where that is known.
        optional: Not an error where the remote folder does not have the file.

    Raises:
        InputError: It cannot be fetched, has another size, or differs from the file that is here.
    """
    if remote is None:
        return
    from streaming.base.storage import CloudDownloader

    target = folder / name
    with _room(folder, name) as came:
        if size is not None and _size(target) == size:  # another process fetched it meanwhile
            return
        try:
            CloudDownloader.direct_download(f'{remote}/{name}', str(came))
        except Exception as error:  # every kind of storage has its own
            if optional:
                return
            raise InputError(f'dataset.remote: {remote}/{name} cannot be fetched ({type(error).__name__}: {one_line(error)})') from error
        if size is not None and _size(came) != size:
            raise InputError(f'{remote}/{name}: {_size(came)} bytes, its index says {size}: the remote shard is cut off')
        if target.exists() and not target.is_file():
            raise InputError(f'{target}: expected a regular file or none; remove it')
        if size is None and target.exists() and target.read_bytes() != came.read_bytes():
            raise InputError(f'{target}: differs from {remote}/{name}: the folder holds other data; give an empty one as dataset.path')
        came.replace(target)


class MdsImages(StoredImages):
    """Images in MDS shards, decoded when they are read.

    Args:
        shards: The split's shards.
        rows: int64 ``[N]``, ascending: the samples that belong to the dataset.
        targets: int64 ``[N]``, their labels.
        classes: Class names.
        transform: PIL image to float32 ``[3, H, W]``.
        image_column: Column of the images: encoded, or of one of MDS's image types.
        by_shard: Whether the plan goes shard by shard.

    Attributes:
        shard_starts: First sample of each shard among ``rows``, int64 ``[S]``, where the plan goes shard by shard; else ``None``.
    """

    def __init__(
        self,
        shards: Shards,
        rows: Tensor,
        targets: Tensor,
        classes: list[str],
        transform: Callable[[Image.Image], Tensor],
        *,
        image_column: str = 'image',
        by_shard: bool = False,
    ) -> None:
        super().__init__(shards.folder, rows, targets, classes, transform)
        self.shards = shards
        self.image_column = image_column
        self.shard_starts = torch.searchsorted(rows, shards.starts) if by_shard else None

    def stored(self, index: int) -> bytes | np.ndarray:
        """An image as it is held: an encoded file's bytes, or uint8 ``[H, W, 3]`` where the shards hold decoded images."""
        image = self.shards[int(self.rows[index])][self.image_column]
        if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0):
            where = f'{self.file}: sample {int(self.rows[index])}'
            raise InputError(f'{where}: expected an array [height, width, 3] of uint8, got {list(image.shape)} of {image.dtype}')
        return image


def located(kind: str, path: str | None, remote: str | None, names: Sequence[str], description: str) -> Path:
    """The folder of the splits; one with a remote place may be empty yet, and gets the description of what is there.

    Args:
        kind: Name of the dataset, for messages.
        path: The folder on this machine.
        remote: Its place elsewhere, if any.
        names: The splits' folders in it.
        description: Name of the file that describes the data; there may be none.

    Raises:
        InputError: There is no such folder, and no remote one.
    """
    if path is None or remote is None:
        return data_folder(kind, path, f'MDS shards in {" and ".join(f"{name}/" for name in names)}')
    folder = Path(path).expanduser()
    fetch(remote.rstrip('/'), folder, description, optional=True)
    return folder


def mds(
    split: Literal['train', 'eval'],
    path: str | None,
    *,
    augment: bool = True,
    image_size: int | None = None,
    limit: int | None = None,
    shuffle: Literal['samples', 'shards'] = 'samples',
    remote: str | None = None,
    eval_folder: str = 'eval',
    image_column: str = 'image',
    label_column: str = 'label',
) -> MdsImages:
    """Images in MDS shards in ``path/train`` and ``path/eval``.

    ``effalgos convert`` writes them, with ``dataset.json`` and the labels beside them. Shards that other tools wrote will do as well; their
    labels are then read from the shards at the start, and they go through ImageNet's pipeline.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Folder on this machine that holds the splits, or what was fetched of them.
        augment: As for the dataset that was converted.
        image_size: Height and width wanted, in pixels; null for that of the dataset that was converted.
        limit: Train on this many images, chosen at random, the same ones every time.
        shuffle: ``'shards'`` shuffles the shards, and the samples in each: a pass then reads one shard after the other. ``'samples'``
            shuffles all samples together.
        remote: A folder like ``path`` elsewhere, e.g. ``s3://bucket/data``: shards are fetched into ``path`` when they are first read, and
            stay there.
        eval_folder: Name of the evaluation split's folder.
        image_column: Column of the images: encoded files' bytes, or one of MDS's image types.
        label_column: Column of the labels: integers from 0.

    Raises:
        InputError: Missing shards or columns, shards cut off, data that differ from ``dataset.json`` or from ``remote``.
    """
    check_at_least(1, most=MOST_SIDE, image_size=image_size)
    name = 'train' if split == 'train' else eval_folder
    folder = located('mds', path, remote, ('train', eval_folder), DESCRIPTION)
    place = None if remote is None else f'{remote.rstrip("/")}/{name}'
    shards = Shards(folder / name, place, {'image_column': (image_column, _IMAGES), 'label_column': (label_column, _LABELS)})
    description = Description.read(folder)
    targets = _labels(shards, description is not None, label_column)
    source = shards.folder if description is None else shards.folder / LABELS
    classes = class_names(description, split, targets, source)
    rows = limited(len(targets), limit if split == 'train' else None)
    transform = pipeline(description, split, augment=augment, image_size=image_size)
    by_shard = shuffle == 'shards' and split == 'train'
    return MdsImages(shards, rows, targets[rows], classes, transform, image_column=image_column, by_shard=by_shard)


def _labels(shards: Shards, described: bool, column: str) -> Tensor:
    """The labels beside the shards where ``effalgos convert`` wrote them, or else in them."""
    file = shards.folder / LABELS
    if not described:
        if file.exists():
            raise InputError(
                f'{shards.folder.parent / DESCRIPTION}: missing, and {file} is there; expected what effalgos convert wrote as a whole'
            )
        found = [int(shards[row][column]) for row in range(shards.num_samples)]
        if not all(-(2**63) <= label < 2**63 for label in found):
            raise InputError(f'{shards.folder}: column {column!r}: expected class indices, got a number of more than 64 bits')
        return torch.tensor(found)
    fetch(shards.remote, shards.folder, LABELS)
    try:
        if not file.is_file():
            raise ValueError('no such file')
        found = np.load(file, mmap_mode='r', allow_pickle=False)  # which compares what the header claims with the file's size
        if not isinstance(found, np.ndarray) or found.dtype != np.int64 or found.ndim != 1:
            raise ValueError('expected int64 in one dimension')
        targets = torch.from_numpy(np.array(found))
    except Exception as error:  # what a damaged header leads to is not specified
        raise InputError(f'{file}: cannot be read ({one_line(error)[:200]}); convert the data again') from error
    if len(targets) != shards.num_samples:
        raise InputError(f'{file}: {len(targets)} labels for {shards.num_samples} samples: of another data set; convert the data again')
    return targets
