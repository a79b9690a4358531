"""InfoBatch: unbiased dynamic data pruning."""

from composer_effalgos.infobatch.infobatch import InfoBatch, prune

__all__ = ['InfoBatch', 'prune']
