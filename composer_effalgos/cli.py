"""The console script ``effalgos``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from composer_effalgos.bench import Outcome, run_sweep, write_report
from composer_effalgos.errors import InputError
from composer_effalgos.recipe import SWEEPS, list_recipes, recipe_folder

app = typer.Typer(name='effalgos', help='Data efficiency for MosaicML Composer.', no_args_is_help=True, add_completion=False)


@app.command()
def recipes(folder: Annotated[Path | None, typer.Argument(help='Folder to look in; yamls/ by default.')] = None) -> None:
    """List the recipes, one line each, and after them the sweeps."""
    folder = folder or recipe_folder()
    for path, description in list_recipes(folder):
        typer.echo(f'{path}  {description}')
    if (folder / SWEEPS).is_dir():
        typer.echo('\nSweeps, for effalgos bench:')
        for path, description in list_recipes(folder / SWEEPS):
            typer.echo(f'{path}  {description}')


@app.command()
def demo(out: Annotated[Path, typer.Option(help='Folder for the runs and the report.')] = Path('runs/demo')) -> None:
    """Train the small sweep yamls/sweeps/demo.yaml anew; print a table and write a report."""
    _exit(run_sweep(recipe_folder() / SWEEPS / 'demo.yaml', out, fresh=True))


@app.command()
def bench(
    sweep: Annotated[Path, typer.Argument(help='A YAML file; effalgos recipes lists those that come with the project.')],
    overrides: Annotated[list[str] | None, typer.Argument(metavar='[key=value]...', help='Settings on top of every recipe.')] = None,
    out: Annotated[Path | None, typer.Option(help='Folder for the runs and the report; runs/<name of the sweep> by default.')] = None,
    seed: Annotated[list[int] | None, typer.Option(help="In place of the sweep's seeds; may be given several times.")] = None,
    only: Annotated[list[str] | None, typer.Option(help='Train this method alone; may be given several times.')] = None,
    minutes: Annotated[float | None, typer.Option(help='Stop after so many (exit status 3); the same command goes on.')] = None,
    ranks: Annotated[int, typer.Option(min=1, help='Processes a run, one a GPU.')] = 1,
    fresh: Annotated[bool, typer.Option('--fresh', help='Train everything anew.')] = False,
    keep_checkpoints: Annotated[bool, typer.Option('--keep-checkpoints', help='Keep the checkpoints of finished runs.')] = False,
) -> None:
    """Train a sweep, or what is left of it; write results.csv, results.json, report.html and report.md."""
    outcome = run_sweep(
        sweep,
        out,
        overrides or (),
        seeds=seed or (),
        only=only or (),
        minutes=minutes,
        ranks=ranks,
        fresh=fresh,
        keep_checkpoints=keep_checkpoints,
    )
    _exit(outcome)


def _exit(outcome: Outcome) -> None:
    for failure in outcome.failures:
        print(f'error: {failure}', file=sys.stderr)
    if outcome.status:
        raise typer.Exit(outcome.status)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help='Folder that holds runs, one folder a run.')],
    out: Annotated[Path | None, typer.Option(help='Path of the page; report.html in the folder by default.')] = None,
) -> None:
    """Compare the runs in a folder: an HTML page with curves, and its table as Markdown."""
    typer.echo(write_report(folder, out))


def main() -> int:
    """Run the command line; bad input is one line on stderr and exit status 2."""
    try:
        app()
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
