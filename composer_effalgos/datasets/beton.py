"""ffcv ``.beton`` files as a map-style dataset. ``loader: ffcv`` reads the same files faster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from composer_effalgos.datasets.images import (
    MOST_SIDE,
    StoredImages,
    check_at_least,
    check_pixels,
    data_folder,
    decode_image,
    limited,
    open_image,
)
from composer_effalgos.datasets.packed import Description, class_names, pipeline
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import one_line

RAW = 1  # ffcv's mode number for images stored as raw pixels


def import_ffcv(key: str) -> None:
    """Check that ffcv is installed.

    Args:
        key: What needs ffcv; starts the error message.

    Raises:
        InputError: ffcv is not installed or cannot be loaded.
    """
    try:
        threads = torch.get_num_threads()
        import numba

        config: Any = numba.config  # Any: its settings are unknown to the type checker
        if config.NUMBA_NUM_THREADS == 1:
            # On one core, TBB started from a non-main thread keeps Python from exiting, and importing ffcv starts it
            config.THREADING_LAYER = 'omp'
        import ffcv.pipeline.compiler as compiler
    except ImportError as error:
        raise InputError(f'{key} needs ffcv ({one_line(error)}); `make setup-ffcv` builds it') from error
    if compiler.ch is torch:
        # ffcv sets torch's thread count to its own. That count belongs to training: disable the call and undo the one made on import
        compiler.ch = SimpleNamespace(set_num_threads=lambda number: None)
        torch.set_num_threads(threads)


def ffcv_field() -> Any:
    """ffcv's image field, extended to accept encoded bytes: JPEG files are stored unchanged, other formats as pixels."""
    from ffcv.fields.rgb_image import IMAGE_MODES, RGBImageField

    class StoredImage(RGBImageField):
        def encode(self, destination: np.ndarray, image: bytes | np.ndarray, malloc: Callable[[int], tuple[int, np.ndarray]]) -> None:
            if isinstance(image, bytes):
                kind, size = _kind(image)
                if kind == 'JPEG':
                    destination['mode'] = IMAGE_MODES['jpg']
                    destination['width'], destination['height'] = size
                    destination['data_ptr'], place = malloc(len(image))
                    place[:] = np.frombuffer(image, np.uint8)
                    return
                image = np.asarray(decode_image(image, 'image'))
            super().encode(destination, image, malloc)

    return StoredImage()


def _kind(image: bytes) -> tuple[str | None, tuple[int, int]]:
    """Return ``'JPEG'`` if TurboJPEG decodes the file to RGB, else ``None``, and (width, height). Decodes the whole file as a check."""
    with open_image(image, 'image') as opened:
        opened.load()
        return 'JPEG' if opened.format == 'JPEG' and opened.mode in ('RGB', 'L') else None, opened.size


def check_beton(file: Path) -> Any:
    """Open a file with ffcv's reader and check that it holds everything its header refers to; ffcv would crash otherwise.

    Returns:
        ffcv's ``Reader``.

    Raises:
        InputError: The file is missing, truncated or not a ``.beton`` file.
    """
    import_ffcv('a .beton file')
    from ffcv.reader import Reader
    from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType

    if not file.is_file():
        raise InputError(f'{file}: no such file; effalgos convert --to ffcv writes it')
    size = file.stat().st_size
    try:
        header = np.fromfile(file, HeaderType, 1)[0]
        if int(header['num_samples']) + int(header['num_fields']) * FieldDescType.itemsize > size:  # Reader would allocate them
            raise ValueError('more samples than bytes')
        reader = Reader(str(file))
    except Exception as error:  # damaged bytes can raise anything
        raise InputError(f'{file}: not a .beton file, or cut off ({one_line(error)[:200]}); convert the data again') from error
    table, allocated = int(header['alloc_table_ptr']), reader.alloc_table
    whole = (
        0 < table <= size
        and (size - table) % ALLOC_TABLE_TYPE.itemsize == 0
        and len(reader.metadata) == int(reader.num_samples) > 0
        and len(allocated) == len(reader.metadata)
        and bool((allocated['size'] <= table).all())
        and bool((allocated['ptr'] <= table - allocated['size']).all())
    )
    if not whole:
        raise InputError(f'{file}: cut off or damaged: its header refers to data beyond its {size} bytes; convert the data again')
    return reader


class Beton(StoredImages):
    """Images in a ``.beton`` file, decoded on access.

    Args:
        file: The file.
        rows: Rows of the file that belong to the dataset, int64 ``[N]``, ascending.
        reader: ffcv's reader for the file.
        targets: Labels of these rows, int64 ``[N]``.
        classes: Class names.
        transform: PIL image to float32 ``[3, H, W]``.

    Attributes:
        sizes: Height and width of the stored images in pixels, int64 ``[N, 2]``.
    """

    def __init__(
        self, file: Path, rows: Tensor, reader: Any, targets: Tensor, classes: list[str], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        super().__init__(file, rows, targets, classes, transform)
        everything = reader.metadata[_column(reader, file, 'image', 'RGBImageField')]
        images = everything[rows.numpy()]
        self.sizes = torch.from_numpy(np.stack([images['height'], images['width']], axis=1).astype(np.int64))
        self._raw = images['mode'] == RAW
        self._places, self._lengths = everything['data_ptr'], _lengths(everything, reader.alloc_table, file)

    def stored(self, index: int) -> bytes | np.ndarray:
        """The stored form of an image: JPEG bytes, or uint8 ``[H, W, 3]``."""
        row = int(self.rows[index])
        data = self.encoded(row)
        return np.frombuffer(data, np.uint8).reshape(*self.sizes[index].tolist(), 3) if self._raw[index] else data

    def encoded(self, row: int) -> bytes:
        """The stored bytes of a row of the file."""
        place = int(self._places[row])
        with self.file.open('rb') as opened:
            opened.seek(place)
            return opened.read(int(self._lengths[row]))


def _lengths(images: np.ndarray, allocated: np.ndarray, file: Path) -> np.ndarray:
    """The length of each image in bytes, checked because ffcv copies that many into a height x width x 3 buffer unchecked."""
    table = np.sort(allocated, order='ptr')
    found = np.searchsorted(table['ptr'], images['data_ptr']).clip(max=len(table) - 1)
    lengths = table['size'][found]
    pixels = images['height'].astype(np.int64) * images['width'] * 3
    wrong = (table['ptr'][found] != images['data_ptr']) | (images['mode'] > RAW) | (pixels == 0)
    wrong |= (images['mode'] == RAW) & (lengths != pixels)
    if wrong.any():
        raise InputError(f'{file}: sample {int(wrong.argmax())}: its data does not match its height and width; convert the data again')
    largest = int(pixels.argmax())
    check_pixels(int(images['width'][largest]), int(images['height'][largest]), f'{file}: sample {largest}')
    return lengths


def _column(reader: Any, file: Path, name: str, kind: str) -> str:
    """The metadata column of a field, after checking the field's type."""
    if name not in reader.field_names:
        raise InputError(f'{file}: has no field {name!r}; it has {", ".join(map(repr, reader.field_names))}')
    if type(reader.handlers[name]).__name__ != kind:
        raise InputError(f'{file}: field {name!r}: expected an {kind}, got {type(reader.handlers[name]).__name__}; convert the data again')
    return f'f{reader.field_names.index(name)}'


def beton(
    split: Literal['train', 'eval'], path: str | None, *, augment: bool = True, image_size: int | None = None, limit: int | None = None
) -> Beton:
    """Images in ``path/train.beton`` and ``path/eval.beton``, as written by ``effalgos convert --to ffcv``.

    Files written by ffcv itself also work if they have an image field ``image`` and an integer field ``label``; they use the ImageNet
    pipeline.

    Args:
        split: ``'train'`` or ``'eval'``.
        path: Folder of the files.
        augment: As for the dataset that was converted.
        image_size: Output height and width in pixels; null for those of the dataset that was converted.
        limit: Train on a random subset of this size, which is the same in every run.

    Raises:
        InputError: A file or field is missing, or a file is truncated or does not match ``dataset.json``.
    """
    check_at_least(1, most=MOST_SIDE, image_size=image_size)
    folder = data_folder('beton', path, 'train.beton and eval.beton')
    file = folder / f'{split}.beton'
    reader = check_beton(file)
    description = Description.read(folder)
    targets = torch.from_numpy(reader.metadata[_column(reader, file, 'label', 'IntField')].copy().view('<i8').astype(np.int64).reshape(-1))
    classes = class_names(description, split, targets, file)
    rows = limited(len(targets), limit if split == 'train' else None)
    transform = pipeline(description, split, augment=augment, image_size=image_size)
    return Beton(file, rows, reader, targets[rows], classes, transform)
