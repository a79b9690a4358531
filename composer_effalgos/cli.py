"""The console script ``effalgos``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from composer_effalgos.bench import run_demo, write_report
from composer_effalgos.errors import InputError
from composer_effalgos.recipe import list_recipes, recipe_folder

app = typer.Typer(name='effalgos', help='Data efficiency for MosaicML Composer.', no_args_is_help=True, add_completion=False)


@app.command()
def recipes(folder: Annotated[Path | None, typer.Argument(help='Folder to look in; yamls/ by default.')] = None) -> None:
    """List the recipes, one line each."""
    for path, description in list_recipes(folder or recipe_folder()):
        typer.echo(f'{path}  {description}')


@app.command()
def demo(out: Annotated[Path, typer.Option(help='Folder for the runs and the report.')] = Path('runs/demo')) -> None:
    """Train the digits recipes one after the other; print a table and write a report."""
    failures = run_demo(out)
    for failure in failures:
        print(f'error: {failure}', file=sys.stderr)
    if failures:
        raise typer.Exit(1)


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
