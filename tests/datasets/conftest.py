from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image


@pytest.fixture
def pixels() -> Callable[..., np.ndarray]:
    """Random images, uint8 [count, height, width, 3]."""

    def make(count: int, height: int = 32, width: int | None = None, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(0, 256, (count, height, width or height, 3), dtype=np.uint8)

    return make


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """An image's bytes as a file; PNG is lossless."""

    def make(image: np.ndarray, kind: str = 'PNG') -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind)
        return buffer.getvalue()

    return make


@pytest.fixture
def write_parquet(encode: Callable[..., bytes]) -> Callable[..., Path]:
    """Write images (arrays or raw bytes) and labels to a Parquet file, in row groups of 4."""

    def write(file: Path, images: object, labels: object, *, metadata: dict[str, str] | None = None, struct: bool = False) -> Path:
        encoded = [image if image is None or isinstance(image, bytes) else encode(image) for image in images]
        column = [{'bytes': data, 'path': f'{row}.png'} for row, data in enumerate(encoded)] if struct else pa.array(encoded, pa.binary())
        table = pa.table({'image': column, 'label': pa.array(labels)})
        pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=4)
        return file

    return write


@pytest.fixture
def write_folder(encode: Callable[..., bytes]) -> Callable[..., Path]:
    """Write images to a folder of class folders; ``images`` maps class names to arrays."""

    def write(folder: Path, images: dict[str, np.ndarray]) -> Path:
        for name, arrays in images.items():
            (folder / name).mkdir(parents=True)
            for index, array in enumerate(arrays):
                (folder / name / f'{index:03d}.png').write_bytes(encode(array))
        return folder

    return write
