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

    Each epoch, samples whose score (their last loss) lies below the mean are dropped with probability ``prune_ratio``; those of them that
    are kept count ``1 / (1 - prune_ratio)`` times, so the expected gradient stays that of the full data. Nothing is pruned before every
    sample has been through an epoch, and the last ``1 - delta`` of the run trains on everything. Schedules keep the time of the unpruned
    run. A NaN or infinite loss never prunes a sample and does not move the mean.

    Runs on ``INIT``, ``FIT_START``, ``EPOCH_END`` and ``FIT_END``. Source: Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased
    Dynamic Data Pruning", ICLR 2024, arXiv 2303.04947.

    Args:
        prune_ratio: The share of below-mean samples that an epoch drops, in [0, 1).
        delta: The share of the run in which samples are pruned, in [0, 1]; the rest trains on everything.
        per_sample_loss: ``(outputs, batch) -> [B, ...]``; ``None`` to find the model's own loss of each sample. The
            model's loss stays what is trained on; see :class:`~composer_effalgos.plan.WeightedLoss`.
        seed: Seeds the draws; ``None`` for the trainer's seed.
        score: ``'loss'``, the last loss (the paper's); ``'ema'``, an exponential moving average of the losses; or a function
            ``(outputs, batch) -> [B, ...]`` of your own, low for samples that are well learned.
        score_decay: The weight of the old average under ``score='ema'``, in [0, 1).
        bands: Quantile thresholds in place of the mean, see :func:`~composer_effalgos.functional.prune`.
        class_balanced: Whether every class is pruned by its own mean (or quantiles), so that no class is pruned away.
        labels: Class indices of the training samples, ``[N]``, for ``class_balanced``; ``None`` to read the dataset's ``targets``.
        budget: What a ``max_duration`` that is not in epochs counts: ``'trained'``, what is trained on, so that pruning saves no time; or
            ``'full'``, what a run that prunes nothing would train. It must then be a whole number of full epochs;
            batches allow no AdaBatch beside it, and tokens need a dataset that says how many each sample has (``seq_len``).
        shard: Whether each rank keeps the scores of its own part of the samples, see :class:`Pruning`; not with ``class_balanced``.

    Raises:
        InputError: For an argument outside its range; at ``INIT`` or ``FIT_START``, for a run it cannot be used in.

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
