"""Settings in YAML, read and merged, and where the project's own lie."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_text
from composer_effalgos.utils.text import one_line

__all__ = ['MOST_LEVELS', 'SWEEPS', 'TOO_DEEP', 'list_recipes', 'merge_settings', 'read_settings', 'recipe_folder']

SWEEPS = 'sweeps'  # the folder of the sweeps, among those of the recipes
MOST_LEVELS = 50
_MOST_NODES = 100_000
TOO_DEEP = f'expected at most {MOST_LEVELS} levels of nesting'


def recipe_folder() -> Path:
    """Where the recipes that come with the project lie.

    Returns:
        ``yamls`` in the working directory, else in the installed package, else beside it (a checkout).

    Raises:
        InputError: It is in none of these places.
    """
    package = Path(__file__).parents[1]
    places = [Path('yamls'), package / 'yamls', package.parent / 'yamls']
    for place in places:
        if place.is_dir():
            return place
    raise InputError(f'no folder of recipes at {", ".join(map(str, places))}; give one: effalgos recipes DIR')


def list_recipes(folder: Path) -> list[tuple[Path, str]]:
    """Find the recipes in a folder and its subfolders; those named ``sweeps`` hold no recipes.

    Args:
        folder: Where to look.

    Returns:
        Path and description (the comment on the file's first line) of each, sorted by path.

    Raises:
        InputError: No such folder, or no recipe in it.
    """
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder')
    paths = sorted([*folder.rglob('*.yaml'), *folder.rglob('*.yml')])
    paths = [path for path in paths if SWEEPS not in path.relative_to(folder).parts]
    if not paths:
        raise InputError(f'{folder}: no recipe (*.yaml) in it')
    return [(path, _first_comment(path)) for path in paths]


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
    return lines[0].lstrip('# ').rstrip() if lines and lines[0].startswith('#') else ''


def read_settings(path: Path, overrides: Sequence[str | Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Read a YAML file of settings, unchecked.

    Args:
        path: The YAML file.
        overrides: What is merged on top in turn: ``key=value`` in OmegaConf's dot notation, or nested settings.

    Returns:
        Plain data, interpolations resolved.

    Raises:
        InputError: No such file, broken YAML, or an override that does not fit.
    """
    if not path.is_file():
        raise InputError(f'{path}: no such recipe; give the path of a YAML file (effalgos recipes lists those at hand)')
    try:
        text = read_text(path)
        document = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(document, yaml.MappingNode) or not document.value:
            raise InputError(f'{path}: expected keys and values (dataset: ..., model: ..., optimizer: ...), found none')
        _check_size(document)
        config: Any = OmegaConf.create(text)
    except yaml.MarkedYAMLError as error:
        line = '' if error.problem_mark is None else f'line {error.problem_mark.line + 1}: '
        raise InputError(f'{path}: {line}not valid YAML: {error.problem or one_line(error)}') from error
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, OSError, OmegaConfBaseException) as error:
        raise InputError(f'{path}: not a readable YAML file: {one_line(error)}') from error
    except RecursionError as error:
        raise InputError(f'{path}: {TOO_DEEP}') from error
    return merge_settings(str(path), config, overrides, example='optimizer.lr=0.05')


def _check_size(document: yaml.Node) -> None:
    """Refuses YAML that is small as text and large as data, by anchors that refer to others, before anything copies it."""
    nodes = [document]
    levels = count = 0
    while nodes:
        levels, count = levels + 1, count + len(nodes)
        if levels > MOST_LEVELS:
            raise ValueError(TOO_DEEP)
        if count > _MOST_NODES:
            raise ValueError(f'expected at most {_MOST_NODES} values')
        inner = itertools.chain.from_iterable(_inside(node) for node in nodes)
        nodes = list(itertools.islice(inner, _MOST_NODES))


def _inside(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return itertools.chain.from_iterable(node.value)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def merge_settings(source: str, settings: Any, overrides: Sequence[str | Mapping[str, Any]], *, example: str) -> dict[str, Any]:
    """Merge overrides into settings.

    Args:
        source: Where the settings come from; begins a message about them.
        settings: An OmegaConf config, or plain keys and values.
        overrides: What is merged on top in turn: ``key=value`` in OmegaConf's dot notation, or nested settings.
        example: An override that would be right, for the message about one that is none.

    Returns:
        Plain data, interpolations resolved.

    Raises:
        InputError: An override that does not fit, or an interpolation that leads nowhere.
    """
    config: Any = settings
    for override in overrides:
        if isinstance(override, str):
            key, equals, _ = override.partition('=')
            if not equals or not key.strip():
                raise InputError(f'override {override!r}: expected key=value, e.g. {example}')
        try:
            layer = OmegaConf.from_dotlist([override]) if isinstance(override, str) else OmegaConf.create(dict(override))
            config = OmegaConf.merge(config, layer)
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
            raise InputError(f'override {str(override)[:200]!r}: {one_line(error)}') from error
    try:
        plain = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(f'{source}: {one_line(error)}') from error
    except RecursionError as error:
        raise InputError(f'{source}: {TOO_DEEP}') from error
    assert isinstance(plain, dict)
    return typing.cast('dict[str, Any]', plain)
