"""The console script ``effalgos``."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import track

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.check import PORTION, check_images
from composer_effalgos.datasets.convert import convert as write_converted
from composer_effalgos.recipes.faults import explain, print_any_text
from composer_effalgos.recipes.schema import DatasetRecipe, load_recipe
from composer_effalgos.recipes.settings import SWEEPS, list_recipes, recipe_folder
from composer_effalgos.report import Outcome, run_search, run_sweep, show_frontier, write_report
from composer_effalgos.subset_selection.select_to_file import select_to_file
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import one_line

# click's ClickException; newer versions of typer contain a copy of it
_CommandError: type[typer.BadParameter] = typer.BadParameter.__mro__[2]  # type: ignore[assignment]

# options that several commands share
Overrides = Annotated[list[str] | None, typer.Argument(metavar='[key=value]...', help='Settings on top of every recipe.')]
Out = Annotated[Path | None, typer.Option(help='Folder for the runs and the report; runs/<name of the sweep> by default.')]
Seeds = Annotated[list[int] | None, typer.Option(help="Instead of the sweep's seeds; may be given several times.")]
Only = Annotated[list[str] | None, typer.Option(help='Train only this method; may be given several times.')]
Minutes = Annotated[float | None, typer.Option(help='Stop after this many minutes (exit status 3); run the same command to continue.')]
Jobs = Annotated[int, typer.Option(min=1, help='Runs in parallel, each with one thread.')]
Ranks = Annotated[int, typer.Option(min=1, help='Processes per run, one per GPU.')]
Fresh = Annotated[bool, typer.Option('--fresh', help='Train everything from scratch.')]

app = typer.Typer(name='effalgos', no_args_is_help=True, add_completion=False)


@app.command()
def recipes(folder: Annotated[Path | None, typer.Argument(help='Folder to look in; yamls/ by default.')] = None) -> None:
    """List the recipes, one per line, and then the sweeps."""
    folder = folder or recipe_folder()
    for path, description in list_recipes(folder):
        typer.echo(f'{path}  {description}')
    if (folder / SWEEPS).is_dir():
        typer.echo('\nSweeps, for effalgos bench:')
        for path, description in list_recipes(folder / SWEEPS):
            typer.echo(f'{path}  {description}')


@app.command()
def demo(out: Annotated[Path, typer.Option(help='Folder for the runs and the report.')] = Path('runs/demo')) -> None:
    """Train the small sweep yamls/sweeps/demo.yaml from scratch; print a table and write a report."""
    _exit(run_sweep(recipe_folder() / SWEEPS / 'demo.yaml', out, fresh=True))


@app.command()
def bench(
    sweep: Annotated[Path, typer.Argument(help='A YAML file; effalgos recipes lists those included in the project.')],
    overrides: Overrides = None,
    out: Out = None,
    seed: Seeds = None,
    only: Only = None,
    minutes: Minutes = None,
    jobs: Jobs = 1,
    ranks: Ranks = 1,
    fresh: Fresh = False,
    keep_checkpoints: Annotated[bool, typer.Option('--keep-checkpoints', help='Keep the checkpoints of finished runs.')] = False,
) -> None:
    """Train a sweep, or the unfinished part of it; write results.csv, results.json, report.html and report.md."""
    outcome = run_sweep(
        sweep,
        out,
        overrides or (),
        seeds=seed or (),
        only=only or (),
        max_parallel=jobs,
        minutes=minutes,
        ranks=ranks,
        fresh=fresh,
        keep_checkpoints=keep_checkpoints,
    )
    _exit(outcome)


@app.command()
def frontier(
    sweep: Annotated[Path, typer.Argument(help='A YAML file with plain runs of several lengths; or a folder of finished runs.')],
    overrides: Overrides = None,
    out: Out = None,
    by: Annotated[
        str | None, typer.Option(help='Unit of the budget: cpu_seconds (default on a CPU), seconds (default elsewhere), samples or steps.')
    ] = None,
    seed: Seeds = None,
    only: Only = None,
    minutes: Minutes = None,
    jobs: Jobs = 1,
    ranks: Ranks = 1,
    fresh: Fresh = False,
) -> None:
    """Does a method pay? Train a sweep, or the rest of it, and compare each method with plain training at equal budget."""
    if sweep.is_dir():
        if overrides or out or seed or only or fresh or minutes is not None or (jobs, ranks) != (1, 1):
            raise InputError(f'{sweep}: expected a sweep, got a folder of runs; it is only evaluated, so give only --by')
        show_frontier(sweep, by)
        return
    outcome = run_sweep(
        sweep,
        out,
        overrides or (),
        seeds=seed or (),
        only=only or (),
        max_parallel=jobs,
        minutes=minutes,
        ranks=ranks,
        fresh=fresh,
        equal_budget=True,
        by=by,
    )
    _exit(outcome)


@app.command()
def search(
    sweep: Annotated[Path, typer.Argument(help='A YAML file with search: axes.')],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help='Folder for the runs; runs/<name of the sweep> by default.')] = None,
    target: Annotated[float | None, typer.Option(help="The accuracy to reach; the last of the sweep's targets by default.")] = None,
    trials: Annotated[int, typer.Option(min=1, help='Combinations to train.')] = 30,
    seed: Annotated[int, typer.Option(help='Seed of the search and of the runs.')] = 17,
    minutes: Minutes = None,
    fresh: Fresh = False,
) -> None:
    """Search for the combination of settings that reaches an accuracy in the fewest seconds of training."""
    _exit(run_search(sweep, out, overrides or (), target=target, trials=trials, seed=seed, minutes=minutes, fresh=fresh))


def _exit(outcome: Outcome) -> None:
    for failure in outcome.failures:
        print(f'error: {failure}', file=sys.stderr)
    if outcome.status:
        raise typer.Exit(outcome.status)


@app.command()
def select(
    recipe: Annotated[Path, typer.Argument(help='A recipe with algorithms.subset_selection, which says how to select.')],
    out: Annotated[Path, typer.Option(help='The Parquet file to write: columns index and weight.')],
    overrides: Annotated[list[str] | None, typer.Argument(metavar='[key=value]...', help='Settings on top of the recipe.')] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to select with; the model's initial ones by default.")] = None,
) -> None:
    """Select a subset with a trained model and write it to a file, for training with strategy=file."""
    typer.echo(select_to_file(recipe, overrides or (), checkpoint, out))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that holds runs, one folder a run; or a run's own folder.")],
    out: Annotated[Path | None, typer.Option(help='Path of the HTML page; report.html in the folder by default.')] = None,
    target: Annotated[list[float] | None, typer.Option(help='An accuracy, e.g. 0.9; the table gives its first epoch.')] = None,
) -> None:
    """Compare the runs in a folder: an HTML page with curves and its table as Markdown."""
    typer.echo(write_report(folder, out, targets=target or ()))


@app.command()
def interpolate(
    a: Annotated[Path, typer.Argument(help='Checkpoint at alpha 0, e.g. of the small batch.')],
    b: Annotated[Path, typer.Argument(help='Checkpoint at alpha 1, e.g. of the large batch.')],
    recipe: Annotated[Path, typer.Option(help='The recipe that both were trained with.')],
    overrides: Annotated[list[str] | None, typer.Argument(metavar='key=value', help='Settings on top of the recipe.')] = None,
    out: Annotated[Path, typer.Option(help='Folder for the figure and the numbers.')] = Path('interpolation'),
    points: Annotated[int, typer.Option(help='Equal steps from -1 to 2; eight more lie around 0 and 1.')] = 25,
    samples: Annotated[int | None, typer.Option(help='Training samples to use; all by default.')] = None,
    sharpness_samples: Annotated[int | None, typer.Option(help='Number of these for the sharpness; all by default, 0 for none.')] = None,
    batch_size: Annotated[int, typer.Option(help='Samples per batch.')] = 500,
    epsilon: Annotated[list[float], typer.Option(help='Size of the box; may be given several times.')] = [1e-3, 5e-4],  # noqa: B006
    subspace: Annotated[int, typer.Option(help='Dimension of the random subspace; 0 for the whole space only.')] = 100,
    iterations: Annotated[int, typer.Option(help='Iterations of L-BFGS-B.')] = 10,
    seed: Annotated[int, typer.Option(help='Seed of samples, subspace and search.')] = 17,
    name_a: Annotated[str, typer.Option(help='What A is called in the figure.')] = 'A',
    name_b: Annotated[str, typer.Option(help='What B is called in the figure.')] = 'B',
) -> None:
    """Loss and accuracy along the line through two checkpoints, and the sharpness of each."""
    from composer_effalgos import landscape

    if out.exists() and not out.is_dir():
        raise InputError(f'--out: expected a folder, got the file {out}')
    settings = landscape.Settings(points, samples, sharpness_samples, batch_size, tuple(epsilon), subspace, iterations, seed)
    study = landscape.interpolate(a, b, load_recipe(recipe, overrides or []), settings, progress=typer.echo)
    for path in study.write(out, (name_a, name_b)):
        typer.echo(path)


@app.command()
def critical_batch(
    recipe: Annotated[Path, typer.Argument(help='A recipe whose learning rate fits its batch size.')],
    overrides: Annotated[list[str] | None, typer.Argument(metavar='[key=value]...', help='Settings on top of the recipe.')] = None,
    out: Annotated[Path, typer.Option(help='Folder for branches and results; finished branches are kept.')] = Path('critical_batch'),
    checkpoint: Annotated[Path | None, typer.Option(help='Checkpoint to branch off from; the start of the run by default.')] = None,
    window: Annotated[str, typer.Option(help='Length of a branch: epochs, samples (2Msp) or tokens (50Mtok).')] = '1ep',
    size: Annotated[list[int] | None, typer.Option(help="Batch size over all ranks; by default the recipe's times 1, 2, 4, 8, 16.")] = None,
    tolerance: Annotated[float, typer.Option(help='Allowed excess of the training loss over that of the smallest size.')] = 0.01,
    lr: Annotated[str, typer.Option(help='How the learning rate follows the size: auto, sqrt, linear or none.')] = 'auto',
) -> None:
    """Measure the batch size above which larger batches stop paying: short runs at several sizes from one checkpoint."""
    from composer_effalgos.adabatch.critical_batch import NAME, measure

    found = measure(
        load_recipe(recipe, overrides or []), out, checkpoint=checkpoint, window=window, sizes=size or (), tolerance=tolerance, lr=lr
    )
    typer.echo(f'critical batch size: {found} ({out / NAME}.md, .svg, .json)')


@app.command()
def check_data(
    source: Annotated[Path, typer.Argument(help='A recipe, or a folder that holds train/CLASS/ and val/CLASS/.')],
    overrides: Annotated[list[str] | None, typer.Argument(help='Settings on top of the recipe, e.g. dataset.path=data.')] = None,
    workers: Annotated[int, typer.Option(help='Number of decoding processes.', min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help='File for the list of broken images.')] = None,
) -> None:
    """Decode every image of a dataset; list broken ones and exit with status 1 if there are any."""
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f'--out: expected a file in a folder that exists, got {out}')
    if source.is_dir():
        data = DatasetRecipe(name='image_folder', batch_size=1, path=str(source))
    elif source.suffix not in ('.yaml', '.yml'):
        raise InputError(f'SOURCE: expected a recipe (*.yaml) or a folder with train/CLASS/ and val/CLASS/, got {source}')
    else:
        data = load_recipe(source, overrides or []).dataset
    broken: list[str] = []
    read = 0
    splits: tuple[Literal['train', 'eval'], ...] = ('train', 'eval')
    for split in splits:
        dataset: Any = build_dataset(data.name, split, path=data.path, **data.options)
        portions = math.ceil(len(dataset) / PORTION)
        for messages in track(check_images(dataset, workers), f'{split}: {len(dataset)} images', portions, console=Console(stderr=True)):
            broken += messages
        read += len(dataset)
    for message in broken:
        print(message)
    if out is not None:
        out.write_text(''.join(f'{message}\n' for message in broken), encoding='utf-8')
    print(f'{read} images read, {len(broken)} broken')
    if broken:
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help='A recipe, or the name of a dataset.')],
    overrides: Annotated[list[str] | None, typer.Argument(metavar='[key=value]...', help='Settings of either, e.g. path=data.')] = None,
    to: Annotated[str, typer.Option(help='ffcv or mds for images, mds or tokens for text.')] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help='Folder to write into.')] = ...,  # type: ignore[assignment]
    shard_mb: Annotated[float, typer.Option(help='Size of an MDS shard, in units of 2^20 bytes, below 4096.')] = 64,
    shuffle: Annotated[int | None, typer.Option(min=0, help='Write training samples in the random order of this seed.')] = None,
) -> None:
    """Write a dataset as ffcv's .beton files, as MDS shards or as files of tokens (train.bin, val.bin)."""
    check_number('--shard-mb', shard_mb, least=0.001, below=4096)
    typer.echo(write_converted(source, overrides or (), to, out, shard_bytes=int(shard_mb * 2**20), shuffle=shuffle))


@app.callback()
def options(traceback: Annotated[bool, typer.Option('--traceback', help='Show where in the program an error came from.')] = False) -> None:
    """Data efficiency for MosaicML Composer."""  # main() reads the option from sys.argv if there is an error


def main() -> int:
    """Runs the command line; invalid input gives one line on stderr and exit status 2."""
    print_any_text()
    try:
        sys.exit(app(standalone_mode=False) or 0)  # the return value is the status of typer.Exit; commands return None
    except typer.Abort:
        return 130  # KeyboardInterrupt in older versions of typer
    except _CommandError as error:
        if type(error).__name__ == 'NoArgsIsHelpError':
            error.show()
        else:
            print(f'error: {one_line(error.format_message())}', file=sys.stderr)
        return error.exit_code
    except Exception as error:
        explained = explain(error)
        if explained is None or '--traceback' in sys.argv[1:2]:
            raise
        print(f'error: {explained[0]}', file=sys.stderr)
        return explained[1]


if __name__ == '__main__':
    sys.exit(main())
