"""Loss weights from the batch's own losses: methods without history, suited to streams and single-epoch training."""

from composer_effalgos.weighting.eslm import ESLM
from composer_effalgos.weighting.lin_upper import LinUpper

__all__ = ['ESLM', 'LinUpper']
