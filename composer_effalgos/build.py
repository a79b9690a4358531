"""From a recipe to a Trainer that is ready to fit."""

from __future__ import annotations

import logging
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.loggers import TensorboardLogger
from composer.models import ComposerClassifier, ComposerModel
from composer.utils import dist, get_device, reproducibility
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection

from composer_effalgos.components import Component
from composer_effalgos.datasets import build_dataset
from composer_effalgos.errors import InputError, one_line
from composer_effalgos.faults import blamed
from composer_effalgos.models import build_model
from composer_effalgos.models.autocast import autocast_forward, has_bf16
from composer_effalgos.models.pretrained import differences
from composer_effalgos.monitor import EfficiencyMonitor
from composer_effalgos.plan import Plan
from composer_effalgos.recipe import Recipe

__all__ = ['build_network', 'build_split', 'build_trainer', 'checkpoint_folder']

log = logging.getLogger(__name__)


def build_trainer(recipe: Recipe) -> Trainer:
    """Build everything that a recipe names.

    The order is that of the costs: what is quick to refuse is built first. The model's weights depend on the recipe's seed alone.

    Args:
        recipe: A checked recipe.

    Returns:
        The trainer; ``trainer.fit()`` trains, evaluates and writes ``summary.json``.

    Raises:
        InputError: The recipe cannot be run here; the message names its key.
    """
    device = Component(f'{recipe.source}: device', get_device, {'device': recipe.trainer.get('device')}).build()
    if dist.get_world_size() > 1:
        dist.initialize_dist(device, recipe.trainer.get('dist_timeout', 300.0))
    on_gpu = device.name == 'gpu'
    loads = _check_loading(recipe)
    saves = 'save_interval' in recipe.trainer or recipe.trainer.get('autoresume', False)

    algorithms = [component.build() for component in recipe.algorithms]
    callbacks = [component.build() for component in recipe.callbacks]
    loggers = [_beside_the_summary(component, recipe).build() for component in recipe.loggers]
    scheduler = recipe.scheduler.build() if recipe.scheduler is not None else None

    train_set, eval_set = (build_split(recipe, split) for split in ('train', 'eval'))
    train_loader = _loader(recipe, train_set, train=True, on_gpu=on_gpu)
    eval_loader = _loader(recipe, eval_set, train=False, on_gpu=on_gpu)
    # a run without our algorithms is planned too: resumed within an epoch it reads nothing twice, and it can go shard by shard
    if recipe.loader is not None or getattr(train_set, 'shard_starts', None) is not None:
        callbacks.append(Plan())
    callbacks.append(EfficiencyMonitor(recipe=recipe.settings, save_folder=recipe.save_folder))

    reproducibility.seed_all(recipe.seed)
    model = build_network(recipe, train_set.num_classes)
    optimizer = recipe.optimizer.build(model.parameters())

    precision = _precision(recipe, model, on_gpu=on_gpu)
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
            precision=precision,
            **_trainer_arguments(recipe),
            save_folder=str(checkpoint_folder(recipe)) if saves else None,
        )
    except ZeroDivisionError as error:
        if recipe.scheduler is None:
            raise
        times = ', '.join(f'{name}={value}' for name, value in recipe.scheduler.kwargs.items())
        raise InputError(
            f'{recipe.scheduler.key}: one of its times ({times}) is less than a batch of this run; longer ones are right'
        ) from error
    except Exception as error:
        refused = recipe.refused(error)
        if refused is None:
            raise
        if loads and isinstance(error, (KeyError, RuntimeError)) and blamed(error, recipe.components) is None:
            # Composer finds out parameter by parameter, some of them only in the optimizer's state
            raise InputError(f'{recipe.source}: the checkpoint is of another model: {one_line(error)[:200]}') from error
        raise refused from error
    if recipe.trainer.get('load_path') and not recipe.trainer.get('load_ignore_keys'):
        _check_weights(trainer, f'{recipe.source}: load_path', Path(recipe.trainer['load_path']))
    return trainer


def _check_weights(trainer: Trainer, key: str, path: Path) -> None:
    """Composer loads what fits and leaves the rest as it was: weights of another network must not pass for this one's."""
    model = trainer.state.model
    model = model.module if isinstance(model, DistributedDataParallel) else model
    content = torch.load(path, map_location='cpu', mmap=True, weights_only=False)  # as Composer has just read it
    found = differences(model.state_dict(), content['state'].get('model', {}))
    if found:
        trainer.close()
        raise InputError(f'{key}: {path}: the checkpoint is of another model ({found})')


def _beside_the_summary(logger: Component, recipe: Recipe) -> Component:
    """TensorBoard's files go into the run's folder, where the recipe names no other."""
    if logger.target is TensorboardLogger and 'log_dir' not in logger.kwargs:
        return replace(logger, kwargs={'log_dir': str(recipe.run_folder / 'tensorboard'), **logger.kwargs})
    return logger


def _trainer_arguments(recipe: Recipe) -> dict[str, Any]:
    """The recipe's arguments of the Trainer, with what resuming needs."""
    arguments = dict(recipe.trainer)
    if not arguments.get('autoresume', False):
        return arguments
    latest = checkpoint_folder(recipe) / 'latest-rank0.pt'
    # A run killed between writing a checkpoint, be it the first, and marking it the latest writes that checkpoint again
    arguments.setdefault('save_overwrite', True)
    if dist.get_world_size() > dist.get_local_world_size():
        # Every node of Composer 0.32.1 would remove the same signal file from the folder that they share, and fail where it is gone
        arguments['autoresume'] = False
        if latest.exists():
            arguments |= {'load_path': str(latest), 'load_weights_only': False, 'load_ignore_keys': None, 'load_exclude_algorithms': None}
    return arguments


def checkpoint_folder(recipe: Recipe) -> Path:
    """Where a recipe's checkpoints go.

    Args:
        recipe: A checked recipe.

    Returns:
        ``<save_folder>/<run_name>/checkpoints``.
    """
    return recipe.run_folder / 'checkpoints'


def build_split(recipe: Recipe, split: str) -> Any:
    """Build one of a recipe's data sets.

    Args:
        recipe: A checked recipe.
        split: ``'train'`` or ``'eval'``.

    Returns:
        What :func:`~composer_effalgos.datasets.build_dataset` returns.

    Raises:
        InputError: The data cannot be had.
    """
    data = recipe.dataset
    component = Component(recipe.source, build_dataset, {'path': data.path, **data.options})
    if dist.get_world_size() == 1:
        return component.build(data.name, split)
    # A download must not be made twice
    with dist.run_local_rank_zero_first():
        return component.build(data.name, split)


def _loader(recipe: Recipe, dataset: Dataset[Any], *, train: bool, on_gpu: bool) -> DataLoader[Any]:
    data = recipe.dataset
    key, batch_size = 'batch_size', data.batch_size
    if not train and data.eval_batch_size is not None:
        key, batch_size = 'eval_batch_size', data.eval_batch_size
    ranks, samples = dist.get_world_size(), len(dataset)  # type: ignore[arg-type]
    if batch_size % ranks:
        raise InputError(f'{recipe.source}: dataset.{key}: {batch_size} is not divisible by the {ranks} ranks')
    if train and batch_size > samples:
        raise InputError(f'{recipe.source}: dataset.batch_size: {batch_size} is larger than the data set of {samples} samples')
    drop_last = train and data.drop_last
    if recipe.loader is not None:
        return recipe.loader.build(
            dataset, train=train, batch_size=batch_size // ranks, drop_last=drop_last, seed=recipe.seed, num_workers=data.num_workers
        )
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


def build_network(recipe: Recipe, num_classes: int) -> ComposerClassifier:
    """Build a recipe's network, before any algorithm.

    Args:
        recipe: A checked recipe.
        num_classes: Classes of the data set.

    Returns:
        The network with its cross-entropy and accuracy.

    Raises:
        InputError: The network cannot be built, or has fewer outputs than the data set has classes.
    """
    settings = recipe.model
    if settings.num_classes is not None and settings.num_classes < num_classes:
        raise InputError(f'{recipe.source}: model.num_classes: {settings.num_classes}, but the data set has {num_classes} classes')
    num_classes = settings.num_classes or num_classes
    if num_classes < 2:
        raise InputError(f'{recipe.source}: dataset: has one class; a classifier needs at least two')
    component = Component(recipe.source, build_model, {'pretrained': settings.pretrained, **settings.options})
    train_metrics = None if settings.train_metrics else MetricCollection([])  # None: Composer's default, accuracy
    return ComposerClassifier(component.build(settings.name, num_classes), num_classes=num_classes, train_metrics=train_metrics)


def _precision(recipe: Recipe, model: ComposerModel, *, on_gpu: bool) -> str | None:
    """Composer's precision; on a CPU fp32, with bfloat16 autocast around the model's forward pass where the recipe asks for it."""
    if recipe.precision is None or on_gpu or recipe.precision == 'fp32':
        return recipe.precision
    if recipe.precision == 'amp_bf16' and has_bf16():
        autocast_forward(model)
    elif recipe.precision == 'amp_bf16':
        log.warning('note: precision amp_bf16 needs a GPU or a CPU with AVX-512 BF16 or AMX; running in fp32')
    else:
        log.warning('note: precision %s needs a GPU; running in fp32', recipe.precision)
    return 'fp32'


def _check_loading(recipe: Recipe) -> bool:
    """Whether this run loads a checkpoint, after a look at the file."""
    load_path = recipe.trainer.get('load_path')
    if load_path is not None and '://' not in load_path and '{' not in load_path:
        check_checkpoint(f'{recipe.source}: load_path', Path(load_path))
    latest = checkpoint_folder(recipe) / 'latest-rank0.pt'
    resumes = recipe.trainer.get('autoresume', False) and latest.exists()
    if resumes:
        check_checkpoint(f'{recipe.source}: autoresume', latest)
    return resumes or load_path is not None


def check_checkpoint(key: str, path: Path) -> None:
    """See that a file is a whole checkpoint of Composer's.

    Args:
        key: Where the recipe says so; begins the error message.
        path: The file.

    Raises:
        InputError: The file is missing, cut off, or something else.
    """
    if not path.is_file():
        raise InputError(f'{key}: {path}: no such checkpoint')
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f'{key}: {path}: not a checkpoint, or cut off ({one_line(error)})') from error
    if damaged is not None:
        raise InputError(f'{key}: {path}: damaged checkpoint (in {damaged})')
    try:
        # The checksums are right; Composer reads it in the same way, and mmap leaves the tensors on the disk
        content = torch.load(path, map_location='cpu', mmap=True, weights_only=False)
    except Exception as error:  # there is no end to what damaged bytes lead to
        raise InputError(f'{key}: {path}: not a checkpoint ({one_line(error)[:200]})') from error
    if not isinstance(content, dict) or 'state' not in content:
        raise InputError(f"{key}: {path}: not a checkpoint of Composer's (it has no 'state'); expected one that this training wrote")
