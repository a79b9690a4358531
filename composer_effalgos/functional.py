"""The methods as pure functions, for use in any training loop."""

from composer_effalgos.pruning.prune import prune
from composer_effalgos.subset_selection.gradients import LastLayerGradients
from composer_effalgos.subset_selection.selection import select_subset
from composer_effalgos.weighting.formulas import lin_upper, select_above_quantile

__all__ = ['LastLayerGradients', 'lin_upper', 'prune', 'select_above_quantile', 'select_subset']
