"""Damaged recipes, sweeps, result files and command lines: one line or a success, and nothing hangs."""

import contextlib
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from composer_effalgos.bench import load_sweep
from composer_effalgos.errors import InputError
from composer_effalgos.faults import explain
from composer_effalgos.recipe import Recipe, parse_recipe
from composer_effalgos.settings import SWEEPS, list_recipes, read_settings, recipe_folder
from composer_effalgos.train import train
from tests.fuzz.mutate import damage_tree, limit

SECONDS = 20  # far above what any case takes, on a busy machine too
SMALL = {
    'max_duration': '2ba',
    'progress_bar': False,
    'dataset': {'name': 'synthetic', 'batch_size': 8, 'num_samples': 32, 'eval_samples': 8, 'num_classes': 3, 'image_size': 8},
    'model': {'name': 'resnet20_cifar'},
    'optimizer': {'name': 'sgd', 'lr': 0.1, 'momentum': 0.9},
    'scheduler': {'name': 'one_cycle', 'max_lr': 0.1},
    'algorithms': {
        'infobatch': {'prune_ratio': 0.3, 'delta': 0.8},
        'adabatch': {'growth_factor': 2.0, 'interval': '1ba'},
        'label_smoothing': {'smoothing': 0.1},
        'ghost_batchnorm': {'ghost_batch_size': 4},
        'progressive_resizing': {'initial_scale': 0.5},
    },
    'callbacks': {'speed_monitor': {'window_size': 2}},
}
RECIPES, SWEEP_FILES = ([path.resolve() for path, _ in list_recipes(recipe_folder() / part)] for part in ('', SWEEPS))
LOCAL = ('tensorboard', 'in_memory_logger', 'file_logger')  # loggers that ask no server


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')


def one_line_or_none(case: Callable[[], Any], about: object) -> bool:
    """Whether the case succeeded; what it refuses must be one line."""
    try:
        with limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            case()
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise AssertionError(f'{type(error).__name__} from {about!r:.2000}') from error
        line = explained[0]
        assert line, about
        assert '\n' not in line, about
        assert len(line) < 3000, about
        return False
    return True


def build(recipe: Recipe) -> None:
    """Everything that a recipe names, without its data."""
    weight = torch.nn.Parameter(torch.ones(2, 2))
    recipe.optimizer.build([weight])
    for component in [item for item in recipe.components if item is not recipe.optimizer and item not in recipe.loggers]:
        component.build()


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_damaged_recipes(path):
    draw = random.Random(path.stem)
    settings = read_settings(path)
    for _ in range(6):
        damaged = damage_tree(draw, settings)

        def case(damaged=damaged) -> None:
            Path('damaged.yaml').write_text(yaml.safe_dump(damaged), encoding='utf-8', errors='surrogatepass')
            with contextlib.suppress(InputError):  # what YAML can say, and what it cannot
                read_settings(Path('damaged.yaml'))
            if isinstance(damaged, dict):
                build(parse_recipe(damaged))

        one_line_or_none(case, damaged)


@pytest.mark.parametrize('number', range(6))
def test_damaged_recipes_that_train(number):
    draw = random.Random(number)
    ended = 0
    for _ in range(8):
        damaged = damage_tree(draw, SMALL)
        if isinstance(damaged, dict):
            about = damaged | {'save_folder': 'runs', 'max_duration': SMALL['max_duration']}
            ended += one_line_or_none(lambda about=about: train(parse_recipe(about)), about)
        shutil.rmtree('runs', ignore_errors=True)
    assert ended < 8


@pytest.mark.parametrize('path', SWEEP_FILES, ids=lambda path: path.stem)
def test_damaged_sweeps(path):
    draw = random.Random(path.stem)
    settings = read_settings(path)
    for _ in range(2):
        damaged = damage_tree(draw, settings)

        def case(damaged=damaged) -> None:
            Path('damaged.yaml').write_text(yaml.safe_dump(damaged), encoding='utf-8', errors='surrogatepass')
            sweep = load_sweep('damaged.yaml')
            if sweep.all_methods():
                sweep.jobs(Path('out'), only=list(sweep.all_methods())[:1])

        one_line_or_none(case, damaged)
