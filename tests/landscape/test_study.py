from __future__ import annotations

import csv
import json
import math
import sys
import warnings
import xml.etree.ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from composer_effalgos import cli
from composer_effalgos.landscape import Settings, Study, interpolate
from composer_effalgos.recipes.build import build_network
from composer_effalgos.recipes.schema import load_recipe
from composer_effalgos.train import train
from composer_effalgos.utils.errors import InputError

QUICK = Settings(points=4, batch_size=16, epsilons=(1e-3,), subspace=5, iterations=2)


def _trained(recipe: Path, name: str, *overrides: str) -> tuple[Path, dict[str, Any]]:
    """Trains in this process; the checkpoint and the summary's totals."""
    checked = load_recipe(recipe, [f'run_name={name}', *overrides])
    train(checked)
    summary = json.loads((checked.run_folder / 'summary.json').read_text())
    return checked.run_folder / 'checkpoints' / 'latest-rank0.pt', summary['totals']


@pytest.fixture
def two_solutions(write_recipe: Callable[..., Path]) -> tuple[Path, Path, Path]:
    """A recipe, and two state dicts of its network that no training made."""
    recipe = write_recipe()
    files = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        files.append(recipe.with_name(f'{seed}.pt'))
        torch.save(build_network(load_recipe(recipe), SimpleNamespace(num_classes=4)).module.state_dict(), files[-1])
    return recipe, *files


def test_checkpoints_of_our_own_runs(write_recipe: Callable[..., Path]) -> None:
    recipe = write_recipe()
    small, small_totals = _trained(recipe, 'small_batch')
    large, large_totals = _trained(recipe, 'large_batch', 'dataset.batch_size=64')
    lines: list[str] = []
    study = interpolate(small, large, load_recipe(recipe), QUICK, progress=lines.append)
    assert study.as_saved['A']['test_accuracy'] == pytest.approx(small_totals['eval_accuracy'], abs=1e-6)
    assert study.as_saved['B']['test_accuracy'] == pytest.approx(large_totals['eval_accuracy'], abs=1e-6)
    assert [point.alpha for point in study.points if point.alpha in (-1, 0, 1, 2)] == [-1, 0, 1, 2]
    assert [(row['solution'], row['space']) for row in study.sharpness] == [(s, p) for s in 'AB' for p in ('full', 'random 5')]
    assert all(row['sharpness'] > 0 for row in study.sharpness)
    assert study.about['train_samples'] == 64
    assert len(lines) == 2 + len(study.points) + 4
    first, last = (torch.load(path, weights_only=False)['state']['model'] for path in (small, large))
    distance = math.sqrt(sum(float((last[key] - first[key]).square().sum()) for key in first if 'running' not in key and 'num_' not in key))
    assert study.distances['B - A'] == pytest.approx(distance, rel=1e-5)
    # the same again gives the same, to the last bit; the other way round runs the line backwards
    again = interpolate(small, large, load_recipe(recipe), QUICK)
    assert again == study
    back = interpolate(large, small, load_recipe(recipe), replace(QUICK, sharpness_samples=0))
    for point, mirrored in zip(study.points, reversed(back.points), strict=True):
        assert mirrored.alpha == pytest.approx(1 - point.alpha)
        assert mirrored.train_loss == pytest.approx(point.train_loss, rel=1e-4)


@pytest.mark.distributed
def test_a_checkpoint_of_two_ranks(write_recipe: Callable[..., Path], forked: Callable[..., tuple[int, str]]) -> None:
    # Without batch norm: each rank evaluates with running statistics of its own, and the checkpoint has those of rank 0
    recipe = write_recipe(model={'name': 'alexnet_cifar'}, max_duration='1ep', save_interval='1ep')
    status, said = forked('-m', 'composer_effalgos.train', str(recipe), 'run_name=two', ranks=2)
    assert status == 0, said
    folder = recipe.parent / 'runs' / 'two'
    checkpoint = folder / 'checkpoints' / 'latest-rank0.pt'
    study = interpolate(checkpoint, checkpoint, load_recipe(recipe), replace(QUICK, sharpness_samples=0))
    accuracy = json.loads((folder / 'summary.json').read_text())['totals']['eval_accuracy']
    assert study.as_saved['A']['test_accuracy'] == pytest.approx(accuracy, abs=1e-6)
    assert study.distances['B - A'] == 0
    assert max(point.train_loss for point in study.points) == pytest.approx(min(point.train_loss for point in study.points), rel=1e-5)


def test_the_network_after_surgery_and_augmented_data(write_recipe: Callable[..., Path]) -> None:
    algorithms = {
        'channels_last': {},
        'blurpool': {'min_channels': 1},
        'squeeze_excite': {'latent_channels': 2, 'min_channels': 4},
        'infobatch': {},
    }
    recipe = write_recipe(
        'surgery',
        algorithms=algorithms,
        dataset={'name': 'digits', 'limit': 32, 'batch_size': 16},
        model={'name': 'resnet20_cifar'},
        max_duration='1ep',
        save_interval='1ep',
    )
    checkpoint, totals = _trained(recipe, 'surgery')
    settings = Settings(points=2, batch_size=16, epsilons=(1e-3,), subspace=0, iterations=1)
    study = interpolate(checkpoint, checkpoint, load_recipe(recipe), settings)
    assert study.as_saved['A']['test_accuracy'] == pytest.approx(totals['eval_accuracy'], abs=1e-6)
    first, second = study.sharpness
    assert first['sharpness'] == second['sharpness'] > 0
    # the training images come as they are, so a second look sees the same
    again = replace(settings, sharpness_samples=0)
    assert interpolate(checkpoint, checkpoint, load_recipe(recipe), again).points == study.points


def test_the_files(tmp_path: Path) -> None:
    from composer_effalgos.landscape import Point

    points = [Point(-1.0, math.inf, 0.1, math.nan, 0.2), Point(0.0, 0.1 + 0.2, 0.5, 1e38, 1.0)]
    rows = [{'solution': 'A', 'epsilon': 1e-3, 'space': 'full', 'sharpness': math.inf}]
    study = Study(points, rows, {}, {}, {'model': 'm', 'dataset': 'd'})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        files = study.write(tmp_path / 'deep' / 'out', ('small', 'large'))
    assert [path.name for path in files] == [f'interpolation.{ending}' for ending in ('png', 'svg', 'csv', 'json')]
    assert sorted(path.name for path in (tmp_path / 'deep' / 'out').iterdir()) == sorted(path.name for path in files)
    assert files[0].read_bytes().startswith(b'\x89PNG')
    assert xml.etree.ElementTree.parse(files[1]).getroot().tag.endswith('svg')
    with files[2].open() as stream:
        header, *lines = csv.reader(stream)
    assert header == ['alpha', 'train_loss', 'train_accuracy', 'test_loss', 'test_accuracy']
    assert [[float(cell) for cell in line] for line in lines][1] == [0.0, 0.1 + 0.2, 0.5, 1e38, 1.0]
    assert lines[0] == ['-1.0', 'inf', '0.1', 'nan', '0.2']
    assert json.loads(files[3].read_text())['sharpness'][0]['sharpness'] == 'inf'
    svg = files[1].read_bytes()
    assert study.write(tmp_path / 'deep' / 'out', ('small', 'large'))[1].read_bytes() == svg
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match='cannot be written'):
        study.write(tmp_path / 'file', ('small', 'large'))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


def test_nothing_in_a_checkpoint_is_run(two_solutions: tuple[Path, Path, Path], tmp_path: Path) -> None:
    recipe, a, _ = two_solutions
    torch.save({'state': {'model': torch.load(a), 'extra': Payload(tmp_path / 'run')}}, tmp_path / 'evil.pt')
    with pytest.raises(InputError, match=r'checkpoint B: .*evil\.pt is not a readable weights file'):
        interpolate(a, tmp_path / 'evil.pt', load_recipe(recipe), QUICK)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda state: state | {'classifier.bias': torch.zeros(5)}, r'not weights of keskar_c1 .*of another shape: classifier\.bias'),
        (lambda state: {key: value for key, value in state.items() if key != 'classifier.bias'}, r'missing: classifier\.bias'),
        (lambda state: state | {'x': torch.zeros(1)}, r'unexpected: x'),
        (lambda state: state | {'classifier.bias': torch.full((4,), math.nan)}, r'classifier\.bias holds numbers that are not finite'),
    ],
)
def test_other_weights_are_refused_on_one_line(
    change: Callable[[dict], dict], message: str, two_solutions: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    recipe, a, b = two_solutions
    torch.save(change(torch.load(b)), b)
    with pytest.raises(InputError, match=message) as caught:
        interpolate(a, b, load_recipe(recipe), QUICK)
    assert str(caught.value).startswith(f'checkpoint B: {b}: ')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (Settings(points=1), 'points: '),
        (Settings(samples=65), r'samples: expected a number in \[1, 64\], got 65'),
        (Settings(samples=0), 'samples: '),
        (Settings(sharpness_samples=-1), 'sharpness_samples: '),
        (Settings(batch_size=0), 'batch_size: '),
        (Settings(epsilons=(1e-3, 0.0)), 'epsilon: '),
        (Settings(subspace=-1), 'subspace: '),
        (Settings(iterations=0), 'iterations: '),
        (Settings(seed=-1), 'seed: '),
    ],
)
def test_settings_out_of_range(settings: Settings, message: str, two_solutions: tuple[Path, Path, Path]) -> None:
    recipe, a, b = two_solutions
    with pytest.raises(InputError, match=message):
        interpolate(a, b, load_recipe(recipe), settings)


def test_the_command(
    two_solutions: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, a, b = two_solutions

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', ['effalgos', 'interpolate', *arguments])
        try:
            status = cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    quick = ['--points', '2', '--sharpness-samples', '16', '--subspace', '0', '--iterations', '1', '--epsilon', '0.01']
    out = tmp_path / 'out'
    status, printed, _ = run(str(a), str(b), 'dataset.num_samples=32', '--recipe', str(recipe), '--out', str(out), *quick)
    assert status == 0
    assert printed.splitlines()[-4:] == [str(out / f'interpolation.{ending}') for ending in ('png', 'svg', 'csv', 'json')]
    content = json.loads((out / 'interpolation.json').read_text())
    assert content['about']['train_samples'] == 32
    assert content['about']['sharpness_samples'] == 16
    assert [row['epsilon'] for row in content['sharpness']] == [0.01, 0.01]
    for arguments, message in [
        ([str(a), 'none.pt', '--recipe', str(recipe)], 'error: checkpoint B: no file none.pt'),
        ([str(a), str(b), '--recipe', 'none.yaml'], 'error: none.yaml: expected a file, got none'),
        ([str(a), str(b), '--recipe', str(recipe), '--out', str(a)], f'error: --out: expected a folder, got the file {a}'),
        ([str(a), str(b), 'nonsense', '--recipe', str(recipe)], "error: override 'nonsense'"),
        ([str(a), str(b), 'device=tpu', '--recipe', str(recipe)], f'error: {recipe}: device: '),
    ]:
        status, _, error = run(*arguments)
        assert (status, error.count('\n')) == (2, 1)
        assert error.startswith(message)
