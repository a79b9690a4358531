from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from composer.algorithms.augmix import AugmentAndMixTransform
from composer.algorithms.colout import ColOutTransform
from composer.algorithms.randaugment import RandAugmentTransform
from composer.utils.misc import add_vision_dataset_transform
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import VisionDataset
from torchvision.transforms._presets import ImageClassification

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.images import decode_image, large_image_transform, limited, small_image_transform
from composer_effalgos.utils.errors import InputError


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'GIF', 'WEBP', 'JPEG'])
def test_decode_image_gives_rgb(kind: str, pixels: Callable, encode: Callable) -> None:
    flat = np.full((9, 7, 3), (255, 0, 0), np.uint8)
    image = decode_image(encode(flat, kind), 'here')
    assert (image.mode, image.size) == ('RGB', (7, 9))
    assert np.abs(np.asarray(image).astype(int) - flat).max() <= 3  # JPEG loses a little


@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGBA', 'CMYK', '1'])
def test_decode_image_turns_every_mode_into_rgb(mode: str) -> None:
    buffer = io.BytesIO()
    Image.new(mode, (5, 4), 1).save(buffer, 'TIFF' if mode == 'CMYK' else 'PNG')
    assert decode_image(buffer.getvalue(), 'here').mode == 'RGB'


@pytest.mark.parametrize(
    ('values', 'kind', 'mode'),
    [(np.uint16, 'PNG', 'I'), (np.uint16, 'TIFF', 'I'), (np.int32, 'TIFF', 'I'), (np.uint16, 'PPM', 'I'), (np.float32, 'TIFF', 'F')],
)
def test_images_of_more_than_8_bits_are_refused(values: type, kind: str, mode: str) -> None:
    """Pillow clips them at 255 when it converts them to RGB: this ramp would be white."""
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 20).reshape(4, 5).astype(values)).save(buffer, kind)
    with pytest.raises(InputError, match=rf'^there: expected 8 bits per channel, got an image of mode {mode}'):
        decode_image(buffer.getvalue(), 'there')


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_image_are_an_input_error(data: bytes) -> None:
    with pytest.raises(InputError, match=r'^there: ') as caught:
        decode_image(data, 'there')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('kind', ['PNG', 'JPEG', 'GIF'])
def test_truncated_images_are_an_input_error(kind: str, pixels: Callable, encode: Callable) -> None:
    data = encode(pixels(1)[0], kind)
    for length in range(1, len(data) - 20, max(1, len(data) // 50)):
        with pytest.raises(InputError, match=r'^there: corrupt image'):
            decode_image(data[:length], 'there')


def test_every_augmented_small_image_is_a_crop_or_its_mirror_image(pixels: Callable) -> None:
    image = pixels(1, 32)[0]
    transform = small_image_transform(size=32, image_size=32, mean=(0.0,) * 3, std=(1.0,) * 3, padding=4, padding_mode='reflect', flip=True)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode='reflect')
    crops = {(dy, dx): padded[dy : dy + 32, dx : dx + 32] for dy in range(9) for dx in range(9)}
    crops_by_bytes = {crop[:, ::step].tobytes(): (*shift, step) for shift, crop in crops.items() for step in (1, -1)}
    torch.manual_seed(0)
    shown = (transform(Image.fromarray(image)).permute(1, 2, 0).numpy() for _ in range(2000))
    seen = {crops_by_bytes[np.rint(shifted * 255).astype(np.uint8).tobytes()] for shifted in shown}
    assert len(seen) == 162


@pytest.mark.parametrize(('image_size', 'resize_size'), [(224, 256), (112, 128), (32, 37)])
def test_large_images_are_evaluated_as_torchvision_does(image_size: int, resize_size: int, pixels: Callable) -> None:
    image = Image.fromarray(pixels(1, 300, 200)[0])
    expected = ImageClassification(crop_size=image_size, resize_size=resize_size)(image)
    for split, augment in [('eval', True), ('eval', False), ('train', False)]:
        found = large_image_transform(split, image_size=image_size, augment=augment)(image)
        torch.testing.assert_close(found, expected)


@given(count=st.integers(1, 300), data=st.data())
def test_limited_is_a_sorted_nested_choice(count: int, data: st.DataObject) -> None:
    small, large = sorted(data.draw(st.lists(st.integers(1, count), min_size=2, max_size=2)))
    state = torch.get_rng_state()
    chosen, more = limited(count, small), limited(count, large)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == small
    assert set(chosen.tolist()) <= set(more.tolist()) <= set(range(count))
    assert limited(count, None).tolist() == limited(count, count).tolist() == list(range(count))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize('transform', [RandAugmentTransform(severity=9, depth=2), AugmentAndMixTransform(), ColOutTransform()])
def test_composers_dataset_transforms_insert_themselves_before_the_tensor(transform: Callable) -> None:
    dataset = build_dataset('digits', 'train', image_size=32)
    assert isinstance(dataset, VisionDataset)
    before, _ = dataset[0]
    add_vision_dataset_transform(dataset, transform, is_tensor_transform=False)
    assert dataset.transform.transforms.index(transform) == len(dataset.transform.transforms) - 3  # then ToTensor, Normalize
    images = [dataset[0][0] for _ in range(5)]
    assert all(image.dtype == torch.float32 and image.shape[0] == 3 for image in images)
    assert any(image.shape != before.shape or not torch.allclose(image, before) for image in images)
