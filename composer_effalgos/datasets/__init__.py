"""Datasets by name.

Those of images are map-style, give ``(image, label)`` with a normalised float32 ``[3, H, W]`` tensor and an ``int``, and have

* ``targets``: int64 ``[N]``, all labels, without decoding an image;
* ``classes``: the class names, and ``num_classes``.

Those of text give ``{'input_ids', 'labels'}``, int64 ``[T]``, and have ``seq_len`` and ``num_classes``, the size of the vocabulary.
"""

from composer_effalgos.datasets.registry import DATASETS, build_dataset

__all__ = ['DATASETS', 'build_dataset']
