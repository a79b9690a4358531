"""Weights from a batch's own losses: methods that need no history, for streams and single passes over a corpus."""

from composer_effalgos.weighting.eslm import ESLM
from composer_effalgos.weighting.formulas import lin_upper, select_above_quantile
from composer_effalgos.weighting.lin_upper import LinUpper

__all__ = ['ESLM', 'LinUpper', 'lin_upper', 'select_above_quantile']
