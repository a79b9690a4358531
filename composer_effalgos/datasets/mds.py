"""mosaicml-streaming MDS shards, local or remote, as a map-style dataset."""

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

from composer_effalgos.datasets.images import MOST_SIDE, StoredImages, check_at_least, check_depth, check_pixels, data_folder, limited
from composer_effalgos.datasets.mds_index import COMPRESSIONS, INDEX, check_index
from composer_effalgos.datasets.packed import DESCRIPTION, Description, class_names, pipeline
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_bytes
from composer_effalgos.utils.text import one_line, shown

LABELS = 'labels.npy'
_IMAGES = ('bytes', 'jpeg', 'png', 'pil', 'ndarray')
_LABELS = ('int', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64', 'str_int')


class Shards:
    """Random access to the shards of one split; a missing shard is downloaded when one of its samples is read.

    Args:
        folder: The split's local folder.
        remote: The split's remote folder, in any storage that mosaicml-streaming supports; ``None`` if all shards must be local.
        columns: Option name to (column, allowed MDS types) of each column to read.

    Attributes:
        starts: First sample of each shard, int64 ``[S]``.
        num_samples: Number of samples in all shards.

    Raises:
        InputError: The index is missing, broken, different from the remote one, or lacks a column.
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
                    raise ValueError('its columns do not each have one name, type and size')
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
        """The columns of a sample.

        Raises:
            InputError: The shard is missing, truncated or damaged, or cannot be downloaded.
        """
        shard = bisect_right(self._starts, row) - 1
        if not self._here[shard]:
            self._ensure(shard)
            self._here[shard] = True
        place = row - self._starts[shard]
        try:
            with np.errstate(over='ignore'):  # damaged shards have wild offsets
                sample = self.shards[shard].get_item(place)
            if (column := self._pil[shard]) is not None:
                sample[column] = _decode_pil(sample[column])
        except Exception as error:  # damaged bytes can raise anything
            reason = one_line(error)[:200]
            raise InputError(f'{self._file(shard)}: sample {place} cannot be read ({reason}); the shard is damaged') from error
        return sample

    def _choose(self, shard: Any, columns: Mapping[str, tuple[str, Sequence[str]]]) -> str | None:
        """Disable decoding except for numbers and arrays, and return the column of MDS type ``pil``, if any.

        MDS's decoder for ``jpeg`` would open any format that Pillow knows; other columns are not needed here.
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
        """Make a shard available locally in full, by downloading and decompressing it if needed."""
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
                else f'{file}: {have} bytes, its index says {wanted}: cut off, or of another dataset; write the shards again'
            )
        if packed is not None:
            with _locked_download(self.folder, str(file.relative_to(self.folder))) as temporary:
                try:
                    _decompress(source, reader.compression, temporary, wanted)
                except Exception as error:  # damaged bytes can raise anything
                    raise InputError(f'{source}: cannot be decompressed ({one_line(error)[:200]}); the shard is damaged') from error
                temporary.replace(file)


def _decode_pil(data: bytes) -> np.ndarray:
    """Decode MDS type ``pil``: width, height and length of the mode name as uint32, then the mode name and the pixels."""
    width, height, length = np.frombuffer(data[:12], '<u4').tolist()
    check_pixels(width, height, 'image')  # before Pillow, which allocates before it checks the length
    mode = data[12 : 12 + length].decode()
    check_depth(mode, 'image')
    image = Image.frombytes(mode, (width, height), data[12 + length :])
    return np.asarray(image.convert('RGB'))


def _decompress(source: Path, compression: str, target: Path, size: int) -> None:
    """Decompress in blocks and stop beyond ``size`` bytes, because a small file can expand to a very large one.

    Raises:
        ValueError: The result is not ``size`` bytes long.
        OSError: The file is damaged.
    """
    codec = COMPRESSIONS[compression.partition(':')[0]]
    if codec == 'snappy':  # Arrow cannot stream it: both buffers are bounded instead
        target.write_bytes(pa.decompress(read_bytes(source, size + size // 6 + 32), size, codec, asbytes=True))
    else:
        with target.open('wb') as out, pa.input_stream(str(source), compression=codec) as stream:
            while out.tell() <= size and (block := stream.read(2**20)):
                out.write(block)
    if (have := target.stat().st_size) != size:
        raise ValueError(f'{have} bytes or more, its index says {size}')


def _size(file: Path) -> int | None:
    """Size of a file in bytes; ``None`` if it does not exist."""
    return file.stat().st_size if file.is_file() else None


@contextmanager
def _locked_download(folder: Path, name: str) -> Iterator[Path]:
    """A temporary path for a file to be moved into ``folder``, locked to one process; leftovers of a killed process are removed."""
    place = folder / '.fetching'
    temporary, lock = place / name, place / f'{name}.lock'
    for path in (temporary, lock):
        if os.path.realpath(path) != str(Path(os.path.realpath(folder)) / path.relative_to(folder)):
            raise InputError(f'{path}: expected a file of its own, got a symbolic link or a path through one; remove it')
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            temporary.unlink(missing_ok=True)
            try:
                yield temporary
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f'{folder / name}: cannot be written ({one_line(error)[:200]})') from error


def fetch(remote: str | None, folder: Path, name: str, *, size: int | None = None, optional: bool = False) -> None:
    """Download a file from a remote folder; safe to call from several processes at once.

    A shard, whose size is known, is downloaded once. Index, labels and description are downloaded every time, to detect a local folder
    that holds different data.

    Args:
        remote: The remote folder; ``None`` does nothing.
        folder: The local folder.
        name: Name of the file.
        size: Expected size in bytes, if known.
        optional: Ignore a failed download.

    Raises:
        InputError: The download fails, has the wrong size, or differs from the local file.
    """
    if remote is None:
        return
    from streaming.base.storage import CloudDownloader

    target = folder / name
    with _locked_download(folder, name) as temporary:
        if size is not None and _size(target) == size:  # another process downloaded it while this one waited for the lock
            return
        try:
            CloudDownloader.direct_download(f'{remote}/{name}', str(temporary))
        except Exception as error:  # each storage backend raises its own types
            if optional:
                return
            raise InputError(f'dataset.remote: {remote}/{name} cannot be fetched ({type(error).__name__}: {one_line(error)})') from error
        if size is not None and _size(temporary) != size:
            raise InputError(f'{remote}/{name}: {_size(temporary)} bytes, its index says {size}: the remote shard is cut off')
        if target.exists() and not target.is_file():
            raise InputError(f'{target}: expected a regular file or none; remove it')
        if size is None and target.exists() and target.read_bytes() != temporary.read_bytes():
            raise InputError(f'{target}: differs from {remote}/{name}: the folder holds other data; give an empty one as dataset.path')
        temporary.replace(target)


class MdsImages(StoredImages):
    """Images in MDS shards, decoded on access.

    Args:
        shards: The split's shards.
        rows: Samples of the shards that belong to the dataset, int64 ``[N]``, ascending.
        targets: Labels of these samples, int64 ``[N]``.
        classes: Class names.
        transform: PIL image to float32 ``[3, H, W]``.
        image_column: Column of the images: encoded bytes or an MDS image type.
        by_shard: Whether the epoch plan reads shard by shard.

    Attributes:
        shard_starts: Index in ``rows`` of each shard's first sample, int64 ``[S]``, if ``by_shard``; else ``None``.
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
        """The stored form of an image: encoded bytes, or uint8 ``[H, W, 3]`` if the shards hold decoded images."""
        image = self.shards[int(self.rows[index])][self.image_column]
        if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0):
            where = f'{self.file}: sample {int(self.rows[index])}'
            raise InputError(f'{where}: expected an array [height, width, 3] of uint8, got {list(image.shape)} of {image.dtype}')
        return image


def located(kind: str, path: str | None, remote: str | None, names: Sequence[str], description: str) -> Path:
    """Find the local folder of a dataset. With ``remote`` it may still be empty; the remote description file is downloaded to it.

    Args:
        kind: Name of the dataset, for messages.
        path: The local folder.
        remote: The remote folder, if any.
        names: Folder names of the splits.
        description: Name of the description file, which may not exist.

    Raises:
        InputError: No ``path``, or, without ``remote``, the folder is missing or empty.
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

    ``effalgos convert`` writes them together with ``dataset.json`` and label files. Shards written by other tools also work: their labels
    are read from the shards at the start, and they use the ImageNet pipeline.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Local folder of the splits, or of the part downloaded so far.
        augment: As for the dataset that was converted.
        image_size: Output height and width in pixels; null for those of the dataset that was converted.
        limit: Train on a random subset of this size, which is the same in every run.
        shuffle: ``'shards'`` shuffles the shards, and the samples within each, so that an epoch reads one shard after another.
            ``'samples'`` shuffles all samples together.
        remote: Remote folder with the layout of ``path``, e.g. ``s3://bucket/data``. Shards are downloaded to ``path`` on first access and
            kept there.
        eval_folder: Name of the evaluation split's folder.
        image_column: Image column: encoded bytes or an MDS image type.
        label_column: Label column: integers from 0.

    Raises:
        InputError: A shard or column is missing, a shard is truncated, or the data differs from ``dataset.json`` or from ``remote``.
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
    """Read the labels from the file that ``effalgos convert`` writes, or else from the shards."""
    file = shards.folder / LABELS
    if not described:
        if file.exists():
            raise InputError(
                f'{shards.folder.parent / DESCRIPTION}: missing, although {file} exists; expected the complete output of effalgos convert'
            )
        found = [int(shards[row][column]) for row in range(shards.num_samples)]
        if not all(-(2**63) <= label < 2**63 for label in found):
            raise InputError(f'{shards.folder}: column {column!r}: expected class indices, got a number of more than 64 bits')
        return torch.tensor(found)
    fetch(shards.remote, shards.folder, LABELS)
    try:
        if not file.is_file():
            raise ValueError('no such file')
        found = np.load(file, mmap_mode='r', allow_pickle=False)  # mmap checks the header's claims against the file size
        if not isinstance(found, np.ndarray) or found.dtype != np.int64 or found.ndim != 1:
            raise ValueError('expected int64 in one dimension')
        targets = torch.from_numpy(np.array(found))
    except Exception as error:  # a damaged header can raise anything
        raise InputError(f'{file}: cannot be read ({one_line(error)[:200]}); convert the data again') from error
    if len(targets) != shards.num_samples:
        raise InputError(f'{file}: {len(targets)} labels for {shards.num_samples} samples: of another dataset; convert the data again')
    return targets
