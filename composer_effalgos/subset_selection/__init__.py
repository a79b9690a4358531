"""Subset selection: trains on a subset that a CORDS-style strategy selects."""

from composer_effalgos.subset_selection.gradients import LastLayerGradients, last_layer_gradients
from composer_effalgos.subset_selection.selection import select_subset
from composer_effalgos.subset_selection.subset_selection import SubsetSelection

__all__ = ['LastLayerGradients', 'SubsetSelection', 'last_layer_gradients', 'select_subset']
