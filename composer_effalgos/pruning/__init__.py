"""Dynamic data pruning: each epoch trains on the samples that a rule keeps."""

from composer_effalgos.pruning.infobatch import InfoBatch
from composer_effalgos.pruning.prune import prune
from composer_effalgos.pruning.pruning import Pruning
from composer_effalgos.pruning.rules import RULES, Epoch, PruningRule, Step

__all__ = ['RULES', 'Epoch', 'InfoBatch', 'Pruning', 'PruningRule', 'Step', 'prune']
