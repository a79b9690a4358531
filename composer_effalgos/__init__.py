"""Data-efficiency algorithms for MosaicML Composer: InfoBatch, AdaBatch and subset selection."""

from composer_effalgos.adabatch import AdaBatch
from composer_effalgos.errors import InputError
from composer_effalgos.infobatch import InfoBatch
from composer_effalgos.monitor import EfficiencyMonitor
from composer_effalgos.subset_selection import SubsetSelection

__all__ = ['AdaBatch', 'EfficiencyMonitor', 'InfoBatch', 'InputError', 'SubsetSelection']
__version__ = '0.1.0'
