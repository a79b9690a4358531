"""Instance-dependent early stopping: prunes samples whose loss has stopped changing."""

from __future__ import annotations

from dataclasses import dataclass

from composer_effalgos.plan import SampleRows
from composer_effalgos.pruning.rules.rule import Epoch, Kept, PruningRule
from composer_effalgos.utils.checks import check_number, check_whole


@dataclass
class IesRule(PruningRule):
    """Prunes samples while the second differences of their losses are small.

    With ``d = L_t - 2 L_(t-1) + L_(t-2)``, a sample is pruned while the mean of ``|d|`` over its last ``window`` trainings is below
    ``threshold``, once it was trained on ``window + 3`` times. Yuan et al., "Instance-dependent Early Stopping", ICLR 2025. The authors'
    code runs a forward pass over the pruned samples after every epoch, so that they can return. This rule runs none, so they return only at
    the end of the run.

    Args:
        threshold: The authors use 1e-3 for CIFAR-10 and 2e-3 for CIFAR-100.
        window: Number of second differences to average.
    """

    threshold: float = 1e-3
    window: int = 3

    uses_ratio = False
    pointwise = True

    def __post_init__(self) -> None:
        check_number('rule.threshold', self.threshold, least=0)
        check_whole('rule.window', self.window, least=1, most=1000)
        self.history = self.window + 2

    def keep(self, table: SampleRows, epoch: Epoch) -> Kept:
        losses = table.history
        change = (losses[:-2] - 2 * losses[1:-1] + losses[2:]).abs().mean(dim=0)
        stopped = (table.trained >= self.window + 3) & (change < self.threshold)
        return (~stopped).nonzero()[:, 0], None
