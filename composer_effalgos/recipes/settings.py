"""Reading and merging YAML settings, and finding the recipes of this package."""

from __future__ import annotations

import functools
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.files import read_text
from composer_effalgos.utils.text import one_line, shown

SWEEPS = 'sweeps'  # the folder of sweeps within a folder of recipes
MOST_LEVELS = 50
MOST_CHARACTERS = 4000  # per value; about the longest path on Linux
_MOST_VALUES = 100_000
_REFERENCE = re.compile(r'\$\{([^${}]*)\}')  # an interpolation without nested ones
_NAMED = ('algorithms.', 'callbacks.', 'loggers.')  # sections of names with arguments
TOO_DEEP = f'expected at most {MOST_LEVELS} levels of nesting'


def recipe_folder() -> Path:
    """Find the folder of recipes: ``yamls`` in the working directory, else in the installed package, else beside it (in a checkout)."""
    package = Path(__file__).parents[1]
    places = [Path('yamls'), package / 'yamls', package.parent / 'yamls']
    for place in places:
        if place.is_dir():
            return place
    raise InputError(f'no folder of recipes at {", ".join(map(str, places))}; give one: effalgos recipes DIR')


def list_recipes(folder: Path) -> list[tuple[Path, str]]:
    """Find the recipes in a folder, recursively, except in folders named ``sweeps``; it must hold at least one.

    Returns path and description (the comment in the first line) of each recipe, sorted by path.
    """
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder')
    paths = sorted([*folder.rglob('*.yaml'), *folder.rglob('*.yml')])
    paths = [path for path in paths if SWEEPS not in path.relative_to(folder).parts]
    if not paths:
        raise InputError(f'{folder}: no recipe (*.yaml) in it')
    return [(path, _first_comment(path)) for path in paths]


def first_difference(before: Any, now: Any, ignored: Callable[[str], bool]) -> tuple[str, Any, Any] | None:
    """Find the first key, in dot notation, in which two recipes differ; keys for which ``ignored`` is true do not count.

    Returns the key and its two values, or ``None``. Null is the same as a missing key.
    """
    flat_before, flat_now = _flat(before), _flat(now)
    for key in [*flat_now, *flat_before]:
        values = flat_before.get(key), flat_now.get(key)
        if values[0] != values[1] and not ignored(key):
            return key, *values
    return None


def _flat(settings: Any, prefix: str = '') -> dict[str, Any]:
    if settings is None and prefix.startswith(_NAMED) and prefix.count('.') == 1:
        settings = {}  # no arguments, but not a missing key
    if not isinstance(settings, dict) or not settings:
        return {prefix: settings}
    return {key: value for name, item in settings.items() for key, value in _flat(item, f'{prefix}.{name}' if prefix else name).items()}


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
    return lines[0].lstrip('# ').rstrip() if lines and lines[0].startswith('#') else ''


def read_settings(path: Path, overrides: Sequence[str | Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Read a YAML file of settings as plain data with interpolations resolved, without checking names and types.

    ``overrides`` are merged in order: ``key=value`` in OmegaConf's dot notation, or nested settings.
    """
    hint = 'give the path of a YAML file (effalgos recipes lists those at hand)'
    try:
        text = read_text(path)
    except OSError as error:
        raise InputError(f'{path}: expected a file, got none ({str(error.strerror).lower()}); {hint}') from error
    except UnicodeDecodeError as error:
        raise InputError(f'{path}: {_yaml_fault(error)}') from error
    except ValueError as error:  # a folder, a device, a null character in the path, or too large
        raise InputError(f'{path}: {error}; {hint}') from error
    try:
        document = _checked_yaml(text)
        if not isinstance(document, yaml.MappingNode) or not document.value:
            raise InputError(f'{path}: expected a mapping of settings, got none')
        config: Any = OmegaConf.create(text)
    except InputError:
        raise
    except Exception as error:  # PyYAML does not wrap what its constructors raise
        raise InputError(f'{path}: {_yaml_fault(error)}') from error
    return merge_settings(str(path), config, overrides, example='optimizer.lr=0.05')


def _checked_yaml(text: str) -> yaml.Node | None:
    """Parse YAML and reject text that nested anchors would expand to huge data (a YAML bomb), before anything expands it."""
    document = yaml.compose(text, yaml.SafeLoader)
    loader = yaml.SafeLoader('')
    nodes = [] if document is None else [document]
    levels = count = 0
    while nodes:
        levels, count = levels + 1, count + len(nodes)
        if levels > MOST_LEVELS:
            raise ValueError(TOO_DEEP)
        if count > _MOST_VALUES:
            raise ValueError(f'expected at most {_MOST_VALUES} values')
        for node in nodes:
            if isinstance(node, yaml.ScalarNode):
                _check_scalar(node, loader)
        inner = itertools.chain.from_iterable(_inside(node) for node in nodes)
        nodes = list(itertools.islice(inner, _MOST_VALUES))
    return document


def _check_scalar(node: yaml.ScalarNode, loader: yaml.SafeLoader) -> None:
    line = node.start_mark.line + 1
    if len(node.value) > MOST_CHARACTERS:
        raise ValueError(f'line {line}: expected at most {MOST_CHARACTERS} characters in a value, got {len(node.value)}')
    if node.tag == loader.resolve(yaml.ScalarNode, node.value, (True, False)):  # no explicit tag
        return
    try:
        loader.construct_object(node)
    except yaml.YAMLError:
        raise
    except Exception as error:  # KeyError, IndexError, AttributeError, ...
        tag = node.tag.replace('tag:yaml.org,2002:', '!!')
        raise ValueError(f'line {line}: expected text that fits its tag, got {tag} {shown(node.value)}') from error


def _yaml_fault(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return TOO_DEEP
    if isinstance(error, yaml.MarkedYAMLError):
        line = '' if error.problem_mark is None else f'line {error.problem_mark.line + 1}: '
        return f'{line}not valid YAML: {error.problem or one_line(error)}'
    kind = '' if isinstance(error, (ValueError, yaml.YAMLError, OSError, OmegaConfBaseException)) else f'{type(error).__name__}: '
    return f'not readable YAML: {kind}{one_line(error)}'


def _inside(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return itertools.chain.from_iterable(node.value)
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def merge_settings(source: str, settings: Any, overrides: Sequence[str | Mapping[str, Any]], *, example: str) -> dict[str, Any]:
    """Merge overrides into settings, as :func:`read_settings` does.

    ``source`` starts messages about the settings, an OmegaConf config or plain keys and values; ``example`` is a valid override, for the
    message about an invalid one.
    """
    config: Any = settings
    for override in overrides:
        try:
            config = OmegaConf.merge(config, _layer(override, example))
        except InputError:
            raise
        except Exception as error:  # as in read_settings
            raise InputError(f'override {str(override)[:200]!r}: {_yaml_fault(error)}') from error
    try:
        config = OmegaConf.create(config)
        _Interpolated(source, OmegaConf.to_container(config)).size(())
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(f'{source}: {one_line(error)}') from error
    except RecursionError as error:
        raise InputError(f'{source}: {TOO_DEEP}') from error
    assert isinstance(plain, dict)
    return typing.cast('dict[str, Any]', plain)


def _layer(override: str | Mapping[str, Any], example: str) -> Any:
    if not isinstance(override, str):
        return OmegaConf.create(dict(override))
    key, equals, value = override.partition('=')
    if not equals or not key.strip():
        raise InputError(f'override {override!r}: expected key=value, e.g. {example}')
    _checked_yaml(value)
    return OmegaConf.from_dotlist([override])


class _Interpolated:
    """Computes the size of settings after interpolation without resolving anything; ``source`` starts every message.

    References to references grow exponentially: ten nested lists, each of which refers to the previous one ten times, expand to 10**10
    values.
    """

    def __init__(self, source: str, settings: Any) -> None:
        self._source = source
        self._settings = settings
        self._sizes: dict[tuple[Any, ...], int | None] = {}  # by path; None while it is being found

    def size(self, path: tuple[Any, ...]) -> int:
        """An upper bound on the number of values at and below a path; strings count one more per 100 characters.

        Raises an ``InputError`` if it is too large, or an interpolation contains itself or is nested, so that its key is unknown before it
        is resolved.
        """
        if path not in self._sizes:
            self._sizes[path] = None
            node = functools.reduce(lambda value, key: value[key], path, self._settings)
            if isinstance(node, (dict, list)):
                size = 1 + sum(self.size((*path, key)) for key in (node if isinstance(node, dict) else range(len(node))))
            else:
                size = 1 + self._of_text(path, node) if isinstance(node, str) else 1
            if size > _MOST_VALUES:
                raise InputError(f'{self._source}: {_dotted(path)}: expected at most {_MOST_VALUES} values from interpolation, got more')
            self._sizes[path] = size
        found = self._sizes[path]
        if found is None:
            raise InputError(f'{self._source}: {_dotted(path)}: expected no interpolation that contains itself')
        return found

    def _of_text(self, path: tuple[Any, ...], text: str) -> int:
        references = _REFERENCE.findall(text)
        if len(references) != text.count('${'):
            raise InputError(f'{self._source}: {_dotted(path)}: expected interpolations such as ${{key}}, one not within another')
        # A resolver such as oc.decode can turn each character into a value
        own = len(text) if any(':' in reference for reference in references) else len(text) // 100
        return own + sum(self.size(target) for target in (self._target(path, reference) for reference in references) if target is not None)

    def _target(self, path: tuple[Any, ...], reference: str) -> tuple[Any, ...] | None:
        """The path that ``key``, ``.sibling`` or ``resolver:key`` refers to, as far as it is known; ``None`` if there is none."""
        key = reference.rpartition(':')[2].split(',')[0].strip(' \'"')
        up = len(key) - len(key.lstrip('.'))
        target: list[Any] = list(path[: max(len(path) - up, 0)]) if up else []
        node = functools.reduce(lambda value, key: value[key], target, self._settings)
        for name in filter(None, re.split(r'[.\[\]]', key)):
            if isinstance(node, str):  # itself an interpolation: count all that it refers to
                break
            found = _key(node, name)
            if found is None:
                return None
            target.append(found)
            node = node[found]
        return tuple(target) if key else None


def _key(node: Any, name: str) -> Any:
    """The mapping key or list index that a part of a reference names; ``None`` if there is none."""
    if isinstance(node, dict) and name in node:
        return name
    try:
        number = int(name)
    except ValueError:
        return None
    if isinstance(node, dict):
        return number if number in node else None
    return number % len(node) if isinstance(node, list) and -len(node) <= number < len(node) else None


def _dotted(path: tuple[Any, ...]) -> str:
    return '.'.join(map(str, path))
