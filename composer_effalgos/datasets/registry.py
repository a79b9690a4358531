"""The names under which recipes and scripts find the datasets."""

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

# Each builder takes (split, path, *, options); its keyword arguments are the options that build_dataset accepts for that name.
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
"""Those that hold text: ``{'input_ids', 'labels'}``, int64 ``[T]``, for language models; ``num_classes`` is the size of the vocabulary."""
LABELLED_TEXT = ('python_packages',)
"""Those that hold text with one class a sample, for classifiers of text: ``{'input_ids', 'labels'}``, int64 ``[T]`` and a number."""


def build_dataset(name: str, split: Split, *, path: str | None = None, **options: Any) -> Dataset[Any]:
    """Build a dataset.

    Args:
        name: One of :data:`DATASETS`.
        split: ``'train'`` (with random augmentation, unless the option ``augment`` is false) or ``'eval'``.
        path: Folder of the data; ``digits``, ``python_packages``, ``python_source`` and ``synthetic`` need none and ignore it.
        **options: Options of that dataset, see its builder in :data:`DATASETS`.

    Returns:
        A map-style dataset of ``(image, label)``: float32 ``[3, H, W]``, normalised, and ``int``; with the attributes ``targets``
        (int64 ``[N]``), ``classes`` (names) and ``num_classes``; or text, see :data:`TEXT` and :data:`LABELLED_TEXT`. Random
        augmentation draws from torch's global generator and from nothing else.

    Raises:
        InputError: Unknown name or option, missing or empty folder, columns or files that are not there, labels out of range.
    """
    if name not in DATASETS:
        raise InputError(f'dataset.name: expected a data set, got {name!r}; {did_you_mean(name, DATASETS)}')
    if split not in ('train', 'eval'):
        raise InputError(f"split: expected 'train' or 'eval', got {split!r}")
    options = check_arguments('dataset', DATASETS[name], options, given=('split', 'path'))
    return DATASETS[name](split, path, **options)
