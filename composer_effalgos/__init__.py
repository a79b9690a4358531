"""Data-efficiency algorithms for MosaicML Composer: dynamic pruning, AdaBatch and subset selection."""

from composer_effalgos.adabatch import AdaBatch
from composer_effalgos.monitor import EfficiencyMonitor
from composer_effalgos.pruning import InfoBatch, Pruning, PruningRule
from composer_effalgos.subset_selection import SubsetSelection
from composer_effalgos.utils.errors import InputError
from composer_effalgos.weighting import ESLM, LinUpper

__all__ = [
    'ESLM',
    'AdaBatch',
    'EfficiencyMonitor',
    'InfoBatch',
    'InputError',
    'LinUpper',
    'Pruning',
    'PruningRule',
    'SubsetSelection',
]
__version__ = '0.1.0'
