"""Train a recipe: ``composer -n N -m composer_effalgos.train RECIPE.yaml [key=value ...]``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from composer.utils import dist

from composer_effalgos.build import build_trainer
from composer_effalgos.components import one_line
from composer_effalgos.errors import InputError
from composer_effalgos.monitor import SUMMARY
from composer_effalgos.recipe import Recipe, load_recipe


def train(recipe: Recipe) -> None:
    """Train a recipe to its end; a run that autoresume finds finished stays as it is.

    Args:
        recipe: A checked recipe.

    Raises:
        InputError: The recipe, its data or its checkpoint is at fault.
    """
    trainer = build_trainer(recipe)
    state = trainer.state
    assert state.max_duration is not None, 'every recipe has one'
    elapsed = state.timestamp.get(state.max_duration.unit)
    if elapsed < state.max_duration:
        try:
            trainer.fit()
        except FileExistsError as error:
            raise InputError(
                f'{recipe.source}: {recipe.run_folder} holds later checkpoints of a run with this name; '
                'choose another run_name, or set save_overwrite=true or autoresume=true'
            ) from error
    elif not recipe.trainer.get('autoresume', False):
        raise InputError(
            f'{recipe.source}: max_duration: {recipe.max_duration}, but the checkpoint has reached {elapsed.to_timestring()} already'
        )
    trainer.close()


def summary_line(recipe: Recipe) -> str:
    """What a finished run came to, in one line.

    Args:
        recipe: The recipe of a run that has written its summary.

    Returns:
        Accuracy, samples, seconds and the path of ``summary.json``.
    """
    path = recipe.run_folder / SUMMARY
    totals = json.loads(path.read_text(encoding='utf-8'))['totals']
    accuracy = 'no evaluation' if totals['eval_accuracy'] is None else f'accuracy {totals["eval_accuracy"]:.4f}'
    return (
        f'{recipe.run_name}: {accuracy}, {totals["samples_seen"]} samples ({totals["saved_fraction"]:.1%} saved), '
        f'{totals["train_seconds"]:.1f} s of training; {path}'
    )


def refuse(error: InputError) -> int:
    """Say what is wrong with the input, once for all ranks.

    Args:
        error: What was wrong.

    Returns:
        The exit status for bad input.
    """
    # From a DataLoader worker the message comes as a traceback that ends in it
    last_line = str(error).strip().splitlines()[-1]
    message = last_line.split('InputError: ', 1)[-1]
    if dist.get_global_rank() > 0:
        # Where rank 0 has the same to say, the launcher stops this process meanwhile, and the line appears once
        time.sleep(5)
    print(f'error: {message}', file=sys.stderr, flush=True)
    return 2


def _refuse_to_write(error: OSError, recipe: str) -> int:
    return refuse(InputError(f'{error.filename or recipe}: {error.strerror}; what was saved before is whole'))


def main(argv: Sequence[str] | None = None) -> int:
    """Train the recipe that the command line names.

    Args:
        argv: Arguments; those of the process when None.

    Returns:
        The exit status: 0, or 2 for bad input.
    """
    parser = argparse.ArgumentParser(prog='python -m composer_effalgos.train', description='Train a recipe.')
    parser.add_argument('recipe', help='a YAML file')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='settings on top of the recipe, e.g. optimizer.lr=0.05')
    args = parser.parse_args(argv)
    try:
        recipe = load_recipe(args.recipe, args.overrides)
        train(recipe)
    except InputError as error:
        return refuse(error)
    except OSError as error:  # a full disk, a folder that cannot be written
        if error.filename is None and error.errno is None:
            raise
        return _refuse_to_write(error, args.recipe)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError) and error.__context__.errno is not None:  # torch.save's words for the same
            return _refuse_to_write(error.__context__, args.recipe)
        if 'DataLoader worker' in str(error):  # from PyTorch's signal handler, wherever the main process was
            print(
                f'error: {one_line(error)}; a process that reads data died: too little memory or shared memory (fewer dataset.num_workers '
                'need less), or a decoder that crashed (dataset.num_workers=0 shows where)',
                file=sys.stderr,
                flush=True,
            )
            return 1
        # gloo's words for a rank that has gone; that rank has said why
        if dist.get_world_size() == 1 or 'by peer' not in str(error):
            raise
        print('error: another rank has stopped; the launcher shows its message', file=sys.stderr, flush=True)
        return 1
    if dist.get_global_rank() == 0:
        print(summary_line(recipe), flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
