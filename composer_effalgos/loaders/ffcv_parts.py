"""Extensions of ffcv's classes; imported only if ffcv is installed."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from queue import Empty, Full
from typing import Any

import numba
import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
from ffcv.libffcv import imdecode, memcpy, resize_crop
from ffcv.loader import Loader
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from PIL import Image

from composer_effalgos.datasets.beton import Beton, check_beton
from composer_effalgos.datasets.images import decode_image


def images_of(dataset: Beton, size: tuple[int, int], num_threads: int, batches_ahead: int) -> Loader:
    """Build an ffcv loader that decodes only the images. It is not iterated directly; see :class:`Epoch`.

    Args:
        dataset: The dataset.
        size: Output height and width in pixels.
        num_threads: Number of decoding threads.
        batches_ahead: Number of batches to decode ahead.
    """
    reader = check_beton(dataset.file)
    pipelines = {name: [BoxDecoder(size)] if name == 'image' else None for name in reader.field_names}
    usable = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # fewer than os.cpu_count() where CPUs are restricted
    return Loader(
        str(dataset.file),
        batch_size=1,
        num_workers=max(1, min(num_threads, usable)),
        pipelines=pipelines,
        drop_last=False,
        batches_ahead=batches_ahead,
    )


class BoxDecoder(SimpleRGBImageDecoder):
    """Decodes an image and resizes a box of it to the output size; the resize is skipped if the box is the whole image at that size.

    Each batch has three buffers: the output, the boxes (filled in beforehand), and a flag for JPEG files that could not be decoded.

    Args:
        size: Output height and width in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def declare_state_and_memory(self, previous_state: Any) -> Any:
        shape, pixel = (*self.size, 3), np.dtype('<u1')
        memory = AllocationQuery(shape, pixel), AllocationQuery((4,), np.dtype('<i8')), AllocationQuery((1,), pixel)
        return replace(previous_state, jit_mode=True, shape=shape, dtype=pixel), memory

    def generate_code(self) -> Any:
        jpg = IMAGE_MODES['jpg']
        read, over = self.memory_read, Compiler.get_iterator()
        decode_jpeg, copy, resize = (Compiler.compile(function) for function in (imdecode, memcpy, resize_crop))
        out_height, out_width = self.size

        def decode(batch_indices: Any, memory: Any, metadata: Any, storage_state: Any) -> Any:
            output, boxes, failed = memory
            for row in over(len(batch_indices)):
                field = metadata[batch_indices[row]]
                data = read(field['data_ptr'], storage_state)
                height, width = np.int64(field['height']), np.int64(field['width'])
                top, left, tall, wide = boxes[row, 0], boxes[row, 1], boxes[row, 2], boxes[row, 3]
                failed[row, 0] = 0
                if tall == height == out_height and wide == width == out_width:
                    if field['mode'] == jpg:
                        status = decode_jpeg(data, output[row], height, width, height, width, 0, 0, 1, 1, False, False)
                        failed[row, 0] = status != 0
                    else:
                        copy(data, output[row])
                elif field['mode'] == jpg:
                    pixels = np.empty((height, width, 3), np.uint8)
                    status = decode_jpeg(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                    failed[row, 0] = status != 0
                    resize(pixels, top, top + tall, left, left + wide, output[row])
                else:
                    resize(data.reshape(height, width, 3), top, top + tall, left, left + wide, output[row])
            return output[: len(batch_indices)]

        decode.is_parallel = True  # type: ignore[attr-defined]
        return decode


class Epoch(EpochIterator):
    """ffcv's decoding thread, extended to batches of varying size; its errors are raised in the consumer.

    Args:
        dataset: The dataset.
        loader: A loader from :func:`images_of`.
        batches: Rows of the file in each batch, uint64 ``[m]``.
        boxes: Boxes to decode in each batch, int64 ``[m, 4]``: top, left, height, width.
    """

    def __init__(self, dataset: Beton, loader: Loader, batches: list[np.ndarray], boxes: list[np.ndarray]) -> None:
        self.dataset, self.batches, self.boxes = dataset, batches, boxes
        self.error: BaseException | None = None
        loader.batch_size = max(map(len, batches))  # the capacity of its buffers
        super().__init__(loader, np.concatenate(batches))

    def start(self) -> None:
        self.iter_ixes = iter(self.batches)  # replaces ffcv's batches of equal size
        super().start()

    def run(self) -> None:
        try:
            super().run()
        except BaseException as error:  # otherwise the consumer would wait for the batch forever
            self.error = error
            while not self.terminate_event.is_set():
                with contextlib.suppress(Full):
                    self.output_queue.put(None, timeout=0.5)
                    return

    def run_pipeline(self, b_ix: int, batch_indices: np.ndarray, batch_slot: int, cuda_event: Any) -> Any:
        (memory,) = (found for found in self.memory_allocations['operation'].values() if found is not None)
        output, places, failed = (part[batch_slot][: len(batch_indices)] for part in memory)
        places[:] = self.boxes[b_ix]
        result = super().run_pipeline(b_ix, batch_indices, batch_slot, cuda_event)
        for row in np.flatnonzero(failed):
            output[row] = _decode_again(self.dataset, int(batch_indices[row]), self.boxes[b_ix][row], output.shape[1:3])
        return result

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except StopIteration:
            if self.error is not None:
                raise self.error from None
            raise

    def stop(self) -> None:
        """End the thread, draining its queue because it may be blocked on a full one."""
        self.close()
        self.closed = True
        while self.is_alive():
            with contextlib.suppress(Empty):
                self.output_queue.get(timeout=0.05)


def _decode_again(dataset: Beton, row: int, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Decode an image with Pillow after a TurboJPEG warning or error, which ffcv does not distinguish; broken images raise here."""
    data = dataset.encoded(row)
    image = decode_image(data, f'{dataset.file}: sample {row}')
    top, left, tall, wide = box.tolist()
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BOX, box=(left, top, left + wide, top + tall)))
