"""Shared code of the formats that ``effalgos convert`` writes: the description file, and the transforms by dataset name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor
from torchvision import transforms

from composer_effalgos.datasets.cifar import cifar_transform
from composer_effalgos.datasets.digits import digits_transform
from composer_effalgos.datasets.images import MOST_SIDE, check_at_least, large_image_transform, one_size_transform
from composer_effalgos.datasets.parquet import check_labels
from composer_effalgos.datasets.records import read_record
from composer_effalgos.utils.digest import labels_digest
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import did_you_mean, shown
from composer_effalgos.utils.type_hints import check_type

DESCRIPTION = 'dataset.json'
TRANSFORM_OPTIONS = ('image_size', 'padding', 'cutout')
_SMALL = {'cifar10': cifar_transform, 'cifar100': cifar_transform, 'digits': digits_transform}
_LARGE = ('image_folder', 'image_parquet', 'beton', 'mds')


@dataclass(frozen=True)
class Description:
    """The contents of ``dataset.json``, which describes a folder of converted data.

    Attributes:
        like: Name of the dataset whose transform is used.
        classes: Class names.
        labels: Digest of each split's labels, in sample order.
        options: The ``image_size``, ``padding`` and ``cutout`` that were given for the conversion; the converted data keeps them.
    """

    like: str
    classes: list[str]
    labels: dict[str, str]
    options: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := self.options.keys() - TRANSFORM_OPTIONS:
            raise InputError(f'options: {shown(min(unknown))}: expected {", ".join(TRANSFORM_OPTIONS)}')
        for key, value in self.options.items():
            check_type(f'options.{key}', value, int)
        check_at_least(0, most=MOST_SIDE, **self.options)
        check_at_least(1, image_size=self.options.get('image_size'))

    @classmethod
    def read(cls, folder: Path) -> Description | None:
        """Read the description of a folder; ``None`` if there is none, as in data written by other tools.

        Raises:
            InputError: The file is unreadable or names an unknown dataset.
        """
        described = read_record(cls, folder / DESCRIPTION, 'a description that effalgos convert wrote', 'convert the data again')
        known = (*_SMALL, *_LARGE)
        if described is not None and described.like not in known:
            raise InputError(
                f'{folder / DESCRIPTION}: like: expected a dataset that is converted, got {shown(described.like)}; '
                f'{did_you_mean(described.like, known)}'
            )
        return described

    def text(self) -> str:
        """The description as JSON."""
        return json.dumps(asdict(self), indent=2) + '\n'


def class_names(description: Description | None, split: str, targets: Tensor, source: Path) -> list[str]:
    """Check a split's labels against the description and return the class names.

    Args:
        description: The folder's description; if ``None``, the classes are 0 to the largest label.
        split: ``'train'`` or ``'eval'``.
        targets: Labels found in the data, int64 ``[N]``.
        source: Where the labels come from, for the error message.

    Raises:
        InputError: The labels do not match the description or are out of range.
    """
    if description is not None and description.labels.get(split) != labels_digest(targets):
        raise InputError(f'{source}: its labels do not match {DESCRIPTION}: data of another dataset')
    check_labels(targets, None if description is None else len(description.classes), str(source))
    return description.classes if description is not None else [str(index) for index in range(int(targets.max()) + 1)]


def pipeline(
    description: Description | None, split: Literal['train', 'eval'], *, augment: bool, image_size: int | None
) -> transforms.Compose:
    """The transform of the original dataset.

    Args:
        description: Names the original dataset; ``None`` for the ImageNet pipeline.
        split: ``'train'`` or ``'eval'``.
        augment: As for the original dataset.
        image_size: Output height and width in pixels; ``None`` for the original dataset's.

    Returns:
        PIL image to float32 ``[3, H, W]``.
    """
    like, options = ('image_folder', {}) if description is None else (description.like, description.options)
    side = image_size or options.get('image_size')
    if like in _SMALL:
        cutout = {'cutout': options['cutout']} if 'cutout' in options else {}
        return _SMALL[like](like, split, augment=augment, image_size=side, **cutout)
    if 'padding' in options:
        check_at_least(options['padding'] + 1, image_size=side or 224)  # pixels are reflected once
        return one_size_transform(split, image_size=side or 224, padding=options['padding'], augment=augment)
    return large_image_transform(split, image_size=side or 224, augment=augment)
