"""The recipe schema: a run described in YAML, fully checked before anything is built.

This module's dataclasses define our own keys. Everything else is checked against the signatures of the classes that a recipe names (see
:mod:`composer_effalgos.recipes.components`), so Composer's settings are not defined again here.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.core import Precision, Time, TimeUnit

from composer_effalgos.datasets.registry import DATASETS
from composer_effalgos.loaders import GIVEN, LOADERS
from composer_effalgos.models import MODELS
from composer_effalgos.models.language import LANGUAGE_MODELS, TEXT_CLASSIFIERS
from composer_effalgos.recipes import components
from composer_effalgos.recipes.arguments import check_arguments, parameters
from composer_effalgos.recipes.components import Component, find
from composer_effalgos.recipes.faults import explain, is_ours, responsible_component
from composer_effalgos.recipes.limits import check_duration, check_run_name, check_save_folder, check_trainer, check_values
from composer_effalgos.recipes.settings import read_settings
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean
from composer_effalgos.utils.type_hints import check_fields, check_type, describe, takes_time


@dataclass(frozen=True)
class DatasetRecipe:
    """The ``dataset`` section; keys not listed here are options of the dataset.

    Attributes:
        name: A dataset name for :func:`composer_effalgos.datasets.build_dataset`.
        batch_size: Training samples per step, over all ranks.
        path: Folder of the data, if the dataset needs one.
        eval_batch_size: Evaluation samples per step, over all ranks; null for ``batch_size``.
        num_workers: Worker processes per loader and rank.
        drop_last: Drop an incomplete last training batch.
        pin_memory: Use pinned memory; null to use it when training on a GPU.
        prefetch_factor: Batches that each worker loads ahead; null for the ``DataLoader`` default.
        options: Options of the dataset.
    """

    name: str
    batch_size: int
    path: str | None = None
    eval_batch_size: int | None = None
    num_workers: int = 0
    drop_last: bool = False
    pin_memory: bool | None = None
    prefetch_factor: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelRecipe:
    """The ``model`` section; keys not listed here are options of the model.

    Attributes:
        name: A model name for :func:`composer_effalgos.models.build_model`, or of a language model or text classifier.
        num_classes: Number of outputs; null for the dataset's number of classes.
        pretrained: True for the library's weights, or the name or file of weights.
        train_metrics: Compute accuracy on each training batch, as Composer does by default. This costs host time in every step (see
            docs/data_paths.md), and with pruning or subset selection it is not the accuracy on the training set.
        options: Options of the model.
    """

    name: str
    num_classes: int | None = None
    pretrained: bool | str = False
    train_metrics: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: every name exists and all arguments match their signatures.

    Besides these keys, a recipe may set any other argument of :class:`composer.Trainer` (``device``, ``eval_interval``,
    ``save_interval``, ``load_path``, ``autoresume``, ``device_train_microbatch_size``, ``progress_bar``, ...).

    Attributes:
        dataset: The dataset and its batching.
        model: The model.
        optimizer: ``name`` (of torch, Composer or timm) and arguments.
        max_duration: Length of training, as a time string or a number of epochs.
        run_name: Name of the run and of its folder; by default the file name without suffix.
        seed: Seed for weights, sample order and all other random draws.
        precision: Composer precision. On the CPU, ``amp_bf16`` uses autocast if the CPU supports bfloat16, and all else runs in fp32. Null
            for Composer's default for the device.
        save_folder: The run's files are saved to ``<save_folder>/<run_name>``.
        scheduler: ``name`` and arguments of a Composer scheduler or ``one_cycle``.
        loader: The data loader: a name in :data:`composer_effalgos.loaders.LOADERS`, with or without options; null, or ``workers`` in the
            file, for worker processes.
        algorithms: Names with arguments.
        callbacks: Names with arguments.
        loggers: Names with arguments.
        trainer: Other arguments of the Trainer.
        source: File name, for messages.
        settings: The recipe as plain data, with overrides.
    """

    dataset: DatasetRecipe
    model: ModelRecipe
    optimizer: Component
    max_duration: str | int
    run_name: str
    seed: int = 17
    precision: str | None = None
    save_folder: str = 'runs'
    scheduler: Component | None = None
    loader: Component | None = None
    algorithms: list[Component] = field(default_factory=list)
    callbacks: list[Component] = field(default_factory=list)
    loggers: list[Component] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)
    source: str = ''
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def run_folder(self) -> Path:
        """The folder of this run's files."""
        return Path(self.save_folder) / self.run_name

    @property
    def components(self) -> list[Component]:
        """All components except dataset, loader and model."""
        schedule = [] if self.scheduler is None else [self.scheduler]
        return [self.optimizer, *schedule, *self.algorithms, *self.callbacks, *self.loggers]

    def refused(self, error: Exception) -> InputError | None:
        """Turn an exception from another package into an ``InputError`` that names the component that raised it.

        Returns ``None`` if the error explains itself or is a bug in this package.
        """
        if explain(error) is not None or is_ours(error):
            return None
        component = responsible_component(error, self.components)
        return Component(self.source, Trainer, {}).refused(error) if component is None else component.refused(error)


OURS = tuple(item.name for item in fields(Recipe) if item.name not in ('trainer', 'source', 'settings'))
# Arguments that build_trainer sets or YAML cannot express
NOT_FOR_RECIPES = {
    'self', 'train_dataloader', 'train_dataloader_label', 'eval_dataloader', 'optimizers', 'schedulers', 'algorithm_passes', 'profiler',
    'load_object_store', 'console_stream', 'spin_dataloaders',
}  # fmt: skip
_SCHEDULE_UNITS = (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN, TimeUnit.DURATION)
_LENGTHS = ('step_size', 't_max', 't_0', 'decay_period')  # arguments that schedulers divide by


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: The YAML file.
        overrides: ``key=value`` settings that override the file, in OmegaConf's dot notation.

    Returns:
        The recipe.

    Raises:
        InputError: The file is missing or invalid YAML, a name or key is unknown, or a value is missing or of the wrong type.
    """
    path = Path(path)
    settings = read_settings(path, overrides)
    return parse_recipe(settings, source=str(path), run_name=path.stem)


def parse_recipe(settings: Mapping[str, Any], *, source: str = 'recipe', run_name: str = 'run') -> Recipe:
    """Check a recipe given as plain data.

    Args:
        settings: The recipe's keys and values.
        source: Starts every error message.
        run_name: Default name of the run.

    Returns:
        The recipe.

    Raises:
        InputError: As :func:`load_recipe`.
    """
    trainer_hints = {name: item.hint for name, item in parameters(Trainer).items() if name not in NOT_FOR_RECIPES}
    for key in settings:
        if key not in OURS and key not in trainer_hints:
            raise InputError(f'{source}: {key}: unknown key; {did_you_mean(str(key), {*OURS, *trainer_hints})}')
        check_values(f'{source}: {key}', settings[key])
    for key in ('dataset', 'model', 'optimizer', 'max_duration'):
        if settings.get(key) is None:
            raise InputError(f'{source}: {key}: missing; every recipe needs it')

    trainer = {key: value for key, value in settings.items() if key not in OURS}
    check_fields(f'{source}: ', trainer, trainer_hints)
    check_trainer(source, trainer)
    hints = typing.get_type_hints(Recipe)
    plain = {key: settings[key] for key in ('max_duration', 'run_name', 'seed', 'precision', 'save_folder') if key in settings}
    check_fields(f'{source}: ', plain, hints)
    check_run_name(source, plain.setdefault('run_name', run_name))
    check_save_folder(source, plain.get('save_folder', ''))
    check_number(f'{source}: seed', plain.get('seed', 0), least=0, most=2**32 - 1)
    dataset = _dataset(f'{source}: dataset', settings['dataset'])
    check_duration(f'{source}: max_duration', plain['max_duration'], dataset.name)
    if plain.get('precision') is not None:
        find(f'{source}: precision', 'precision', plain['precision'], {item.value: item for item in Precision})

    loader = settings.get('loader')
    return Recipe(
        dataset=dataset,
        model=_section(
            ModelRecipe,
            f'{source}: model',
            settings['model'],
            {**MODELS, **LANGUAGE_MODELS, **TEXT_CLASSIFIERS},
            given=('num_classes', 'seq_len', 'vocab_size'),
        ),
        optimizer=_named(f'{source}: optimizer', 'optimizer', settings['optimizer'], components.optimizers(), given=('params',)),
        scheduler=_scheduler(f'{source}: scheduler', settings.get('scheduler')),
        loader=None if loader is None else _loader(f'{source}: loader', loader),
        algorithms=_several(f'{source}: algorithms', 'algorithm', settings.get('algorithms'), components.algorithms()),
        callbacks=_several(f'{source}: callbacks', 'callback', settings.get('callbacks'), components.callbacks()),
        loggers=_several(f'{source}: loggers', 'logger', settings.get('loggers'), components.loggers()),
        trainer=trainer,
        source=source,
        settings=dict(settings),
        **plain,
    )


def _dataset(key: str, settings: Any) -> DatasetRecipe:
    dataset: DatasetRecipe = _section(DatasetRecipe, key, settings, DATASETS, given=('split', 'path'))
    if dataset.name not in DATASETS:
        raise InputError(f'{key}.name: unknown dataset; {did_you_mean(dataset.name, DATASETS)}')
    limits = {'batch_size': (1, 2**40), 'eval_batch_size': (1, 2**40), 'num_workers': (0, 1024), 'prefetch_factor': (1, 1024)}
    for name, (least, most) in limits.items():
        value = getattr(dataset, name)
        if value is not None:
            check_number(f'{key}.{name}', value, least=least, most=most)
    if dataset.prefetch_factor is not None and dataset.num_workers == 0:
        raise InputError(f'{key}.prefetch_factor: expected num_workers of at least 1 beside it, got 0')
    return dataset


def _loader(key: str, settings: Any) -> Component | None:
    """The data loader; ``None`` for worker processes, whose options are in the ``dataset`` section."""
    settings = {'name': settings} if isinstance(settings, str) else settings
    component = _named(key, 'loader', settings, {**LOADERS, 'workers': _workers}, given=GIVEN)
    return None if component.target is _workers else component


def _workers() -> None:
    """Placeholder for worker processes among the loaders."""


def _section(schema: type, key: str, settings: Any, builders: Mapping[str, Callable[..., Any]], given: Sequence[str]) -> Any:
    """Parse a mapping into the dataclass ``schema``; its other keys must be options of the builder called ``name``.

    Options of a builder outside this package can only be checked by calling it.
    """
    check_type(key, settings, dict)
    hints = typing.get_type_hints(schema)
    listed = {item.name: item for item in fields(schema) if item.name != 'options'}
    for name, item in listed.items():
        if name in settings:
            check_type(f'{key}.{name}', settings[name], hints[name])
        elif item.default is MISSING:
            raise InputError(f'{key}.{name}: missing; expected {describe(hints[name])}')
    options = {str(name): value for name, value in settings.items() if name not in listed}
    if settings['name'] in builders:
        known = {name: item.hint for name, item in parameters(builders[settings['name']]).items() if name not in given}
        check_fields(f'{key}.', options, known, beside=listed)
    return schema(options=options, **{name: value for name, value in settings.items() if name in listed})


def _named(key: str, kind: str, settings: Any, known: Mapping[str, Any], *, given: Sequence[str] = ()) -> Component:
    """Parse ``{name: x, **arguments}`` into a component."""
    check_type(key, settings, dict)
    if not isinstance(settings.get('name'), str):
        raise InputError(f'{key}.name: missing; expected a string')
    target = find(f'{key}.name: {settings["name"]}', kind, settings['name'], known)
    arguments = {str(name): value for name, value in settings.items() if name != 'name'}
    return Component(key, target, check_arguments(key, target, arguments, given=given))


def _several(key: str, kind: str, settings: Any, known: Mapping[str, Any]) -> list[Component]:
    """Parse ``{x: arguments, y: arguments}`` into components; null means no arguments."""
    if settings is None:
        return []
    check_type(key, settings, dict)
    found: list[Component] = []
    for name, arguments in settings.items():
        target = find(f'{key}.{name}', kind, str(name), known)
        if any(item.target is target for item in found):
            raise InputError(f'{key}.{name}: the same {kind} is named twice; keep one')
        arguments = {} if arguments is None else arguments
        check_type(f'{key}.{name}', arguments, dict)
        found.append(Component(f'{key}.{name}', target, check_arguments(f'{key}.{name}', target, arguments)))
    return found


def _scheduler(key: str, settings: Any) -> Component | None:
    """Parse the scheduler and check its times, because Composer rejects them only in training, without naming the argument."""
    if settings is None:
        return None
    component = _named(key, 'scheduler', settings, components.schedulers())
    for name, value in component.kwargs.items():
        if not takes_time(parameters(component.target)[name].hint):
            continue
        for text in value if isinstance(value, (list, tuple)) else [value]:
            time = Time.from_timestring(text)
            if time.unit not in _SCHEDULE_UNITS or time.value < 0 or (time.value == 0 and name in _LENGTHS):
                units = ', '.join(f"'{unit.value}'" for unit in _SCHEDULE_UNITS)
                least = 'a time above 0' if name in _LENGTHS else 'a time of at least 0'
                raise InputError(f'{key}.{name}: expected {least} in one of the units {units}, got {text!r}')
    return component
