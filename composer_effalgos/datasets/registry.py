"""The registry of datasets by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch.utils.data import Dataset

from composer_effalgos.datasets.beton import beton
from composer_effalgos.datasets.cifar import cifar10, cifar100
from composer_effalgos.datasets.digits import digits
from composer_effalgos.datasets.image_folder import image_folder
from composer_effalgos.datasets.image_parquet import image_parquet
from composer_effalgos.datasets.mds import mds
from composer_effalgos.datasets.mds_tokens import mds_tokens
from composer_effalgos.datasets.python_source import python_packages, python_source
from composer_effalgos.datasets.synthetic import synthetic
from composer_effalgos.datasets.text import text_files
from composer_effalgos.datasets.tokens import tokens
from composer_effalgos.recipes.arguments import check_arguments
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean

Split = Literal['train', 'eval']

# Builders: (split, path, *, options). Their keyword arguments are the options that build_dataset accepts for that name.
DATASETS: Mapping[str, Callable[..., Dataset[Any]]] = {
    'beton': beton,
    'digits': digits,
    'cifar10': cifar10,
    'cifar100': cifar100,
    'image_folder': image_folder,
    'image_parquet': image_parquet,
    'mds': mds,
    'mds_tokens': mds_tokens,
    'python_packages': python_packages,
    'python_source': python_source,
    'synthetic': synthetic,
    'text_files': text_files,
    'tokens': tokens,
}
TEXT = ('mds_tokens', 'python_source', 'text_files', 'tokens')
"""Datasets for language models: ``{'input_ids', 'labels'}``, int64 ``[T]``; ``num_classes`` is the vocabulary size."""
LABELLED_TEXT = ('python_packages',)
"""Datasets for text classifiers: ``{'input_ids', 'labels'}``, int64 ``[T]`` and an int64 scalar."""


def build_dataset(name: str, split: Split, *, path: str | None = None, **options: Any) -> Dataset[Any]:
    """Build a dataset.

    Args:
        name: One of :data:`DATASETS`.
        split: ``'train'`` (with random augmentation, unless the option ``augment`` is false) or ``'eval'``.
        path: Folder of the data; ``digits``, ``python_packages``, ``python_source`` and ``synthetic`` ignore it.
        **options: Options of the dataset; see its builder in :data:`DATASETS`.

    Returns:
        A map-style dataset. Image datasets return ``(image, label)``, normalised float32 ``[3, H, W]`` and ``int``, and have the attributes
        ``targets`` (int64 ``[N]``), ``classes`` (names) and ``num_classes``. For text, see :data:`TEXT` and :data:`LABELLED_TEXT`. Random
        augmentation only draws from torch's global generator.

    Raises:
        InputError: A name or option is unknown, a folder, file or column is missing or empty, or a label is out of range.
    """
    if name not in DATASETS:
        raise InputError(f'dataset.name: expected a dataset, got {name!r}; {did_you_mean(name, DATASETS)}')
    if split not in ('train', 'eval'):
        raise InputError(f"split: expected 'train' or 'eval', got {split!r}")
    options = check_arguments('dataset', DATASETS[name], options, given=('split', 'path'))
    return DATASETS[name](split, path, **options)
