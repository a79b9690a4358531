"""Damaged recipes and sweeps: one line or a success, and nothing hangs."""

import contextlib
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from composer_effalgos.recipes.schema import Recipe, parse_recipe
from composer_effalgos.recipes.settings import SWEEPS, list_recipes, read_settings, recipe_folder
from composer_effalgos.report import load_sweep
from composer_effalgos.train import train
from composer_effalgos.utils.errors import InputError
from tests.fuzz.mutate import damage_tree
from tests.fuzz.refused import SMALL, one_line_or_none

RECIPES, SWEEP_FILES = ([path.resolve() for path, _ in list_recipes(recipe_folder() / part)] for part in ('', SWEEPS))


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')


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
    assert ended < 8, 'nothing was refused'


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


@pytest.mark.parametrize(
    ('settings', 'line'),
    [
        ({'algorithms': {'ghost_batchnorm': {}}}, 'algorithms.ghost_batchnorm: Worker batch size 8 < ghost_batch_size 32'),
        ({'algorithms': {'sam': {'interval': 0}}}, 'algorithms.sam: ZeroDivisionError'),
        ({'algorithms': {'ema': {'half_life': '0ba'}}}, 'algorithms.ema: ZeroDivisionError'),
        ({'algorithms': {'label_smoothing': {'smoothing': 1e30}}}, 'recipe: No targets have nonzero probability'),
        ({'optimizer': {'name': 'sparseadam'}}, 'optimizer: SparseAdam does not support dense gradients'),
        ({'save_interval': 1, 'save_filename': '{nope}'}, "recipe: KeyError: 'nope'"),
        ({'max_duration': '1e400ep'}, 'max_duration: expected a time string'),
        ({'eval_interval': '0ep'}, 'eval_interval: expected a time above 0'),
        ({'algorithms': {'adabatch': {'growth_factor': 1e308}}}, 'growth_factor: expected a finite number'),
        ({'scheduler': {'name': 'polynomial', 'power': 1e-300}}, None),
    ],
)
def test_recipes_that_fit_no_component(settings, line):
    recipe = {key: value for key, value in SMALL.items() if key not in ('algorithms', 'scheduler')} | {'save_folder': 'runs'} | settings
    if line is None:
        train(parse_recipe(recipe))
        return
    with pytest.raises(InputError) as error:
        train(parse_recipe(recipe))
    assert line in str(error.value)
    assert '\n' not in str(error.value)
