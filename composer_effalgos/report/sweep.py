"""Sweeps: many runs described in one YAML file.

A sweep has named methods; each method is a recipe with overrides, trained once per seed:

    recipe: digits/digits_baseline.yaml        # default recipe; relative to this file, else to the recipe folder
    seeds: [17, 18, 19]
    targets: [0.9, 0.95]                       # accuracies for which the report gives the first epoch above
    settings: {max_duration: 8ep}              # override every recipe
    methods:
      baseline: {}                             # no overrides
      infobatch: {algorithms: {infobatch: {prune_ratio: 0.5}}}
      adabatch: {recipe: digits/digits_adabatch.yaml, seeds: [17]}
    matrix:                                    # every combination of one choice per axis, named by its choices: glister+blurpool
      strategy: {glister: {algorithms: {subset_selection: {strategy: glister}}}}
      with: {plain: {}, blurpool: {algorithms: {blurpool: {}}}}      # a choice without settings is not in the name
"""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer.core import TimeUnit, ensure_time

from composer_effalgos.recipes.schema import Recipe, parse_recipe
from composer_effalgos.recipes.settings import read_settings, recipe_folder
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean
from composer_effalgos.utils.type_hints import check_fields, check_type

# Settings that the sweep sets in every recipe
_PLACED = {
    'run_name': 'expected no such key in a sweep, which names its runs by method and seed; rename the method',
    'save_folder': 'expected no such key in a sweep; give the folder with --out',
    'seed': 'expected no such key in a sweep; give seeds: [...], or --seed',
}
MOST_RUNS = 10_000  # limit of a sweep or search: more is a mistake, and takes minutes just to list


@dataclass(frozen=True)
class Job:
    """One run of a sweep: a method with a seed.

    Attributes:
        method: The method's name.
        recipe: The checked recipe, with all overrides.
    """

    method: str
    recipe: Recipe

    @property
    def epochs(self) -> int | None:
        """Length of the run in epochs; None if it is given in another unit."""
        duration = ensure_time(self.recipe.max_duration, TimeUnit.EPOCH)
        return int(duration) if duration.unit == TimeUnit.EPOCH else None


@dataclass(frozen=True)
class Method:
    """A method of a sweep: a recipe, its seeds, and layers of overrides that are merged into the recipe in order."""

    recipe: Path
    seeds: list[int]
    layers: list[dict[str, Any]]


@dataclass(frozen=True)
class Sweep:
    """A sweep as defined in its file.

    Attributes:
        name: The file's name without extension.
        path: The file.
        recipe: The default recipe of the methods.
        seeds: The default seeds of the methods.
        targets: Accuracies in (0, 1] for which the report gives the first epoch above and the seconds until then.
        settings: Overrides of every recipe.
        methods: Overrides of each method's recipe, and optionally its own ``recipe`` and ``seeds``, by name.
        matrix: Axes with named choices; every combination is a method too.
        search: Axes for ``effalgos search``, in the same form.
    """

    name: str
    path: Path
    recipe: str | None = None
    seeds: list[int] = field(default_factory=lambda: [17])
    targets: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, Any] = field(default_factory=dict)
    matrix: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] = field(default_factory=dict)

    def all_methods(self) -> dict[str, Method]:
        """Returns the methods and the combinations of the matrix, by name, in order; each name must occur once."""
        named: list[tuple[str, list[Any]]] = [(name, [layer]) for name, layer in self.methods.items()]
        if self.matrix:
            named += [combine(dict(choices)) for choices in itertools.product(*(axis.items() for axis in self.matrix.values()))]
        found: dict[str, Method] = {}
        for name, layers in named:
            if name in found:
                raise InputError(f'{self.path}: {name}: two methods have this name; rename one')
            found[name] = self.method(name, layers)
        return found

    def method(self, name: str, layers: Sequence[Any]) -> Method:
        """Builds a method, whose ``layers`` override the sweep's ``settings``, and checks it as far as possible without its recipe."""
        recipe, seeds, settings = self.recipe, self.seeds, [self.settings]
        for layer in layers:
            layer = {} if layer is None else layer
            check_type(f'{self.path}: {name}', layer, dict)
            recipe, seeds = layer.get('recipe', recipe), layer.get('seeds', seeds)
            settings.append({key: value for key, value in layer.items() if key not in ('recipe', 'seeds')})
        if recipe is None:
            raise InputError(f'{self.path}: {name}: no recipe; give the method, or the sweep, a recipe: FILE.yaml')
        check_type(f'{self.path}: {name}: recipe', recipe, str)
        check_type(f'{self.path}: {name}: seeds', seeds, list[int])
        beside = self.path.parent / recipe
        return Method(beside if beside.is_file() else recipe_folder() / recipe, seeds, settings)

    def job(self, name: str, method: Method, seed: int, out: Path, overrides: Sequence[str] = ()) -> Job:
        """Builds one run, saved in ``out``, and checks its recipe; ``overrides`` are applied last and may not set what the sweep sets."""
        for key in _PLACED:
            if any(key in layer for layer in method.layers) or any(item.split('=')[0].strip() == key for item in overrides):
                raise InputError(f'{self.path}: {name}: {key}: {_PLACED[key]}')
        run_name = f'{name}_seed{seed}'
        # Do not affect what is compared. With save_interval, a stopped run is expected to resume from its last checkpoint.
        placed = {'run_name': run_name, 'seed': seed, 'save_folder': str(out), 'progress_bar': False}
        settings = read_settings(method.recipe, [*method.layers, *overrides, placed])
        if settings.get('save_interval') is not None:
            settings = {'save_num_checkpoints_to_keep': 1} | settings | {'autoresume': True}
        return Job(name, parse_recipe(settings, source=f'{self.path}: {name}', run_name=run_name))

    def jobs(self, out: Path, overrides: Sequence[str] = (), *, seeds: Sequence[int] = (), only: Sequence[str] = ()) -> list[Job]:
        """Builds all runs of the sweep, saved in ``out``, and checks their recipes.

        Runs are ordered by seed, so that an interrupted sweep has complete comparisons. ``overrides`` are applied last; if not empty,
        ``seeds`` replace all seeds of the sweep, and only the methods named in ``only`` are included.
        """
        methods = self.all_methods()
        if not methods:
            raise InputError(f'{self.path}: no methods; give at least one under methods: or matrix:')
        count = sum(len(seeds or method.seeds) for name, method in methods.items() if not only or name in only)
        _check_count(f'{self.path}: seeds', count)
        for name in only:
            if name not in methods:
                raise InputError(f'{self.path}: no method {name!r}; {did_you_mean(name, methods)}')
        found = [
            (number, self.job(name, method, seed, out, overrides))
            for name, method in methods.items()
            if not only or name in only
            for number, seed in enumerate(seeds or method.seeds)
        ]
        return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def combine(choices: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Returns the name and the layers of a combination: the settings of the choice on each axis, by the choice's name.

    The name joins the choices that have settings by ``+``, and is ``baseline`` if none has.
    """
    return '+'.join(name for name, layer in choices.items() if layer) or 'baseline', list(choices.values())


def load_sweep(path: str | Path) -> Sweep:
    """Reads and checks a sweep; :meth:`Sweep.jobs` reads and checks the recipes."""
    path = Path(path)
    settings = read_settings(path)
    hints = {name: hint for name, hint in typing.get_type_hints(Sweep).items() if name not in ('name', 'path')}
    check_fields(f'{path}: ', settings, hints)
    sweep = Sweep(name=path.stem, path=path, **settings)
    for key, axes in (('matrix', sweep.matrix), ('search', sweep.search)):
        for axis, choices in axes.items():
            check_type(f'{path}: {key}.{axis}', choices, dict)
        _check_count(f'{path}: {key}', math.prod(map(len, axes.values())))
        names = [choice for choices in axes.values() for choice in choices]
        for choice in names:
            _check_name(f'{path}: {key}', choice)
            if names.count(choice) > 1:
                raise InputError(f'{path}: {key}: two choices are named {choice!r}; rename one')
    for name in sweep.methods:
        _check_name(f'{path}: methods', name)
    if not all(0 < target <= 1 for target in sweep.targets):
        raise InputError(f'{path}: targets: expected accuracies in (0, 1], got {sweep.targets}')
    if not sweep.seeds:
        raise InputError(f'{path}: seeds: expected at least one, got []')
    sweep.all_methods()
    return sweep


def _check_count(key: str, count: int) -> None:
    if count > MOST_RUNS:
        raise InputError(f'{key}: expected at most {MOST_RUNS} runs, got {count}; leave choices out, or make several sweeps')


def _check_name(key: str, name: Any) -> None:
    """Rejects names that YAML does not read as strings, such as 0.1, on and 17."""
    if not isinstance(name, str):
        raise InputError(f"{key}: {name!r} is no name; put it in quotes, such as '{name}'")
