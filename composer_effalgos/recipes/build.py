"""Build a Trainer from a recipe."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from composer import Trainer
from composer.loggers import TensorboardLogger
from composer.models import ComposerClassifier, ComposerModel
from composer.utils import dist, get_device, reproducibility
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection

from composer_effalgos.datasets import DATASETS, build_dataset
from composer_effalgos.datasets.registry import LABELLED_TEXT, TEXT
from composer_effalgos.loaders import DeviceDataLoader
from composer_effalgos.models import build_model
from composer_effalgos.models.autocast import autocast_forward, has_bf16
from composer_effalgos.models.language import LANGUAGE_MODELS, TEXT_CLASSIFIERS, build_language_model, build_text_classifier
from composer_effalgos.monitor import EfficiencyMonitor
from composer_effalgos.plan import EpochPlanner
from composer_effalgos.recipes.arguments import parameters
from composer_effalgos.recipes.checkpoints import check_settings, checkpoint_folder, loading, trainer_arguments
from composer_effalgos.recipes.components import Component
from composer_effalgos.recipes.schema import Recipe
from composer_effalgos.utils.errors import InputError

log = logging.getLogger(__name__)


def build_trainer(recipe: Recipe) -> Trainer:
    """Build the Trainer of a recipe.

    Cheap components are built first, so that errors appear early. The initial weights depend only on the recipe's seed.

    Args:
        recipe: A checked recipe.

    Returns:
        The trainer; ``trainer.fit()`` trains, evaluates and writes ``summary.json``.

    Raises:
        InputError: The recipe cannot be run on this machine; the message names the recipe key.
    """
    device = Component(f'{recipe.source}: device', get_device, {'device': recipe.trainer.get('device')}).build()
    if dist.get_world_size() > 1:
        dist.initialize_dist(device, recipe.trainer.get('dist_timeout', 300.0))
    on_gpu = device.name == 'gpu'
    loaded = loading(recipe)
    if loaded is not None:
        if loaded.is_autoresume:
            check_settings(recipe)
        loaded.check()
    saves = 'save_interval' in recipe.trainer or recipe.trainer.get('autoresume', False)

    algorithms = [component.build() for component in recipe.algorithms]
    callbacks = [component.build() for component in recipe.callbacks]
    loggers = [_beside_the_summary(component, recipe).build() for component in recipe.loggers]
    scheduler = recipe.scheduler.build() if recipe.scheduler is not None else None

    train_set, eval_set = (build_split(recipe, split) for split in ('train', 'eval'))
    train_loader = _loader(recipe, train_set, train=True, on_gpu=on_gpu)
    eval_loader = _loader(recipe, eval_set, train=False, on_gpu=on_gpu)
    # Plan runs without our algorithms too: resuming within an epoch then repeats no sample, and epochs can go shard by shard
    if recipe.loader is not None or getattr(train_set, 'shard_starts', None) is not None:
        callbacks.append(EpochPlanner())
    callbacks.append(EfficiencyMonitor(recipe=recipe.settings, save_folder=recipe.save_folder))

    reproducibility.seed_all(recipe.seed)
    model = build_network(recipe, train_set)
    optimizer = recipe.optimizer.build(model.parameters())

    arguments = trainer_arguments(recipe) | {'precision': _precision(recipe, model, on_gpu=on_gpu)}
    try:
        trainer = Trainer(
            model=model,
            train_dataloader=train_loader,
            eval_dataloader=eval_loader,
            optimizers=optimizer,
            schedulers=scheduler,
            algorithms=algorithms,
            callbacks=callbacks,
            loggers=loggers,
            max_duration=recipe.max_duration,
            run_name=recipe.run_name,
            seed=recipe.seed,
            save_folder=str(checkpoint_folder(recipe)) if saves else None,
            **arguments,
        )
    except Exception as error:
        refused = None if loaded is None else loaded.refused(error, model)
        refused = refused or _too_short(recipe, error) or recipe.refused(error)
        if refused is None:
            raise
        raise refused from error
    if loaded is not None:
        try:
            loaded.check_weights(trainer.state.model)
            loaded.check_state(trainer.state)
        except InputError:
            trainer.close()
            raise
    return trainer


def _too_short(recipe: Recipe, error: Exception) -> InputError | None:
    """Explain a ZeroDivisionError: Composer divides by a schedule's times, which round down to 0 batches in a short run."""
    if recipe.scheduler is None or not isinstance(error, ZeroDivisionError):
        return None
    times = ', '.join(f'{name}={value}' for name, value in recipe.scheduler.kwargs.items())
    return InputError(f'{recipe.scheduler.key}: expected times of at least a batch of this run, got {times}')


def _beside_the_summary(logger: Component, recipe: Recipe) -> Component:
    """Put TensorBoard's files into the run folder, unless the recipe sets another."""
    if logger.target is TensorboardLogger and 'log_dir' not in logger.kwargs:
        return replace(logger, kwargs={'log_dir': str(recipe.run_folder / 'tensorboard'), **logger.kwargs})
    return logger


def build_split(recipe: Recipe, split: str) -> Any:
    """Build a recipe's dataset of ``'train'`` or ``'eval'``; see :func:`~composer_effalgos.datasets.build_dataset`."""
    data = recipe.dataset
    component = Component(recipe.source, build_dataset, {'path': data.path, **data.options})
    if dist.get_world_size() == 1:
        return component.build(data.name, split)
    # One process per node downloads
    with dist.run_local_rank_zero_first():
        return component.build(data.name, split)


def without_augmentation(recipe: Recipe) -> Recipe:
    """Returns the recipe without augmentation of the training images, for a dataset that has the option ``augment``."""
    if 'augment' not in parameters(DATASETS[recipe.dataset.name]):
        return recipe
    return replace(recipe, dataset=replace(recipe.dataset, options=recipe.dataset.options | {'augment': False}))


def _loader(recipe: Recipe, dataset: Dataset[Any], *, train: bool, on_gpu: bool) -> DataLoader[Any]:
    data = recipe.dataset
    key, batch_size = 'batch_size', data.batch_size
    if not train and data.eval_batch_size is not None:
        key, batch_size = 'eval_batch_size', data.eval_batch_size
    ranks, samples = dist.get_world_size(), len(dataset)  # type: ignore[arg-type]
    if batch_size % ranks:
        raise InputError(f'{recipe.source}: dataset.{key}: expected a multiple of the {ranks} ranks, got {batch_size}')
    if train and batch_size > samples:
        raise InputError(f'{recipe.source}: dataset.batch_size: expected at most the {samples} samples of the dataset, got {batch_size}')
    drop_last = train and data.drop_last
    if recipe.loader is not None:
        loader = recipe.loader.build(
            dataset, shuffle=train, batch_size=batch_size // ranks, drop_last=drop_last, seed=recipe.seed, num_workers=data.num_workers
        )
        if isinstance(loader, DeviceDataLoader):
            Component(recipe.loader.key, loader.load, {}).build()  # reports broken images before training starts
        return loader
    return DataLoader(
        dataset,
        batch_size=batch_size // ranks,
        sampler=dist.get_sampler(dataset, shuffle=train, drop_last=drop_last, seed=recipe.seed),
        drop_last=drop_last,
        num_workers=data.num_workers,
        persistent_workers=data.num_workers > 0,
        prefetch_factor=data.prefetch_factor,
        pin_memory=on_gpu if data.pin_memory is None else data.pin_memory,
    )


def build_network(recipe: Recipe, dataset: Any) -> ComposerModel:
    """Build a recipe's model for the training split ``dataset``, before algorithms change it.

    That is an image or text classifier with cross-entropy loss and accuracy, or a language model with its own loss. It must support this
    kind of data and have at least as many outputs as the dataset has classes.
    """
    settings, num_classes = recipe.model, dataset.num_classes
    _check_kind(recipe)
    if settings.num_classes is not None and settings.num_classes < num_classes:
        raise InputError(
            f'{recipe.source}: model.num_classes: expected at least the {num_classes} classes of the dataset, got {settings.num_classes}'
        )
    num_classes = settings.num_classes or num_classes
    if settings.name in LANGUAGE_MODELS or settings.name in TEXT_CLASSIFIERS:
        return _text_model(recipe, dataset, num_classes)
    if num_classes < 2:
        raise InputError(f'{recipe.source}: dataset: expected at least two classes for a classifier, got one')
    component = Component(recipe.source, build_model, {'pretrained': settings.pretrained, **settings.options})
    train_metrics = None if settings.train_metrics else MetricCollection([])  # None: Composer's default, accuracy
    return ComposerClassifier(component.build(settings.name, num_classes), num_classes=num_classes, train_metrics=train_metrics)


def _check_kind(recipe: Recipe) -> None:
    """Reject a model for another kind of data."""
    name, data = recipe.model.name, recipe.dataset.name
    text, labelled = name in LANGUAGE_MODELS, name in TEXT_CLASSIFIERS
    if text != (data in TEXT) or labelled != (data in LABELLED_TEXT):
        kind = f'text ({", ".join(TEXT)})' if text else f'text with classes ({", ".join(LABELLED_TEXT)})' if labelled else 'images'
        raise InputError(f'{recipe.source}: dataset.name: expected one of {kind} for {name}, got {data}')


def _text_model(recipe: Recipe, dataset: Any, num_classes: int) -> ComposerModel:
    """Build a language model or a text classifier."""
    settings = recipe.model
    arguments = {'seq_len': dataset.seq_len, **settings.options, **({'pretrained': settings.pretrained} if settings.pretrained else {})}
    if settings.name in LANGUAGE_MODELS:
        return Component(recipe.source, build_language_model, arguments).build(settings.name, num_classes)
    arguments['vocab_size'] = dataset.vocab_size
    return Component(recipe.source, build_text_classifier, arguments).build(settings.name, num_classes)


def _precision(recipe: Recipe, model: ComposerModel, *, on_gpu: bool) -> str | None:
    """The precision for Composer. On a CPU that is fp32; for ``amp_bf16``, bfloat16 autocast is applied to the model's forward pass."""
    if recipe.precision is None or on_gpu or recipe.precision == 'fp32':
        return recipe.precision
    if recipe.precision == 'amp_bf16' and has_bf16():
        autocast_forward(model)
    elif recipe.precision == 'amp_bf16':
        log.warning('note: precision amp_bf16 needs a GPU or a CPU with AVX-512 BF16 or AMX; running in fp32')
    else:
        log.warning('note: precision %s needs a GPU; running in fp32', recipe.precision)
    return 'fp32'
