"""The console script ``effalgos``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from composer_effalgos.errors import InputError
from composer_effalgos.recipe import list_recipes, recipe_folder

app = typer.Typer(name='effalgos', help='Data efficiency for MosaicML Composer.', no_args_is_help=True, add_completion=False)


@app.callback()
def _group() -> None:
    """Keep typer from making a single command the whole program."""


@app.command()
def recipes(folder: Annotated[Path | None, typer.Argument(help='Folder to look in; yamls/ by default.')] = None) -> None:
    """List the recipes, one line each."""
    for path, description in list_recipes(folder or recipe_folder()):
        typer.echo(f'{path}  {description}')


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
