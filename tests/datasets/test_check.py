import os
import signal
import sys

import pytest
import torch

from composer_effalgos import InputError, cli
from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.check import check_images


@pytest.fixture
def folder(tmp_path, pixels, write_folder):
    write_folder(tmp_path / 'train', {'ant': pixels(70, 12), 'bee': pixels(3, 12, seed=1)})
    write_folder(tmp_path / 'val', {'ant': pixels(2, 12, seed=2)})
    return tmp_path


def break_three(folder):
    """Cut off, empty, and no image: the last one in another portion and split."""
    cut = folder / 'train' / 'ant' / '003.png'
    cut.write_bytes(cut.read_bytes()[:100])
    empty = folder / 'train' / 'bee' / '001.png'
    empty.write_bytes(b'')
    text = folder / 'val' / 'ant' / '000.png'
    text.write_text('not found')
    return [cut, empty, text]


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, 'argv', ['effalgos', 'check-data', *map(str, argv)])
    try:
        return cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize('workers', [0, 2])
def test_finds_broken_images(monkeypatch, capsys, folder, workers):
    assert run(monkeypatch, folder, '--workers', workers) == 0
    assert capsys.readouterr().out == '75 images read, 0 broken\n'
    broken = break_three(folder)
    assert run(monkeypatch, folder, '--workers', workers, '--out', folder / 'broken.txt') == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == '75 images read, 3 broken'
    assert [line.split(':')[0] for line in lines[:-1]] == [str(path) for path in broken]
    assert 'truncated' in lines[0]
    assert (folder / 'broken.txt').read_text().splitlines() == lines[:-1]


def test_checks_the_data_of_a_recipe(monkeypatch, capsys, folder):
    recipe = folder / 'recipe.yaml'
    recipe.write_text(
        'max_duration: 1ep\ndataset: {name: image_folder, batch_size: 4}\nmodel: {name: resnet20_cifar}\noptimizer: {name: sgd, lr: 0.1}\n'
    )
    assert run(monkeypatch, recipe) == 2
    assert 'dataset.path' in capsys.readouterr().err
    break_three(folder)
    assert run(monkeypatch, recipe, f'dataset.path={folder}') == 1
    assert capsys.readouterr().out.endswith('75 images read, 3 broken\n')
    assert run(monkeypatch, recipe, 'dataset.name=digits') == 0
    assert capsys.readouterr().out == '1797 images read, 0 broken\n'


def test_a_missing_folder_is_one_line(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, tmp_path / 'none') == 2
    assert capsys.readouterr().err.startswith(
        'error: SOURCE: expected a recipe (*.yaml) or a folder with train/CLASS/ and val/CLASS/, got '
    )


def test_the_data_set_keeps_its_transform(folder):
    dataset = build_dataset('image_folder', 'train', path=str(folder), image_size=8)
    assert list(check_images(dataset)) == [[], []]
    assert dataset[0][0].shape == (3, 8, 8)


class Deadly(torch.utils.data.Dataset):
    def __len__(self):
        return 300

    def __getitem__(self, index):
        if index == 200:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_decoder_that_dies_is_named():
    with pytest.raises(InputError, match=r'died, within images \d+ to \d+ .*--workers 0') as caught:
        list(check_images(Deadly(), num_workers=1))
    first, last = map(int, caught.value.args[0].split('images ')[1].split(' (')[0].split(' to '))
    assert first <= 200 <= last
