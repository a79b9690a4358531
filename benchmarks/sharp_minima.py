"""Small batch against large batch (Keskar et al., arXiv 1609.04836): both trainings, the line between the solutions, their sharpness.

One network of ``yamls/cifar10/cifar10_keskar_*.yaml`` on CIFAR-10. The training stops after ``--minutes``, and the same command goes on
with it (exit status 3 until both runs are done); then it writes ``sharp_minima_<network>`` (.md, .json, .csv, .png, .svg) to ``--out``.

On a GPU, C1 for as many epochs as the paper: python benchmarks/sharp_minima.py --data data
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record

from composer_effalgos.landscape import Settings, Study, interpolate
from composer_effalgos.monitor import SUMMARY
from composer_effalgos.recipes.build import checkpoint_folder
from composer_effalgos.recipes.schema import Recipe
from composer_effalgos.recipes.settings import recipe_folder
from composer_effalgos.report import Sweep, run_jobs

NETWORKS = ('c1', 'c2', 'vgg11_bn')


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', help='folder of CIFAR-10')
    parser.add_argument('--network', choices=NETWORKS, default='c1')
    parser.add_argument('--epochs', type=int, default=100)
    parser.add_argument('--batches', type=int, nargs=2, default=(256, 5000), metavar=('SMALL', 'LARGE'))
    parser.add_argument('--set', action='append', default=[], dest='overrides', metavar='key=value', help='on top of both recipes')
    parser.add_argument('--minutes', type=float, help='stop the training after so many; the same command goes on')
    parser.add_argument('--samples', type=int, help='training samples for the curve; all by default')
    parser.add_argument('--sharpness-samples', type=int, help='of these for the sharpness; all by default')
    parser.add_argument('--runs', type=Path, default=Path('runs/sharp_minima'), help='folder of the two runs')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'))
    return parser.parse_args(argv)


def describe(study: Study, name: str, recipes: Sequence[Recipe], summaries: Sequence[dict[str, Any]]) -> str:
    """The tables of the Markdown file, and the figure."""
    about = study.about
    at = {point.alpha: point for point in study.points}
    rows = []
    for solution, place, recipe, summary in zip('AB', (0.0, 1.0), recipes, summaries, strict=True):
        point, totals = at[place], summary['totals']
        rows.append(
            [
                f'{recipe.dataset.batch_size:,}',
                f'{sum(epoch["batches"] for epoch in summary["epochs"]):,}',
                f'{totals["train_seconds"]:.0f}',
                f'{100 * study.as_saved[solution]["test_accuracy"]:.2f}',
                f'{100 * point.test_accuracy:.2f}',
                f'{point.test_loss:.3f}',
                f'{100 * point.train_accuracy:.2f}',
                f'{point.train_loss:.3f}',
                f'{study.distances[solution]:.1f}',
            ]
        )
    header = ['batch', 'steps', 'train s', 'test % as saved', 'test %', 'test loss', 'train %', 'train loss', 'norm of the weights']
    sharpness = {(row['solution'], row['space'], row['epsilon']): row['sharpness'] for row in study.sharpness}
    kinds = sorted({key[1:] for key in sharpness}, key=lambda kind: (kind[0] != 'full', -kind[1]))
    risen = [[space, f'{epsilon:g}', *(f'{sharpness[solution, space, epsilon]:.2f}' for solution in 'AB')] for space, epsilon in kinds]
    first = recipes[0]
    training = f'{first.model.name} {json.dumps(first.model.options)}, {json.dumps(first.settings["optimizer"])}, {first.max_duration}'
    return '\n'.join(
        [
            f'{training}, seed {first.seed}, algorithms {json.dumps(first.settings.get("algorithms") or {})}. '
            f'{about["parameters"]:,} parameters; the batches start from the same weights and are {study.distances["B - A"]:.1f} apart.\n',
            'Losses and accuracies with the batch norms’ statistics re-estimated on the training images, but for the column “as saved”.\n',
            record.table(header, rows),
            f'![loss and accuracy along the line]({name}.png)\n',
            f'`{name}.csv` has the numbers: {len(study.points)} points, {about["train_samples"]:,} training and '
            f'{about["test_samples"]:,} test images, none augmented.\n',
            '## Sharpness\n',
            f'Rise of the training loss in percent of 1 + loss, found by {about["settings"]["iterations"]} iterations of L-BFGS-B on '
            f'{about["sharpness_samples"]:,} training images in batches of {about["settings"]["batch_size"]} '
            '(batch norms with the statistics of each batch, no dropout); it is a lower bound of the maximum in the box.\n',
            record.table(['space', 'epsilon', *(f'batch {recipe.dataset.batch_size:,}' for recipe in recipes)], risen),
        ]
    )


@record.bad_input_is_one_line
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    overrides = [f'max_duration={args.epochs}ep', *([f'dataset.path={json.dumps(args.data)}'] if args.data else []), *args.overrides]
    recipe = f'cifar10/cifar10_keskar_{args.network}.yaml'
    methods = {f'{args.network}_{batch}': {'recipe': recipe, 'dataset': {'batch_size': batch}} for batch in args.batches}
    jobs = Sweep('sharp_minima', recipe_folder() / recipe, methods=methods).jobs(args.runs, overrides)
    outcome = run_jobs(jobs, args.runs, minutes=args.minutes, keep_checkpoints=True)
    for failure in outcome.failures:
        print(f'error: {failure}', file=sys.stderr)
    if outcome.status:
        return outcome.status
    recipes = [job.recipe for job in jobs]
    a, b = (checkpoint_folder(recipe) / 'latest-rank0.pt' for recipe in recipes)
    settings = Settings(samples=args.samples, sharpness_samples=args.sharpness_samples)
    study = interpolate(a, b, recipes[0], settings, progress=lambda line: print(line, flush=True))
    name = f'sharp_minima_{args.network}'
    small, large = (f'batch {recipe.dataset.batch_size:,}' for recipe in recipes)
    study.write(args.out, (small, large), name)
    summaries = [json.loads((recipe.run_folder / SUMMARY).read_text(encoding='utf-8')) for recipe in recipes]
    title = f'Small and large batch, {recipes[0].model.name} on {recipes[0].dataset.name}'
    record.write(args.out, name, study.numbers(), describe(study, name, recipes, summaries), title=title)
    return 0


if __name__ == '__main__':
    sys.exit(main())
