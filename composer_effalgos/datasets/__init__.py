"""Image classification data sets by name.

Every data set is map-style, gives ``(image, label)`` with a normalised float32 ``[3, H, W]`` tensor and an ``int``, and has

* ``targets``: int64 ``[N]``, all labels, without decoding an image;
* ``classes``: the class names, and ``num_classes``.
"""

from composer_effalgos.datasets.registry import DATASETS, build_dataset

__all__ = ['DATASETS', 'build_dataset']
