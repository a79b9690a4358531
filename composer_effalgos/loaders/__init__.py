"""Data paths besides worker processes: loaders that are given to the Trainer in the place of a ``DataLoader``.

``LOADERS`` holds, by the name that a recipe's ``loader`` key uses, what builds such a loader:
``(dataset, *, train, batch_size, drop_last, seed, num_workers, **options) -> DataPath``, where ``train`` says whether the order is drawn
anew each epoch and ``batch_size`` is per rank. What further options a loader has, its builder's signature says.
"""

from collections.abc import Callable, Mapping

from composer_effalgos.plan import DataPath

__all__ = ['LOADERS']

LOADERS: Mapping[str, Callable[..., DataPath]] = {}
GIVEN = ('dataset', 'train', 'batch_size', 'drop_last', 'seed', 'num_workers')
"""The arguments of a builder that do not come from the recipe's ``loader`` section."""
