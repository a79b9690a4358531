from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from composer import Trainer
from composer.algorithms import EMA
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos.models import build_model
from composer_effalgos.models.pretrained import read_checkpoint, read_weights
from composer_effalgos.utils.errors import InputError


def _save_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    safetensors.torch.save_file(state, folder / 'weights.safetensors')
    return folder / 'weights.safetensors'


def _saver(wrap: Callable[[dict[str, Tensor]], object], name: str) -> Callable[[dict[str, Tensor], Path], Path]:
    def save(state: dict[str, Tensor], folder: Path) -> Path:
        torch.save(wrap(state), folder / name)
        return folder / name

    return save


def _prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f'{prefix}{key}': value for key, value in state.items()}


@pytest.mark.parametrize(
    'save',
    [
        _saver(lambda state: state, 'weights.pt'),
        _saver(lambda state: {'state_dict': state, 'epoch': 3}, 'weights.pth'),
        _saver(lambda state: {'model': _prefixed(state, 'module.'), 'optimizer': {'lr': 0.1}}, 'weights.pth'),
        _saver(lambda state: {'state': {'model': _prefixed(state, 'module.module.')}}, 'weights.pt'),
        _save_safetensors,
    ],
)
def test_local_files_are_loaded_whole(
    save: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = build_model('resnet20_cifar', 10)
    source(torch.randn(4, 3, 8, 8))  # so that the batch norms' buffers differ from a new model's
    path = save(source.state_dict(), tmp_path)
    loaded = build_model('resnet20_cifar', 10, pretrained=str(path)).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())
    assert loaded.keys() == source.state_dict().keys()
    assert not caplog.records


@pytest.mark.parametrize('weights_only', [False, True])
def test_a_composer_checkpoint_is_loaded(weights_only: bool, tmp_path: Path) -> None:
    source = build_model('resnet20_cifar', 10)
    images = TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8))
    trainer = Trainer(
        model=ComposerClassifier(source, num_classes=10),
        train_dataloader=DataLoader(images, batch_size=4),
        max_duration='1ep',
        optimizers=torch.optim.SGD(source.parameters(), lr=0.1, momentum=0.9),
        algorithms=[EMA(half_life='2ba')],
        progress_bar=False,
        device='cpu',
    )
    trainer.fit()
    path = trainer.save_checkpoint(str(tmp_path / 'checkpoint.pt'), weights_only=weights_only)
    trainer.close()
    loaded = build_model('resnet20_cifar', 10, pretrained=path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize('backbone_only', [False, True])
def test_a_head_of_another_size_starts_anew_with_a_line(backbone_only: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = build_model('resnet20_cifar', 100)
    state = {key: value for key, value in source.state_dict().items() if not (backbone_only and key.startswith('fc.'))}
    torch.save(state, tmp_path / 'weights.pt')
    model = build_model('resnet20_cifar', 10, pretrained=str(tmp_path / 'weights.pt'))
    assert model.fc.weight.shape == (10, 64)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items() if not key.startswith('fc.'))
    assert [record.message.count('\n') for record in caplog.records] == [0]
    assert 'fc keeps its random initialisation' in caplog.text


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda state: {key: value for key, value in state.items() if key != 'bn.weight'}, r'of another model \(missing: bn\.weight\)'),
        (lambda state: state | {'extra.weight': torch.zeros(1)}, r'of another model \(unexpected: extra\.weight\)'),
        (lambda state: state | {'conv.weight': torch.zeros(16, 1, 3, 3)}, r'of another model \(of another shape: conv\.weight\)'),
        (lambda _: build_model('resnet56_cifar', 10).state_dict(), r'unexpected: layer1\.3\.conv1\.weight, .* and \d+ more'),
        (lambda _: {}, r'holds no state dict'),
        (lambda state: list(state.values()), r'holds no state dict'),
        (lambda _: {'epoch': 3}, r'holds no state dict'),
        (lambda _: {'model': {0: torch.zeros(1)}}, r'holds no state dict'),
        (lambda _: nn.Linear(1, 1), r'is not a readable weights file'),  # arbitrary objects are not unpickled
    ],
)
def test_other_weights_are_refused_by_key(change: Callable, message: str, tmp_path: Path) -> None:
    torch.save(change(build_model('resnet20_cifar', 10).state_dict()), tmp_path / 'weights.pt')
    with pytest.raises(InputError, match=message) as caught:
        build_model('resnet20_cifar', 10, pretrained=str(tmp_path / 'weights.pt'))
    assert str(caught.value).startswith('model.pretrained: ')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['weights.pt', 'weights.safetensors'])
@pytest.mark.parametrize('content', [b'', b'nonsense', b'\x80\x04\x95' + b'x' * 50, b'PK\x03\x04' + b'\0' * 100])
def test_broken_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match='is not a readable weights file') as caught:
        build_model('resnet20_cifar', 10, pretrained=str(tmp_path / name))
    assert '\n' not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / 'weights.pt'
    torch.save(build_model('resnet20_cifar', 10).state_dict(), file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match='is not a readable weights file'):
        build_model('resnet20_cifar', 10, pretrained=str(file))


@pytest.mark.parametrize('path', ['nowhere.pt', '.'])
def test_a_missing_file_is_named(path: str) -> None:
    with pytest.raises(InputError, match=r'model\.pretrained: no file '):
        build_model('resnet20_cifar', 10, pretrained=path)


class _Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.file,)


def _both(program: bytes, file: Path) -> None:
    """A safetensors file whose tensor ends in a zip archive, and whose length of the header is the four bytes that begin one."""
    start = b'PK\x03\x04' + bytes(4)
    length = int.from_bytes(start, 'little')

    def append(prefix: bytes) -> bytes:
        archive = io.BytesIO(prefix)
        with zipfile.ZipFile(archive, 'a') as opened, zipfile.ZipFile(io.BytesIO(program)) as source:
            for name in source.namelist():
                opened.writestr(name, source.read(name))
        return archive.getvalue()

    size = len(append(b'-')) - 1
    header = json.dumps({'a': {'dtype': 'U8', 'shape': [size], 'data_offsets': [0, size]}}).encode()
    file.write_bytes(append(start + header.ljust(length)))


def test_a_file_that_is_two_things_is_read_as_one(tmp_path: Path) -> None:
    """Checked as safetensors, it would be unpickled by whoever reads it next with ``torch.load``."""
    program, file = io.BytesIO(), tmp_path / 'both.safetensors'
    torch.save({'a': _Bomb(tmp_path / 'ran')}, program)
    _both(program.getvalue(), file)
    assert read_weights(file).keys() == {'a'}
    with pytest.raises(InputError, match='is not a readable weights file'):
        read_checkpoint(file, 'key')
    assert not (tmp_path / 'ran').exists()
    torch.load(file, weights_only=False)  # as Composer does
    assert (tmp_path / 'ran').exists()


@pytest.mark.parametrize('name', ['a.pt', 'a.safetensors'])
def test_what_torch_reads_next_is_read_as_torch_does(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    torch.save({'a': torch.ones(2)}, file)
    assert torch.equal(read_checkpoint(file, 'key')['a'], torch.ones(2))
    torch.save({'a': _Bomb(tmp_path / 'ran')}, file)
    with pytest.raises(InputError, match='is not a readable weights file'):
        read_checkpoint(file, 'key')
    safetensors.torch.save_file({'a': torch.ones(2)}, file)
    with pytest.raises(InputError, match='is not a readable weights file'):
        read_checkpoint(file, 'key')
    assert not (tmp_path / 'ran').exists()
