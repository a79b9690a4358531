"""The methods as pure functions, for anyone's own training loop."""

from composer_effalgos.pruning.prune import prune
from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.strategies import select_subset

__all__ = ['LastLayerGradients', 'prune', 'select_subset']
