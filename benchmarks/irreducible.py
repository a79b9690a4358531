"""Irreducible losses for the rule ``rho`` without data held out: two models, each trained on one half, give the losses of the other half.

What both trainings cost goes to ``OUT.cost.json``, which ``effalgos frontier`` adds to the budget of every run that reads ``OUT``::

    python benchmarks/irreducible.py yamls/cifar10/cifar10_resnet20_fast_cpu.yaml dataset.path=data dataset.label_noise=0.4

Mindermann et al., ICML 2022, arXiv 2206.07137, section 4.2. On one CPU core some 6 minutes for this recipe.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import record
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from composer_effalgos.monitor import SUMMARY
from composer_effalgos.pruning.irreducible import irreducible_losses
from composer_effalgos.recipes.build import build_split, build_trainer, without_augmentation
from composer_effalgos.recipes.schema import load_recipe
from composer_effalgos.report.frontier import COST, UNITS, spent
from composer_effalgos.report.runs import Run, read_summary
from composer_effalgos.subset_selection.subset_file import write_subset
from composer_effalgos.utils.files import whole_file


def halves(count: int, seed: int) -> list[Tensor]:
    """Two halves of the samples, at random: int64, in rising order."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    return [half.sort().values for half in order.chunk(2)]


def losses_of_the_other_half(
    recipe: Path, overrides: Sequence[str], runs: Path, number: int, parts: Sequence[Tensor]
) -> tuple[Tensor, Run]:
    """Trains on one half, ``parts[number]``, and reads the other, without augmentation.

    Returns the losses of the other half, in its order, and the run.
    """
    file = runs / f'half{number}.parquet'
    placed = [
        f'run_name=half{number}',
        f'save_folder={runs}',
        'progress_bar=false',
        f'algorithms.subset_selection={{strategy: file, path: {file}}}',
    ]
    checked = load_recipe(recipe, [*overrides, *placed])
    write_subset(file, parts[number], torch.ones(len(parts[number])), dataset=build_split(checked, 'train'), facts={})
    trainer = build_trainer(checked)
    try:
        trainer.fit()
        other = Subset(build_split(without_augmentation(checked), 'train'), parts[1 - number].tolist())
        losses = irreducible_losses(trainer.state.model, DataLoader(other, batch_size=500), device=checked.trainer.get('device'))
    finally:
        trainer.close()
    return losses, Run(Path(checked.run_name), read_summary(checked.run_folder / SUMMARY))


@record.bad_input_is_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the losses and their cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', type=Path)
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='settings on top of the recipe')
    parser.add_argument('--out', type=Path, default=Path('irreducible.npy'))
    parser.add_argument('--runs', type=Path, default=Path('runs/irreducible'), help='folder of the two trainings')
    parser.add_argument('--seed', type=int, default=0, help='of the halves')
    args = parser.parse_intermixed_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    parts = halves(len(build_split(load_recipe(args.recipe, args.overrides), 'train')), args.seed)
    found, runs = torch.empty(sum(map(len, parts))), []
    for number in (0, 1):
        losses, run = losses_of_the_other_half(args.recipe, args.overrides, args.runs, number, parts)
        found[parts[1 - number]] = losses
        runs.append(run)
    with whole_file(args.out) as unfinished, unfinished.open('wb') as file:
        np.save(file, found.numpy())
    cost = {unit: sum(spent(run, unit) for run in runs) for unit in UNITS}
    Path(f'{args.out}{COST}').write_text(json.dumps(cost) + '\n', encoding='utf-8')
    print(f'{args.out}: {len(found)} losses, mean {found.mean():.4f}; they took {cost["cpu_seconds"]:.0f} CPU seconds')
    return 0


if __name__ == '__main__':
    sys.exit(main())
