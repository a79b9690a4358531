"""LinUpper: give samples that are already learnt less weight (Sow et al., ICLR 2025)."""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Time
from torch import Tensor

from composer_effalgos.plan import PerSampleLoss, check_per_sample_loss
from composer_effalgos.utils.checks import LARGEST, check_number
from composer_effalgos.weighting.formulas import lin_upper
from composer_effalgos.weighting.weighting import Weighting


class LinUpper(Weighting):
    """Weights the samples of a batch by their losses: small losses count less, and the upper half of the range counts equally.

    The weights have mean 1 and need no history, so it works with any loader, including a single pass over a stream. A step takes as long as
    before; the paper reports that fewer steps are needed. The logged loss is the weighted one.

    Runs on ``INIT``, ``FIT_START`` and, on several ranks with ``global_batch``, ``BEFORE_TRAIN_BATCH``.
    Source: Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", ICLR 2025, arXiv 2502.06733.

    Args:
        temperature: Softmax temperature, at least 0.01. Samples in the upper half of the range of losses count ``exp(1 / temperature)``
            times as much as the sample with the smallest loss.
        burn_in: Initial period of the run in which all samples count equally: epochs, batches, samples, tokens or a fraction of the run;
            ``None`` for none.
        global_batch: Whether to normalise weights over the samples of all ranks, as in the paper, or of each rank; in both cases per
            microbatch.
        per_sample_loss: ``(outputs, batch) -> [B, ...]``; ``None`` to derive it from the model's own loss.

    Raises:
        InputError: An argument is out of range; at ``FIT_START``, if combined with a pruning algorithm; in training, if the loss has no
            per-sample form.

    Example:
        >>> from composer import Trainer
        >>> from composer_effalgos import LinUpper
        >>> trainer = Trainer(model=model, train_dataloader=loader, max_duration='1ep', algorithms=[LinUpper()])  # doctest: +SKIP
    """

    by_token = False

    def __init__(
        self,
        temperature: float = 0.4,
        burn_in: str | int | Time | None = '0.05dur',
        *,
        global_batch: bool = False,
        per_sample_loss: PerSampleLoss | None = None,
    ) -> None:
        check_number('temperature', temperature, least=0.01, most=LARGEST)
        check_per_sample_loss(per_sample_loss)
        super().__init__(burn_in, global_batch=global_batch)
        self.temperature, self.per_sample_loss = temperature, per_sample_loss

    def __repr__(self) -> str:
        burn_in = None if self.burn_in is None else self.burn_in.to_timestring()
        return f'{type(self).__name__}(temperature={self.temperature}, burn_in={burn_in!r}, global_batch={self.global_batch})'

    def weigh(self, losses: Tensor, batch: Any) -> Tensor:
        (population,), mine = self._population(losses)
        weights = lin_upper(population, self.temperature)
        return torch.where(weights.isfinite().all(), weights, 1.0)[mine]
