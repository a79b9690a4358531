"""``effalgos select``: selects a subset with a recipe's strategy and a trained model, and writes it to a file to train on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from composer.utils import dist

from composer_effalgos.models.pretrained import read_checkpoint
from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.checkpoints import check_checkpoint, only_weights
from composer_effalgos.recipes.schema import load_recipe
from composer_effalgos.subset_selection import SubsetSelection
from composer_effalgos.subset_selection.subset_file import write_subset
from composer_effalgos.utils.errors import InputError


def select_to_file(recipe_path: Path, overrides: Sequence[str], checkpoint: Path | None, out: Path) -> str:
    """Selects once with the weights of a checkpoint and writes the subset, without training.

    Args:
        recipe_path: A recipe whose ``algorithms.subset_selection`` configures the selection.
        overrides: ``key=value`` settings that override the recipe.
        checkpoint: A checkpoint of the recipe's training; ``None`` for the model's initial weights.
        out: The Parquet file to write, see :mod:`composer_effalgos.subset_selection.subset_file`.

    Returns:
        A one-line summary of the selection.

    Raises:
        InputError: The recipe, the checkpoint or ``out`` is invalid, or the selection fails.
    """
    recipe = load_recipe(recipe_path, overrides)
    if not any(component.target is SubsetSelection for component in recipe.algorithms):
        raise InputError(
            f'{recipe_path}: algorithms.subset_selection: missing; it says how to select, as in '
            'algorithms.subset_selection.strategy=glister algorithms.subset_selection.fraction=0.1'
        )
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f'--out: expected a file in a folder that exists, got {out}')
    arguments = {name: value for name, value in recipe.trainer.items() if name != 'autoresume' and not name.startswith('save_')}
    if checkpoint is not None:
        read_checkpoint(checkpoint, '--checkpoint')  # rejects a pickle with code in it before Composer unpickles it
        weights_only = arguments.get('load_weights_only', False) or only_weights(checkpoint)
        check_checkpoint('--checkpoint', checkpoint, weights_only=weights_only)
        arguments |= {'load_path': str(checkpoint), 'load_weights_only': weights_only}
    with tempfile.TemporaryDirectory() as folder:  # for files that the trainer writes
        trainer = build_trainer(replace(recipe, trainer=arguments, callbacks=[], loggers=[], save_folder=folder))
        (algorithm,) = (item for item in trainer.state.algorithms if isinstance(item, SubsetSelection))
        if algorithm.strategy == 'file':
            raise InputError(f'{recipe_path}: algorithms.subset_selection.strategy: file is a subset already; name a strategy that selects')
        indices, weights = algorithm.select(trainer.state)
        dataset = trainer.state.dataloader.dataset  # type: ignore[union-attr]
        if dist.get_global_rank() == 0:
            facts = {
                'dataset': recipe.dataset.name,
                'strategy': algorithm.strategy,
                'seed': recipe.seed,
                'checkpoint': None if checkpoint is None else checkpoint.name,
                'epoch': int(trainer.state.timestamp.epoch),
            }
            write_subset(out, indices, weights, dataset=dataset, facts=facts)
        trainer.close()
    return f'{len(indices)} of {len(dataset)} samples by {algorithm.strategy}; {out}'
