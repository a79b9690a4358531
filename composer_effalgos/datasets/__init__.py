"""Datasets by name.

Image datasets are map-style and return ``(image, label)``: a normalised float32 ``[3, H, W]`` tensor and an ``int``. Their attributes are

* ``targets``: all labels, int64 ``[N]``, available without decoding any image;
* ``classes``: the class names, and ``num_classes``.

Text datasets return ``{'input_ids', 'labels'}``, int64 ``[T]``, and have the attributes ``seq_len`` and ``num_classes`` (vocabulary size).
"""

from composer_effalgos.datasets.registry import DATASETS, build_dataset

__all__ = ['DATASETS', 'build_dataset']
