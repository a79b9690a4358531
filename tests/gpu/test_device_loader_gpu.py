"""The device path on a GPU: the batches of the CPU, and no wait for the GPU."""

import pytest
import torch

from composer_effalgos.datasets.images import ImageArray, small_image_transform
from composer_effalgos.loaders import DeviceDataLoader

pytestmark = pytest.mark.gpu


@pytest.fixture
def images() -> ImageArray:
    transform = small_image_transform(
        size=32, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, padding=4, padding_mode='reflect', flip=True, cutout=8
    )
    pixels = torch.randint(0, 256, (5000, 32, 32, 3), dtype=torch.uint8).numpy()
    return ImageArray(pixels, torch.arange(5000) % 10, [str(name) for name in range(10)], transform)


def test_batches_are_those_of_the_cpu(images):
    on_gpu, on_cpu = (DeviceDataLoader(images, batch_size=128, shuffle=True, device=device) for device in ('cuda', 'cpu'))
    for (image, label), (other_image, other_label) in zip(on_gpu, on_cpu, strict=True):
        assert image.is_cuda
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert image.untyped_storage().nbytes() == image.nbytes
        assert torch.equal(label.cpu(), other_label)
        torch.testing.assert_close(image.cpu(), other_image, rtol=1e-6, atol=1e-6)


def test_no_batch_waits_for_the_gpu(images):
    loader = DeviceDataLoader(images, batch_size=128, shuffle=True, device='cuda')
    list(loader)  # loads the images and the constants
    torch.cuda.set_sync_debug_mode('error')
    try:
        assert sum(len(label) for _, label in loader) == 5000
    finally:
        torch.cuda.set_sync_debug_mode('default')
