"""InfoBatch: unbiased dynamic data pruning (Qin et al., ICLR 2024, arXiv 2303.04947)."""

from __future__ import annotations

import math
from typing import Any

import torch
from composer.core import Algorithm, Event, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from composer_effalgos.errors import InputError
from composer_effalgos.plan import PerSampleLoss, Plan, stream_seed

_STREAM = 10  # of random numbers, see stream_seed


def prune(scores: Tensor, prune_ratio: float, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Decides which samples one epoch trains on, and how much each counts.

    Of the ``m`` samples whose score is below the mean, ``floor((1 - prune_ratio) m)``, drawn at random, are kept with weight
    ``1 / (1 - prune_ratio)``; all others are kept with weight 1 (Qin et al., arXiv 2303.04947, equations 3 and 5). The expected weighted
    gradient is the full gradient. Samples with a NaN or infinite score are kept with weight 1 and left out of the mean.

    Args:
        scores: One score a sample (its last loss), float ``[N]``, on the CPU.
        prune_ratio: The share of below-mean samples to drop, in [0, 1).
        generator: Draws which; ``None`` for torch's default generator.

    Returns:
        The kept samples in ascending order, int64 ``[n]``, and their weights, float32 ``[n]``.

    Raises:
        InputError: Where ``prune_ratio`` is outside [0, 1) or ``scores`` is not a vector.
    """
    _check_ratio('prune_ratio', prune_ratio)
    if scores.ndim != 1:
        raise InputError(f'scores: must have one dimension, got shape {tuple(scores.shape)}')
    scored = torch.isfinite(scores)
    mean = scores[scored].double().mean() if bool(scored.any()) else torch.tensor(math.nan)
    prunable = scored & (scores < mean)
    below = prunable.nonzero().squeeze(1)
    num_kept = math.floor(len(below) * (1 - prune_ratio) + 1e-9)  # 0.1 * 10 must be 1, also as (1 - 0.9) * 10
    keep = ~prunable
    keep[below[torch.randperm(len(below), generator=generator)[:num_kept]]] = True
    kept = keep.nonzero().squeeze(1)
    weights = torch.ones(len(kept))
    weights[prunable[kept]] = 1 / (1 - prune_ratio)
    return kept, weights


def _check_ratio(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InputError(f'{name}: must be a number in [0, 1), got {value!r}')


class InfoBatch(Algorithm):
    """Skips well-learned samples without biasing the gradient.

    Each epoch, samples whose last loss lies below the mean are dropped with probability ``prune_ratio``; those of them that are kept
    count ``1 / (1 - prune_ratio)`` times, so the expected gradient stays that of the full data. Nothing is pruned before every sample has
    a score, and the last ``1 - delta`` of the run trains on everything. Schedules keep the time of the unpruned run.

    Runs on ``INIT``, ``EPOCH_END`` and ``FIT_END``. Source: Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data
    Pruning", ICLR 2024, arXiv 2303.04947.

    Args:
        prune_ratio: The share of below-mean samples that an epoch drops, in [0, 1).
        delta: The share of the run in which samples are pruned, in [0, 1]; the rest trains on everything.
        per_sample_loss: ``(outputs, batch) -> [B, ...]``; ``None`` to call the model's own loss with ``reduction='none'``. It replaces
            ``model.loss`` during training steps.
        seed: Seeds the draws; ``None`` for the trainer's seed.

    Raises:
        InputError: For an argument outside its range; at ``INIT`` or ``FIT_START``, for a run it cannot be used in.

    Example:
        >>> from composer import Trainer
        >>> from composer_effalgos import InfoBatch
        >>> trainer = Trainer(model=model, train_dataloader=loader, max_duration='30ep', algorithms=[InfoBatch()])  # doctest: +SKIP
    """

    _plan: Plan  # from INIT on
    _state: State

    def __init__(
        self, prune_ratio: float = 0.5, delta: float = 0.875, *, per_sample_loss: PerSampleLoss | None = None, seed: int | None = None
    ) -> None:
        _check_ratio('prune_ratio', prune_ratio)
        if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 <= delta <= 1:
            raise InputError(f'delta: must be a number in [0, 1], got {delta!r}')
        if per_sample_loss is not None and not callable(per_sample_loss):
            raise InputError(f'per_sample_loss: must be callable(outputs, batch) -> [B], got {per_sample_loss!r}')
        self.prune_ratio = prune_ratio
        self.delta = delta
        self.per_sample_loss = per_sample_loss
        self.seed = seed
        self.samples_saved = 0
        self._scores = torch.empty(0)
        self._pending: Tensor | None = None  # this epoch's losses in the rank's order, on the training device; NaN where not trained yet
        self._data_changes = 0

    def __repr__(self) -> str:
        return f'{type(self).__name__}(prune_ratio={self.prune_ratio}, delta={self.delta}, seed={self.seed})'

    @property
    def scores(self) -> Tensor:
        """The last loss of each sample, float32 ``[N]`` on the CPU; NaN where a sample has none yet, inf where its loss was not finite.

        Within an epoch, other ranks' losses come in at its end.
        """
        return self._merged(self._gather_locally())

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.EPOCH_END, Event.FIT_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._initialise(state)
        elif self._pending is not None:
            self._scores = self._merged(self._gather())
            self._pending = None
            logger.log_metrics({'infobatch/samples_saved': self.samples_saved, 'infobatch/mean_score': _finite_mean(self._scores)})

    def state_dict(self) -> dict[str, Any]:
        # every rank saves together, so within an epoch the scores can be exchanged here
        return {**super().state_dict(), 'scores': self._merged(self._gather()), 'samples_saved': self.samples_saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scores, self.samples_saved = state['scores'].cpu(), state['samples_saved']

    def _initialise(self, state: State) -> None:
        if sum(isinstance(algorithm, InfoBatch) for algorithm in state.algorithms) > 1:
            raise InputError('algorithms: InfoBatch is given twice; keep one')
        self._plan = Plan.of(state)
        self._state = state
        self._scores, self._pending, self.samples_saved, self._data_changes = torch.empty(0), None, 0, 0
        self._plan.prune = self._prune
        loss = self._plan.request_loss(state, type(self).__name__, self.per_sample_loss)
        loss.subscribers.append(self._observe)

    def _prune(self, candidates: Tensor, epoch: int) -> tuple[Tensor, Tensor | None]:
        """The plan asks which of the candidates to keep in this epoch."""
        plan, state = self._plan, self._state
        if plan.data_changes != self._data_changes:
            known = self._data_changes == 0 and len(self._scores) == plan.loader.num_samples  # loaded from a checkpoint
            self._data_changes = plan.data_changes
            self._scores = self._scores if known else torch.full((plan.loader.num_samples,), math.nan)
        scores = self._scores[candidates]
        kept, weights = torch.arange(len(candidates)), None
        if self._pruning(state) and not bool(torch.isnan(scores).any()):
            seed = state.rank_zero_seed if self.seed is None else self.seed
            kept, weights = prune(scores, self.prune_ratio, torch.Generator().manual_seed(stream_seed(seed, _STREAM, epoch)))
        self.samples_saved += len(candidates) - len(kept)
        plan.loader.facts['pruned_fraction'] = 1 - len(kept) / len(candidates)
        return kept, weights

    def _pruning(self, state: State) -> bool:
        if self.prune_ratio == 0:
            return False
        assert state.max_duration is not None
        if state.max_duration.unit == TimeUnit.EPOCH:
            # counted in epochs, with a guard against 0.7 * 10 = 7.000000000000001
            return int(state.timestamp.epoch) < math.ceil(self.delta * state.max_duration.value - 1e-9)
        elapsed = state.get_elapsed_duration()
        return elapsed is not None and elapsed.value < self.delta

    def _observe(self, losses: Tensor, where: slice) -> None:
        if self._pending is None:
            self._pending = losses.new_full((len(self._plan.loader.rank_order),), math.nan)
        self._pending[where] = torch.nan_to_num(losses, nan=math.inf, posinf=math.inf, neginf=math.inf)

    def _gather_locally(self) -> list[tuple[Tensor, Tensor]]:
        if self._pending is None:
            return []
        return [(self._plan.loader.rank_order, self._pending.cpu())]

    def _gather(self) -> list[tuple[Tensor, Tensor]]:
        """(samples, losses) of every rank; a collective call."""
        if self._pending is None or dist.get_world_size() == 1:
            return self._gather_locally()
        orders = self._plan.loader.rank_orders()
        padded = self._state.device.tensor_to_device(torch.full((max(map(len, orders)),), math.nan))
        padded[: len(self._pending)] = self._pending
        return [(order, losses[: len(order)].cpu()) for order, losses in zip(orders, dist.all_gather(padded), strict=True)]

    def _merged(self, gathered: list[tuple[Tensor, Tensor]]) -> Tensor:
        scores = self._scores.clone()
        for order, losses in gathered:
            trained = ~torch.isnan(losses)
            scores[order[trained]] = losses[trained]
        return scores


def _finite_mean(scores: Tensor) -> float:
    finite = scores[torch.isfinite(scores)]
    return finite.mean().item() if len(finite) else math.nan
