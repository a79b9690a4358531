"""AdaBatch: batch sizes that grow during training."""

from composer_effalgos.adabatch.adabatch import AdaBatch

__all__ = ['AdaBatch']
