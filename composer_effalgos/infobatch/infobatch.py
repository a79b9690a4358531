"""InfoBatch: unbiased dynamic data pruning (Qin et al., ICLR 2024, arXiv 2303.04947)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from composer.core import Algorithm, Event, State, TimeUnit
from composer.loggers import Logger
from torch import Tensor

from composer_effalgos.checks import check_number
from composer_effalgos.errors import InputError
from composer_effalgos.plan import (
    EpochRecord,
    PerSampleLoss,
    Plan,
    PlannedDataLoader,
    check_seed,
    class_labels,
    per_sample_mean,
    stream_seed,
)

_STREAM = 10  # of random numbers, see stream_seed
_BLOCK = 1 << 16  # random numbers that are drawn together, in the processor's cache


def prune(
    scores: Tensor,
    prune_ratio: float,
    generator: torch.Generator | None = None,
    *,
    bands: Sequence[tuple[float, float]] | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decides which samples one epoch trains on, and how much each counts.

    Of the ``m`` samples whose score is below the mean, ``floor((1 - prune_ratio) m)``, drawn at random, are kept with weight
    ``1 / (1 - prune_ratio)``; all others are kept with weight 1 (Qin et al., arXiv 2303.04947, equations 3 and 5). The expected weighted
    gradient is the full gradient. Samples with a NaN or infinite score are kept with weight 1 and left out of the mean.

    Args:
        scores: One score a sample (its last loss), float ``[N]``, on the CPU.
        prune_ratio: The share of below-mean samples to drop, in [0, 1).
        generator: Draws which; ``None`` for torch's default generator.
        bands: Quantile thresholds in place of the mean and ``prune_ratio``: ``(quantile, ratio)`` pairs in ascending order of the
            quantile. The samples below the first quantile of the scores are pruned with the first ratio, those between the first and the
            second with the second, and so on; those from the last quantile on are kept.
        labels: Class indices, int64 ``[N]``: the mean (or the quantiles) is each class's own, so that no class is pruned away.

    Returns:
        The kept samples in ascending order, int64 ``[n]``, and their weights, float32 ``[n]``.

    Raises:
        InputError: Where ``prune_ratio`` or ``bands`` is outside its range, or ``scores`` or ``labels`` has another shape.
    """
    check_number('prune_ratio', prune_ratio, least=0, below=1)
    if scores.ndim != 1:
        raise InputError(f'scores: must have one dimension, got shape {tuple(scores.shape)}')
    if labels is not None and (labels.shape != scores.shape or labels.is_floating_point()):
        raise InputError(f'labels: must be class indices of shape {tuple(scores.shape)}, got {labels.dtype} {tuple(labels.shape)}')
    values = scores.detach().numpy()
    pairs = None if bands is None else _checked_bands(bands)
    ratios = [prune_ratio] if pairs is None else [ratio for _, ratio in pairs]
    draws = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    groups = np.zeros(len(values), np.uint8)
    keep = np.ones(len(values), bool)
    for members in _classes(labels):
        own = values[members]
        groups[members] = own_groups = _groups(own, [_mean(own)] if pairs is None else _quantiles(own, [quantile for quantile, _ in pairs]))
        for number, ratio in enumerate(ratios, 1):
            keep[members] &= ~_drop(own_groups == number, ratio, draws)
    kept = np.flatnonzero(keep)
    group, weights = groups.take(kept), np.ones(len(kept), np.float32)
    for number, ratio in enumerate(ratios, 1):  # several times faster than looking them up by group
        np.maximum(weights, (group == number) * np.float32(1 / (1 - ratio)), out=weights)
    return torch.from_numpy(kept), torch.from_numpy(weights)


def _classes(labels: Tensor | None) -> Iterator[np.ndarray | slice]:
    """The samples of each class; without labels all samples together."""
    if labels is None:
        yield slice(None)
        return
    by_class = np.argsort(labels.numpy(), kind='stable')
    _, sizes = np.unique(labels.numpy(), return_counts=True)
    yield from np.split(by_class, np.cumsum(sizes)[:-1])


def _mean(values: np.ndarray) -> float:
    """Mean of the finite values in double precision; NaN where there are none."""
    total, count = values.sum(dtype=np.float64), len(values)
    if not np.isfinite(total):
        finite = np.isfinite(values)
        total, count = values.sum(dtype=np.float64, where=finite), np.count_nonzero(finite)
    return float(total / count) if count else math.nan


def _quantiles(values: np.ndarray, quantiles: list[float]) -> list[float]:
    """Quantiles of the finite values in double precision; NaN where there are none."""
    finite = values[np.isfinite(values)].astype(np.float64)
    return np.quantile(finite, quantiles).tolist() if len(finite) else [math.nan] * len(quantiles)


def _groups(values: np.ndarray, limits: list[float]) -> np.ndarray:
    """Which band each value lies in, from 1, or 0 where it is not below the last of the ascending limits: uint8 ``[N]``."""
    below = np.zeros(len(values), np.uint8)
    for limit in limits:
        bound = values.dtype.type(limit)  # in the values' own precision: x < limit just if x < the least such number not below the limit
        below += values < (np.nextafter(bound, values.dtype.type(np.inf)) if float(bound) < limit else bound)
    below *= values > -np.inf
    return np.where(below > 0, len(limits) + 1 - below, 0).astype(np.uint8) if len(limits) > 1 else below


def _drop(members: np.ndarray, ratio: float, draws: np.random.Generator) -> np.ndarray:
    """Draws ``m - floor((1 - ratio) m)`` of a group's ``m`` members, every choice as likely as any other.

    Each member is drawn on its own with a probability within 1/512 of ``ratio``; then as many as are too many or too few, a small part of
    them, are put back or drawn in addition, uniformly at random. By symmetry no member is drawn more often than another, and this costs
    about a nanosecond a sample, much less than a shuffle.

    Args:
        members: Bool ``[N]``.
        ratio: The share to draw.
        draws: Random numbers.

    Returns:
        Bool ``[N]``.
    """
    size = np.count_nonzero(members)
    wanted = size - math.floor(size * (1 - ratio) + 1e-9)  # (1 - 0.9) * 10 must be 1
    dropped = np.zeros(len(members), bool)
    if not wanted:
        return dropped
    for start in range(0, len(members), _BLOCK):
        part = members[start : start + _BLOCK]
        numbers = draws.bit_generator.random_raw(-(-len(part) // 8)).view(np.uint8)[: len(part)]
        np.logical_and(part, numbers < round(ratio * 2**8), out=dropped[start : start + _BLOCK])
    surplus = np.count_nonzero(dropped) - wanted
    dropped[_choose(dropped if surplus > 0 else members > dropped, abs(surplus), draws)] = surplus < 0
    return dropped


def _choose(mask: np.ndarray, count: int, draws: np.random.Generator) -> np.ndarray:
    """Positions of ``count`` of the true entries of ``mask``, every choice as likely as any other."""
    size = np.count_nonzero(mask)
    if 32 * count > size:
        return np.flatnonzero(mask)[draws.choice(size, count, replace=False, shuffle=False)]
    found: dict[int, None] = {}  # few of many: the first of random positions that are true, without looking at them all
    while len(found) < count:
        tries = draws.integers(len(mask), size=16 + 2 * (count - len(found)) * len(mask) // size)
        found.update(dict.fromkeys(tries[mask[tries]].tolist()))
    return np.fromiter(found, np.int64)[:count]


def _checked_bands(bands: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    try:
        pairs = [(quantile, ratio) for quantile, ratio in bands]
    except (TypeError, ValueError) as error:
        raise InputError(f'bands: must be a list of (quantile, ratio) pairs, got {bands!r}') from error
    for number, (quantile, ratio) in enumerate(pairs):
        check_number(f'bands[{number}] ratio', ratio, least=0, below=1)
        check_number(f'bands[{number}] quantile', quantile, above=0, most=1)
    if not 0 < len(pairs) < 250 or [q for q, _ in pairs] != sorted({q for q, _ in pairs}):
        raise InputError(f'bands: quantiles must ascend, got {[q for q, _ in pairs]}')
    return pairs


class InfoBatch(Algorithm):
    """Skips well-learned samples without biasing the gradient.

    Each epoch, samples whose score (their last loss) lies below the mean are dropped with probability ``prune_ratio``; those of them that
    are kept count ``1 / (1 - prune_ratio)`` times, so the expected gradient stays that of the full data. Nothing is pruned before every
    sample has a score, and the last ``1 - delta`` of the run trains on everything. Schedules keep the time of the unpruned run. A NaN or
    infinite loss never prunes a sample and does not move the mean.

    Runs on ``INIT``, ``FIT_START``, ``EPOCH_END`` and ``FIT_END``. Source: Qin et al., "InfoBatch: Lossless Training Speed Up by Unbiased
    Dynamic Data Pruning", ICLR 2024, arXiv 2303.04947.

    Args:
        prune_ratio: The share of below-mean samples that an epoch drops, in [0, 1).
        delta: The share of the run in which samples are pruned, in [0, 1]; the rest trains on everything.
        per_sample_loss: ``(outputs, batch) -> [B, ...]``; ``None`` to take the model's own loss sample by sample. It replaces
            ``model.loss`` during training steps.
        seed: Seeds the draws; ``None`` for the trainer's seed.
        score: ``'loss'``, the last loss (the paper's); ``'ema'``, an exponential moving average of the losses; or a function
            ``(outputs, batch) -> [B, ...]`` of your own, low for samples that are well learned.
        score_decay: The weight of the old average under ``score='ema'``, in [0, 1).
        bands: Quantile thresholds in place of the mean, see :func:`prune`.
        class_balanced: Whether every class is pruned by its own mean (or quantiles), so that no class is pruned away.
        labels: Class indices of the training samples, ``[N]``, for ``class_balanced``; ``None`` to read the data set's ``targets``.

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
    ) -> None:
        check_number('prune_ratio', prune_ratio, least=0, below=1)
        check_number('score_decay', score_decay, least=0, below=1)
        check_number('delta', delta, least=0, most=1)
        check_seed(seed)
        if per_sample_loss is not None and not callable(per_sample_loss):
            raise InputError(f'per_sample_loss: must be callable(outputs, batch) -> [B], got {per_sample_loss!r}')
        if score not in ('loss', 'ema') and not callable(score):
            raise InputError(f"score: must be 'loss', 'ema' or callable(outputs, batch) -> [B], got {score!r}")
        self.prune_ratio = prune_ratio
        self.delta = delta
        self.per_sample_loss = per_sample_loss
        self.seed = seed
        self.score = score
        self.score_decay = score_decay
        self.bands = None if bands is None else _checked_bands(bands)
        self.class_balanced = class_balanced
        self.labels = labels
        self.samples_saved = 0
        self._scores = torch.empty(0)
        self._record: EpochRecord | None = None  # this epoch's scores
        self._labels: Tensor | None = None
        self._data_changes = 0

    def __repr__(self) -> str:
        settings: dict[str, Any] = {'prune_ratio': self.prune_ratio, 'delta': self.delta, 'seed': self.seed}
        settings |= {'score': getattr(self.score, '__name__', self.score)} if self.score != 'loss' else {}
        settings |= {'score_decay': self.score_decay} if self.score == 'ema' else {}
        settings |= {'bands': self.bands} if self.bands is not None else {}
        settings |= {'class_balanced': True} if self.class_balanced else {}
        return f'{type(self).__name__}({", ".join(f"{name}={value!r}" for name, value in settings.items())})'

    @property
    def scores(self) -> Tensor:
        """The score of each sample, float32 ``[N]`` on the CPU; NaN where a sample has none yet, inf where its loss was not finite.

        Within an epoch, what other ranks trained on comes in at its end.
        """
        return self._scores if self._record is None else self._merged(self._record.of_this_rank())

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.FIT_START, Event.EPOCH_END, Event.FIT_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._initialise(state)
        elif self._record is not None and self._record.begun:  # at FIT_START after a fit that was interrupted
            self._scores = self._merged(self._record.of_all_ranks(state))
            self._record.clear()
            logger.log_metrics(
                {
                    'infobatch/samples_saved': self.samples_saved,
                    'infobatch/pruned_fraction': self._plan.loader.facts.get('pruned_fraction', 0.0),
                    'infobatch/mean_score': _mean(self._scores.numpy()),
                    'infobatch/not_finite': int(torch.isinf(self._scores).sum()),
                }
            )

    def state_dict(self) -> dict[str, Any]:
        # every rank saves together, so within an epoch the scores can be exchanged here
        noted = [] if self._record is None else self._record.of_all_ranks(self._state)
        return {**super().state_dict(), 'scores': self._merged(noted), 'samples_saved': self.samples_saved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scores, self.samples_saved = state['scores'].cpu(), state['samples_saved']

    def _initialise(self, state: State) -> None:
        if sum(isinstance(algorithm, InfoBatch) for algorithm in state.algorithms) > 1:
            raise InputError('algorithms: InfoBatch is given twice; keep one')
        self._plan, self._state = Plan.of(state), state
        self._scores, self._record, self.samples_saved, self._data_changes = torch.empty(0), EpochRecord(self._plan), 0, 0
        self._plan.prune = self._prune
        loss = self._plan.request_loss(state, type(self).__name__, self.per_sample_loss)
        loss.subscribers.append(self._observe)

    def _prune(self, candidates: Tensor | None, epoch: int) -> tuple[Tensor, Tensor | None] | None:
        """The plan asks which of the candidates to keep in this epoch."""
        loader = self._plan.loader
        if self._plan.data_changes != self._data_changes:
            known = self._data_changes == 0 and len(self._scores) == loader.num_samples  # loaded from a checkpoint
            self._data_changes = self._plan.data_changes
            self._scores = self._scores if known else torch.full((loader.num_samples,), math.nan)
            self._labels = self._class_labels(loader) if self.class_balanced else None
        scores = self._scores if candidates is None else self._scores[candidates]
        loader.facts['pruned_fraction'] = 0.0
        # where all ranks have to get as many samples, fewer than there are ranks were left out; prune keeps what has no score
        left_out = loader.world_size - 1 if self._plan.in_step(self._state) else 0
        if not self._pruning() or int(torch.isnan(scores).sum()) > left_out:
            return None
        labels = self._labels if self._labels is None or candidates is None else self._labels[candidates]
        seed = self._state.rank_zero_seed if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(stream_seed(seed, _STREAM, epoch))
        kept, weights = prune(scores, self.prune_ratio, generator, bands=self.bands, labels=labels)
        self.samples_saved += len(scores) - len(kept)
        loader.facts['pruned_fraction'] = 1 - len(kept) / len(scores)
        return kept, weights

    def _class_labels(self, loader: PlannedDataLoader) -> Tensor:
        found = class_labels(loader.dataset) if self.labels is None else self.labels
        if found is None:
            raise InputError(
                f'labels: class_balanced needs the class of every sample, and {type(loader.dataset).__name__} has no targets; '
                'pass InfoBatch(labels=[...])'
            )
        labels = torch.as_tensor(found)
        if labels.shape != (loader.num_samples,) or labels.is_floating_point():
            raise InputError(f'labels: must be {loader.num_samples} class indices, got {labels.dtype} {tuple(labels.shape)}')
        return labels

    def _pruning(self) -> bool:
        if self.prune_ratio == 0 and self.bands is None:
            return False
        length = self._state.max_duration
        assert length is not None
        if length.unit == TimeUnit.EPOCH:
            # an epoch that reaches into the last 1 - delta of the run is a full one (and 0.29 * 100 is less than 29)
            return int(self._state.timestamp.epoch) < math.floor(self.delta * length.value + 1e-9)
        elapsed = self._state.get_elapsed_duration()
        return elapsed is not None and elapsed.value < self.delta

    def _observe(self, losses: Tensor, where: slice, outputs: Any, batch: Any) -> None:
        """The weighted loss shows a microbatch's losses; no number leaves the device here."""
        assert self._record is not None
        if callable(self.score):
            with torch.no_grad():
                scores = per_sample_mean(self.score(outputs, batch)).float()
            if scores.shape != losses.shape:
                raise InputError(f'score: must give one number a sample, {tuple(losses.shape)}, got {tuple(scores.shape)}')
            losses = scores
        self._record.note(torch.nan_to_num(losses, nan=math.inf, posinf=math.inf, neginf=math.inf), where)

    def _merged(self, noted: list[tuple[Tensor, Tensor]]) -> Tensor:
        scores = self._scores.clone()
        for samples, fresh in noted:
            if self.score == 'ema':
                old = scores[samples]
                blend = torch.isfinite(old) & torch.isfinite(fresh)
                fresh = torch.where(blend, self.score_decay * old + (1 - self.score_decay) * fresh, fresh)
            scores[samples] = fresh
        return scores
