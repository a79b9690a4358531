"""Instance-dependent early stopping: samples whose loss has stopped changing are left out."""

from __future__ import annotations

from dataclasses import dataclass

from composer_effalgos.plan import SampleRows
from composer_effalgos.pruning.rules.rule import Epoch, Kept, PruningRule
from composer_effalgos.utils.checks import check_number, check_whole


@dataclass
class IesRule(PruningRule):
    """Leaves samples out while the second differences of their losses are small.

    With ``d = L_t - 2 L_(t-1) + L_(t-2)``, a sample is left out while the mean of ``|d|`` over its last ``window`` trainings is below
    ``threshold``, once it was trained on ``window + 3`` times. Yuan et al., "Instance-dependent Early Stopping", ICLR 2025. The authors'
    code makes a forward pass over the left-out samples after every epoch, so that they may come back; this one makes none, and they come
    back at the end of the run.

    Args:
        threshold: 1e-3 is the authors' for CIFAR-10, 2e-3 for CIFAR-100.
        window: Second differences that are averaged.
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
