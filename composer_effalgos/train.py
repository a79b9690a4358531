"""Trains a recipe: ``composer -n N -m composer_effalgos.train RECIPE.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from composer import Trainer
from composer.core import Time, TimeUnit
from composer.utils import dist

from composer_effalgos.monitor import SUMMARY, EfficiencyMonitor, quality_text
from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.checkpoints import loading
from composer_effalgos.recipes.faults import explain, print_any_text, print_once, reported_by_another_rank
from composer_effalgos.recipes.schema import Recipe, load_recipe
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_text
from composer_effalgos.utils.text import one_line


def train(recipe: Recipe) -> None:
    """Trains a recipe to its end; if autoresume finds nothing left to train, at most evaluates and records the end."""
    loaded = loading(recipe)
    trainer = build_trainer(recipe)
    state = trainer.state
    assert state.max_duration is not None, 'every recipe has one'
    elapsed = state.timestamp.get(state.max_duration.unit)
    if elapsed >= state.max_duration and not recipe.trainer.get('autoresume', False):
        raise InputError(
            f'{recipe.source}: max_duration: expected more than the {elapsed.to_timestring()} of the checkpoint, got {recipe.max_duration}'
        )
    try:
        if elapsed < state.max_duration:
            trainer.fit()
        else:
            _record_end(trainer, recipe)
    except FileExistsError as error:
        raise InputError(
            f'{recipe.source}: {recipe.run_folder} holds later checkpoints of a run with this name; '
            'choose another run_name, or set save_overwrite=true or autoresume=true'
        ) from error
    except Exception as error:
        refused = (loaded and loaded.refused(error)) or recipe.refused(error)
        if refused is None:
            raise
        raise refused from error
    trainer.close()


def _record_end(trainer: Trainer, recipe: Recipe) -> None:
    """Evaluates and records the end of a run that was stopped after its last checkpoint, which Composer writes before both."""
    (monitor,) = (callback for callback in trainer.state.callbacks if isinstance(callback, EfficiencyMonitor))
    interval = '1ep' if recipe.trainer.get('eval_interval') is None else recipe.trainer['eval_interval']
    never = interval == 0
    by_epoch = not never and Time.from_input(interval, TimeUnit.EPOCH).unit == TimeUnit.EPOCH
    if monitor.lacks_end(trainer.state, evaluated=not never, by_epoch=by_epoch):
        monitor.record_end(trainer.state, trainer.logger, None if never else trainer.eval)


def summary_line(recipe: Recipe) -> str:
    """The result of a finished run in one line: accuracy or held-out loss, samples, seconds and the path of ``summary.json``.

    Raises an ``InputError`` if the summary of an earlier, finished run is missing or damaged.
    """
    path = recipe.run_folder / SUMMARY
    try:
        totals = json.loads(read_text(path))['totals']
        return (
            f'{recipe.run_name}: {quality_text(totals)}, {totals["samples_seen"]} samples ({totals["saved_fraction"]:.1%} saved), '
            f'{totals["train_seconds"]:.1f} s of training; {path}'
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'{path}: the run is finished, but this is not a valid summary ({one_line(error)})') from error


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the recipe given on the command line; returns the exit status: 0, 2 for invalid input, or 1 for another known error."""
    parser = argparse.ArgumentParser(prog='python -m composer_effalgos.train', description='Train a recipe.')
    parser.add_argument('recipe', help='a YAML file')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='settings on top of the recipe, e.g. optimizer.lr=0.05')
    parser.add_argument('--traceback', action='store_true', help='show where in the program an error came from')
    args = parser.parse_args(argv)
    print_any_text()
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        train(recipe)
        if dist.get_global_rank() == 0:
            print(summary_line(recipe), flush=True)
    except Exception as error:
        if args.traceback:
            raise
        line, status = explain(error) or ('', 1)
        if status == 1 and reported_by_another_rank():
            return 1
        if not line:
            raise
        print_once(line)
        return status
    return 0


if __name__ == '__main__':
    sys.exit(main())
