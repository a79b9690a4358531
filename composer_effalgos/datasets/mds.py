"""MDS shards of mosaicml-streaming, on this machine or in a remote folder, as a map-style data set."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from composer_effalgos.datasets.images import StoredImages, check_at_least, data_folder, limited
from composer_effalgos.datasets.mds_index import INDEX, check_index
from composer_effalgos.datasets.packed import DESCRIPTION, Description, class_names, pipeline
from composer_effalgos.errors import InputError, one_line

LABELS = 'labels.npy'


class Shards:
    """The shards of one split, read at random; those that are missing are fetched when a sample of theirs is read.

    Args:
        folder: The split's folder on this machine.
        remote: Its place in a remote folder, of any kind that mosaicml-streaming knows; ``None`` where all shards must be here.

    Attributes:
        starts: First sample of each shard, int64 ``[S]``.
        num_samples: Samples in all shards.

    Raises:
        InputError: No index, a broken one, or one that is not the remote folder's.
    """

    def __init__(self, folder: Path, remote: str | None = None) -> None:
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
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise InputError(f'{file}: not an index of MDS shards ({error}); write them with effalgos convert or MDSWriter') from error
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
            return self.shards[shard].get_item(place)
        except Exception as error:  # what damaged bytes lead to depends on the columns
            raise InputError(f'{self._file(shard)}: sample {place} cannot be read ({error}); the shard is damaged') from error

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
        elif packed is None or not source.exists():
            have = _size(file)
            raise InputError(
                f'{file}: no such shard, and no dataset.remote to fetch it from'
                if have is None
                else f'{file}: {have} bytes, its index says {wanted}: cut off, or of another data set; write the shards again'
            )
        if packed is not None:
            from streaming.base.compression import decompress

            try:
                data = decompress(reader.compression, source.read_bytes())
            except Exception as error:  # of the compression's own kind
                raise InputError(f'{source}: cannot be decompressed ({error}); the shard is damaged') from error
            with _room(self.folder, str(file.relative_to(self.folder))) as came:
                came.write_bytes(data)
                came.replace(file)


def _size(file: Path) -> int | None:
    """Bytes of a file; ``None`` where there is none."""
    return file.stat().st_size if file.exists() else None


@contextmanager
def _room(folder: Path, name: str) -> Iterator[Path]:
    """A place for a file that is on its way into ``folder``, for one process at a time; what a killed process left there is removed."""
    place = folder / '.fetching'
    came, lock = place / name, place / f'{name}.lock'
    for path in (came, lock):
        if os.path.realpath(path) != str(Path(os.path.realpath(folder)) / path.relative_to(folder)):
            raise InputError(f'{path}: expected a file of its own, got a symbolic link or a path through one; remove it')
    came.parent.mkdir(parents=True, exist_ok=True)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        came.unlink(missing_ok=True)
        try:
            yield came
        finally:
            came.unlink(missing_ok=True)


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
        if size is None and target.exists() and target.read_bytes() != came.read_bytes():
            raise InputError(f'{target}: differs from {remote}/{name}: the folder holds other data; give an empty one as dataset.path')
        came.replace(target)


class MdsImages(StoredImages):
    """Images in MDS shards, decoded when they are read.

    Args:
        shards: The split's shards.
        rows: int64 ``[N]``, ascending: the samples that belong to the data set.
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
        return np.asarray(image.convert('RGB')) if isinstance(image, Image.Image) else image


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
        augment: As for the data set that was converted.
        image_size: Height and width wanted, in pixels; null for that of the data set that was converted.
        limit: Train on so many images, chosen at random, the same ones every time.
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
    check_at_least(1, **({} if image_size is None else {'image_size': image_size}))
    name = 'train' if split == 'train' else eval_folder
    if path is None or remote is None:
        folder = data_folder('mds', path, f'MDS shards in train/ and {eval_folder}/')
    else:
        folder = Path(path).expanduser()
        fetch(remote.rstrip('/'), folder, DESCRIPTION, optional=True)
    place = None if remote is None else f'{remote.rstrip("/")}/{name}'
    shards = Shards(folder / name, place)
    description = Description.read(folder)
    columns = set(shards.shards[0].column_names)
    for key, column in (('image_column', image_column), ('label_column', label_column)):
        if column not in columns:
            raise InputError(f'dataset.{key}: {folder / name} has no column {column!r}; it has {", ".join(sorted(columns))}')
    targets = _labels(shards, description, split, label_column)
    rows = limited(len(targets), limit if split == 'train' else None)
    return MdsImages(
        shards,
        rows,
        targets[rows],
        class_names(description, targets),
        pipeline(description, split, augment=augment, image_size=image_size),
        image_column=image_column,
        by_shard=shuffle == 'shards' and split == 'train',
    )


def _labels(shards: Shards, description: Description | None, split: str, column: str) -> Tensor:
    """The labels beside the shards, or else in them."""
    if description is None:
        return torch.tensor([int(shards[row][column]) for row in range(shards.num_samples)])
    fetch(shards.remote, shards.folder, LABELS)
    file = shards.folder / LABELS
    try:
        targets = torch.from_numpy(np.load(file))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f'{file}: cannot be read ({error}); convert the data again') from error
    if len(targets) != shards.num_samples:
        raise InputError(f'{file}: {len(targets)} labels for {shards.num_samples} samples: of another data set; convert the data again')
    description.check(split, targets, file)
    return targets
