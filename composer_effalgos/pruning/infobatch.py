"""InfoBatch: unbiased dynamic data pruning (Qin et al., ICLR 2024, arXiv 2303.04947)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from composer_effalgos.plan import Budget, PerSampleLoss
from composer_effalgos.pruning.pruning import Pruning
from composer_effalgos.pruning.rules.infobatch import InfoBatchRule
from composer_effalgos.utils.checks import check_number


class InfoBatch(Pruning):
    """Skips well-learned samples without biasing the gradient.

    In each epoch, samples whose score (their last loss) is below the mean are dropped with probability ``prune_ratio``. Those of them that
    are kept have weight ``1 / (1 - prune_ratio)``, so the expected gradient is that of the full dataset. Pruning starts once every sample
    has been through an epoch, and the last ``1 - delta`` of the run trains on everything. Schedules follow the time of the unpruned run.
    Samples with a NaN or infinite loss are never pruned and do not enter the mean.

    Runs on ``INIT``, ``FIT_START``, ``EPOCH_END`` and ``FIT_END``. Source: Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased
    Dynamic Data Pruning", ICLR 2024, arXiv 2303.04947.

    Args:
        prune_ratio: The fraction of below-mean samples to drop in each epoch, in [0, 1).
        delta: The fraction of the run in which samples are pruned, in [0, 1]; the rest trains on everything.
        per_sample_loss: ``(outputs, batch) -> [B, ...]``; ``None`` to derive the loss of each sample from the model's own loss. The model's
            loss remains the training loss; see :class:`~composer_effalgos.plan.WeightedLoss`.
        seed: Seeds the random choices; ``None`` for the trainer's seed.
        score: ``'loss'``, the last loss (as in the paper); ``'ema'``, an exponential moving average of the losses; or your own function
            ``(outputs, batch) -> [B, ...]`` that is low for well-learned samples.
        score_decay: The weight of the old average with ``score='ema'``, in [0, 1).
        bands: Quantile thresholds instead of the mean, see :func:`~composer_effalgos.functional.prune`.
        class_balanced: Whether each class is pruned by its own mean (or quantiles), so that no class is pruned away.
        labels: Class indices of the training samples, ``[N]``, for ``class_balanced``; ``None`` to read the dataset's ``targets``.
        budget: How a ``max_duration`` that is not in epochs is counted: ``'trained'`` counts the samples trained on, so pruning saves no
            time; ``'full'`` counts what a run without pruning would train. With ``'full'`` it must be a whole number of full epochs;
            batches cannot be combined with AdaBatch, and tokens need a dataset that states the number per sample (``seq_len``).
        shard: Whether each rank keeps the scores of only its own part of the samples, see :class:`Pruning`; not with ``class_balanced``.

    Raises:
        InputError: For an argument outside its range; at ``INIT`` or ``FIT_START``, for a run in which it cannot be used.

    Example:
        >>> from composer import Trainer
        >>> from composer_effalgos import InfoBatch
        >>> trainer = Trainer(model=model, train_dataloader=loader, max_duration='30ep', algorithms=[InfoBatch()])  # doctest: +SKIP
    """

    def __init__(
        self,
        prune_ratio: float = 0.5,
        delta: float = 0.875,
        *,
        per_sample_loss: PerSampleLoss | None = None,
        seed: int | None = None,
        score: Literal['loss', 'ema'] | PerSampleLoss = 'loss',
        score_decay: float = 0.9,
        bands: Sequence[tuple[float, float]] | None = None,
        class_balanced: bool = False,
        labels: Sequence[int] | Tensor | None = None,
        budget: Budget = 'trained',
        shard: bool = False,
    ) -> None:
        check_number('prune_ratio', prune_ratio, least=0, below=1)
        rule = InfoBatchRule(score, score_decay, bands, class_balanced)
        super().__init__(
            rule,
            prune_ratio=prune_ratio,
            delta=delta,
            per_sample_loss=per_sample_loss,
            seed=seed,
            labels=labels,
            budget=budget,
            shard=shard,
        )
        self.score, self.score_decay, self.bands, self.class_balanced = score, score_decay, rule.bands, class_balanced

    def __repr__(self) -> str:
        settings: dict[str, Any] = {'prune_ratio': self.prune_ratio, 'delta': self.delta, 'seed': self.seed}
        settings |= {'score': getattr(self.score, '__name__', self.score)} if self.score != 'loss' else {}
        settings |= {'score_decay': self.score_decay} if self.score == 'ema' else {}
        settings |= {'bands': self.bands} if self.bands is not None else {}
        settings |= {'class_balanced': True} if self.class_balanced else {}
        settings |= {'shard': True} if self.shard else {}
        return f'{type(self).__name__}({", ".join(f"{name}={value!r}" for name, value in settings.items())})'
