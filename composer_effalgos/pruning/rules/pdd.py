"""Progressive Data Dropout by difficulty: prunes samples that the model is confident about."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from composer_effalgos.plan import SampleRows
from composer_effalgos.plan.classes import logits_and_classes
from composer_effalgos.pruning.rules.rule import Epoch, Kept, PruningRule, Step
from composer_effalgos.utils.checks import check_number


@dataclass
class PddRule(PruningRule):
    """Keeps samples whose true class had a probability below ``threshold`` when they were last trained on.

    Difficulty-based progressive dropout of "Progressive Data Dropout", NeurIPS 2025, arXiv 2505.22342. The authors' code decides with a
    forward pass over every batch. This rule uses the last recorded probability, so a pruned sample stays pruned until the end of the run,
    when everything is trained on. For classifiers with one class per sample.

    Args:
        threshold: In (0, 1].
    """

    threshold: float = 0.3

    uses_ratio = False
    pointwise = True

    def __post_init__(self) -> None:
        check_number('rule.threshold', self.threshold, above=0, most=1)

    def score(self, step: Step) -> Tensor:
        logits, classes = logits_and_classes(step.outputs, step.batch, 'rule')
        probabilities = torch.softmax(logits.float(), dim=1).gather(1, classes.clamp(min=0)[:, None])[:, 0]
        return torch.where((classes < 0) | probabilities.isnan(), 0.0, probabilities)  # unknown: 0 keeps the sample

    def keep(self, table: SampleRows, epoch: Epoch) -> Kept:
        return (table.scores < self.threshold).nonzero()[:, 0], None
