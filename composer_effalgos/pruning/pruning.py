"""Pruning: each epoch trains on the samples that a rule keeps, based on their scores so far."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from composer.core import Algorithm, Event, State, TimeUnit
from composer.loggers import Logger
from torch import Tensor

from composer_effalgos.plan import (
    Budget,
    Choice,
    EpochPlanner,
    PerSampleLoss,
    Ranks,
    SampleRows,
    SampleTable,
    Selector,
    ShardTable,
    check_budget,
    check_per_sample_loss,
    check_seed,
    class_labels,
    stream_seed,
    tokens_per_sample,
)
from composer_effalgos.plan.sharded import pack, unpack
from composer_effalgos.pruning.prune import finite_mean, least_kept
from composer_effalgos.pruning.ratio import Ratio, ratio_schedule
from composer_effalgos.pruning.rules import Epoch, PruningRule, Step, check_kept, check_shard, find_rule
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import CheckpointError, InputError

_STREAM = 10  # identifies the random stream of pruning, see stream_seed


class Pruning(Selector, Algorithm):
    """Trains each epoch on the samples that a rule keeps.

    Samples are scored while they are trained on, without an extra pass. In each epoch the rule decides from the scores which samples to
    keep, and with which weights. Samples without a score are kept. A rule that uses scores starts once every sample has been through an
    epoch and most have a score; the last ``1 - delta`` of the run trains on everything, unless the rule says otherwise. Schedules follow
    the time of the unpruned run.

    Runs on ``INIT``, ``FIT_START``, ``EPOCH_END`` and ``FIT_END``. The method card lists the sources of the rules.

    Args:
        rule: The name of a rule in the method card; its name and options, as in ``{'name': 'seta', 'groups': 5}``; or your own
            :class:`PruningRule`.
        prune_ratio: The fraction to prune, in [0, 1); the rule determines what it is a fraction of. For a schedule, pass a function of the
            run's progress, or points ``[(progress, ratio), ...]`` for linear interpolation.
        delta: The fraction of the run in which samples are pruned, in [0, 1].
        per_sample_loss: ``(outputs, batch) -> [B, ...]``; ``None`` to derive the loss of each sample from the model's own loss. The model's
            loss remains the training loss; see :class:`~composer_effalgos.plan.WeightedLoss`.
        seed: Seeds the random choices; ``None`` for the trainer's seed.
        labels: Class indices of the training samples, ``[N]``; ``None`` to read the dataset's ``targets`` if the rule needs them.
        budget: How a ``max_duration`` that is not in epochs is counted: ``'trained'`` counts the samples trained on, so pruning saves no
            time; ``'full'`` counts what a run without pruning would train. With ``'full'`` it must be a whole number of full epochs;
            batches cannot be combined with AdaBatch, and tokens need a dataset that states the number per sample (``seq_len``).
        shard: Whether each rank keeps only the rows of its own part of the samples and 1 / ranks of each epoch's plan, for very large
            datasets. The number of pruned samples and the distribution of the choices stay the same. Choices and order are drawn per
            sample, so they differ from those without ``shard``, but are the same for any number of ranks. ``scores`` then has only this
            rank's samples. Available for the rules ``infobatch``, ``random``, ``pdd``, ``ies`` and your own rules with ``pointwise`` or
            ``keep_part``; not with ``labels`` or ``SubsetSelection``.

    Raises:
        InputError: For an argument outside its range; at ``INIT`` or ``FIT_START``, for a run in which it cannot be used.

    Example:
        >>> from composer import Trainer
        >>> from composer_effalgos import Pruning
        >>> algorithm = Pruning('random', prune_ratio=0.3)
        >>> trainer = Trainer(model=model, train_dataloader=loader, max_duration='30ep', algorithms=[algorithm])  # doctest: +SKIP
    """

    stage = 'fine'
    _planner: EpochPlanner  # from INIT on
    _state: State
    _table: SampleTable

    def __init__(
        self,
        rule: PruningRule | str | Mapping[str, Any],
        *,
        prune_ratio: Ratio = 0.5,
        delta: float = 0.875,
        per_sample_loss: PerSampleLoss | None = None,
        seed: int | None = None,
        labels: Sequence[int] | Tensor | None = None,
        budget: Budget = 'trained',
        shard: bool = False,
    ) -> None:
        self.rule = find_rule(rule)
        self._ratio: Callable[[float], float] = ratio_schedule(prune_ratio)
        check_number('delta', delta, least=0, most=1)
        check_seed(seed)
        check_per_sample_loss(per_sample_loss)
        check_budget(budget)
        check_shard(shard, self.rule, type(self).__name__, labels)
        self.prune_ratio = prune_ratio
        self.delta = delta
        self.per_sample_loss = per_sample_loss
        self.seed = seed
        self.labels = labels
        self.budget = budget
        self.shard = shard
        self.samples_saved = 0
        self.epochs_pruned = 0
        self._decided = 0  # epochs in which the rule made a decision
        self._labels: Tensor | None = None
        self._open_ended = False
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        shard = ', shard=True' if self.shard else ''
        return f'{type(self).__name__}({self.rule!r}, prune_ratio={self.prune_ratio!r}, delta={self.delta}, seed={self.seed}{shard})'

    @property
    def scores(self) -> Tensor:
        """The score of each sample, float32 ``[N]`` on the CPU; NaN if a sample has none yet, inf if its loss was not finite.

        Within an epoch, scores of samples that other ranks trained on are added at its end. With ``shard=True`` these are only the scores
        of this rank's samples, ``rank``, ``rank + ranks``, ..., as of the end of the last epoch.
        """
        if not hasattr(self, '_table'):  # before INIT
            return torch.empty(0)
        rows = self._table.of_this_rank()
        return torch.where(rows.scored, rows.scores, math.nan) if self.rule.history else torch.full((len(rows),), math.nan)

    @property
    def sample_scores(self) -> Tensor | None:
        return self.scores if self.rule.history and not self.shard else None

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.FIT_START, Event.EPOCH_END, Event.FIT_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._initialise(state)
            return
        if event == Event.EPOCH_END:
            self._table.end_epoch(state)
        elif self._table.noted:  # at FIT_START, after an interrupted fit
            self._table.exchange(state)
        else:
            self._warn_at_end(event, state)
            return
        self._log(logger)
        self._warn_at_end(event, state)

    def state_dict(self) -> dict[str, Any]:
        # all ranks save at the same time, so scores can be exchanged here within an epoch
        counts = {'samples_saved': self.samples_saved, 'epochs_pruned': self.epochs_pruned, 'epochs_decided': self._decided}
        return pack(self._state, {**super().state_dict(), **self._table.state_dict(self._state), **counts})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state, self._planner.expects_state = unpack(state), True
        self.samples_saved, self.epochs_pruned, self._decided = (
            state[name] for name in ('samples_saved', 'epochs_pruned', 'epochs_decided')
        )
        if 'history' in state:
            if len(state['history']) != self.rule.history:
                raise CheckpointError(
                    f'the checkpoint keeps {len(state["history"])} scores of each sample, this rule needs {self.rule.history}; '
                    'resume with the same rule, or load_weights_only=True'
                )
            self._table.load_state_dict(state)

    # ------------------------------------------------------------------ the run

    def _initialise(self, state: State) -> None:
        self._planner, self._state = EpochPlanner.of(state), state
        self._planner.selectors.add(self)
        self._planner.full_budget |= self.budget == 'full'
        about = self._planner, self.rule.history, self.rule.decay
        self._table = ShardTable(*about, Ranks.of(state)) if self.shard else SampleTable(*about)
        self.samples_saved = self.epochs_pruned = self._decided = 0
        self._open_ended, self._warned = False, set()
        if self.rule.history:
            loss = self._planner.request_loss(state, type(self).__name__, self.per_sample_loss)
            loss.subscribers.append(self._observe)

    def new_data(self, *, first: bool) -> None:
        table, loader = self._table, self._planner.loader
        if not first or len(table) != loader.num_samples:  # otherwise the rows come from a checkpoint
            table.reset(loader.num_samples)
        self.rule.new_data(loader.num_samples)
        self._labels = None
        if self.rule.needs_labels or self.labels is not None:
            found = class_labels(loader.dataset) if self.labels is None else self.labels
            if found is None:
                raise InputError(
                    f'labels: expected the class of every sample, got none, and {type(loader.dataset).__name__} has no targets; '
                    f'pass {type(self).__name__}(labels=[...])'
                )
            self._labels = torch.as_tensor(found)
            if self._labels.shape != (loader.num_samples,) or self._labels.is_floating_point():
                got = f'{self._labels.dtype} {tuple(self._labels.shape)}'
                raise InputError(f'labels: expected {loader.num_samples} class indices, got {got}')

    def begin(self, state: State) -> None:
        horizon, end = self._planner.horizon, self._last_pruned()
        self._open_ended = horizon.extended and end is not None and end <= int(state.timestamp.epoch)
        first = self._first_prunable(state)
        if not self._wanted():
            return
        if self._open_ended and self.delta < 1:
            self._warn_once(
                'end unknown',
                'fit(duration=...) continues past the planned end of the run by an unknown length, so the last epochs cannot be trained on '
                'everything; give the length of the whole run as Trainer(max_duration=...)',
            )
        elif not self._open_ended and not self.epochs_pruned and first is not None and not self._within(*first):
            assert horizon.end is not None
            before = int(state.timestamp.epoch)  # possibly trained without this algorithm
            self._warn_once(
                'none',
                f'no epoch {f"from epoch {before} on" if before else "of this run"} can be pruned: max_duration is '
                f'{horizon.end.to_timestring()!r}, scores exist only after the first epoch, and delta={self.delta} trains the rest on '
                'everything; train for longer, or set delta=1.0',
            )

    def choose(self, candidates: Tensor | None, epoch: int) -> Choice | None:
        table, loader = self._table, self._planner.loader
        rows = table.rows if candidates is None else table.rows.take(candidates)
        # after an epoch some samples may still have no score: drop_last, a limit on the batches
        size = table.total(len(rows))
        ready = not self.rule.history or (self._all_offered(rows) and 2 * table.total(int(rows.scored.sum())) > size)
        table.offer(candidates)
        if not ready or not self._wanted():
            return None
        horizon, progress = self._planner.horizon, self._planner.horizon.progress(self._state)
        assert horizon.end is not None
        total = int(horizon.end.value) if horizon.end.unit == TimeUnit.EPOCH else None
        labels = self._labels if self._labels is None or candidates is None else self._labels[candidates]
        seed = self._state.rank_zero_seed if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(stream_seed(seed, _STREAM, epoch))
        asked = Epoch(epoch, total, progress, self._ratio(progress), generator, labels)
        choice = table.agreed(self._apply_rule(rows, asked, self._open_ended or self._within(epoch, progress)))
        if choice is None or self._too_few(choice.num_kept, size, epoch):
            return None
        limit = size if loader.max_batches is None else loader.full_samples  # maximum number of samples in an epoch
        surplus = loader.surplus(choice.num_kept, self._planner.current_batch_size(), even=self._planner.in_step(self._state))
        saved = min(size, limit) - min(choice.num_kept - surplus, limit)
        self.samples_saved += saved
        self.epochs_pruned += saved > 0
        loader.metrics.pruned_fraction = 1 - choice.num_kept / size
        return choice

    def _too_few(self, kept: int, candidates: int, epoch: int) -> bool:
        """Whether an epoch would keep too few samples; warns once."""
        loader = self._planner.loader
        least = least_kept(candidates, loader.initial_batch_size * loader.world_size, loader.world_size)
        if kept >= least:
            return False
        self._warn_once(
            'too few',
            f'the rule keeps {kept} of {candidates} samples in epoch {epoch}, fewer than {least} (a global batch, or half of the samples '
            'where there are fewer than two): such an epoch trains on everything',
        )
        return True

    def _apply_rule(self, rows: SampleRows, epoch: Epoch, pruning: bool) -> Choice | None:
        """The rule's decision. Rules that use scores see only samples with a score, and all others are kept."""
        if pruning and self.rule.uses_ratio and epoch.prune_ratio == 0:
            return None
        decide: Callable[[SampleRows, Epoch], Any] = self.rule.keep if pruning else self.rule.keep_at_end
        if pruning and isinstance(self._table, ShardTable):
            decide = partial(self.rule.keep_part, shard=self._table.shard)
        self._decided += pruning
        if not self.rule.history or self.rule.takes_unscored or bool(rows.scored.all()):
            return check_kept(self.rule, decide(rows, epoch), len(rows))
        scored = rows.scored.nonzero()[:, 0]
        labels = None if epoch.labels is None else epoch.labels[scored]
        choice = check_kept(self.rule, decide(rows.take(scored), replace(epoch, labels=labels)), len(scored))
        if choice is None:
            return None
        keep, weights = ~rows.scored, torch.ones(len(rows))
        keep[scored[choice.positions]] = True
        if choice.weights is not None:
            weights[scored[choice.positions]] = choice.weights
        positions = keep.nonzero()[:, 0]
        return Choice(positions, None if choice.weights is None else weights[positions])

    def _observe(self, losses: Tensor, where: slice, outputs: Any, batch: Any) -> None:
        """Receives the losses of a microbatch from the weighted loss; moves no data to the host."""
        with torch.no_grad():
            scores = self.rule.score(Step(losses, outputs, batch, self._planner.loader.rank_order[where]))
        if not isinstance(scores, Tensor) or scores.shape != losses.shape:
            got = f'one of {list(scores.shape)}' if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(
                f'{type(self.rule).__name__}.score: expected one number per sample, a float tensor {list(losses.shape)}, got {got}'
            )
        self._table.note(scores.detach().float(), where)

    # ------------------------------------------------------------------ when

    def _all_offered(self, rows: SampleRows) -> bool:
        return self._table.total(int(not rows.offered.all())) == 0

    def _wanted(self) -> bool:
        """Whether the arguments request pruning at all."""
        return self.delta > 0 and not (self.rule.uses_ratio and self.prune_ratio == 0)

    def _last_pruned(self) -> int | None:
        """The epoch at which pruning ends; ``None`` if the run's length is not in epochs."""
        end = self._planner.horizon.end
        assert end is not None
        # An epoch that overlaps the last 1 - delta of the run is not pruned. 1e-9: in floating point, 0.29 * 100 is less than 29.
        return math.floor(self.delta * end.value + 1e-9) if end.unit == TimeUnit.EPOCH else None

    def _within(self, epoch: int, progress: float) -> bool:
        """Whether an epoch that begins at ``progress`` lies in the pruned fraction of the run, even at its full length."""
        last, end, loader = self._last_pruned(), self._planner.horizon.end, self._planner.loader
        if last is not None:
            return epoch < last
        assert end is not None
        length = loader.full_epoch.get(end.unit, 0)
        if end.unit == TimeUnit.TOKEN:
            length = (tokens_per_sample(loader.dataset) or 0) * loader.full_samples
        return progress < self.delta and (self.delta == 1 or progress + length / end.value <= self.delta + 1e-9)

    def _first_prunable(self, state: State) -> tuple[int, float] | None:
        """Number and start of the first epoch that could be pruned; ``None`` if unknown."""
        loader, end, now = self._planner.loader, self._planner.horizon.end, state.timestamp
        assert end is not None
        rows = self._table.rows
        fresh = bool(self.rule.history) and not self._all_offered(rows)
        if not fresh and int(now.batch_in_epoch) == 0:
            return int(now.epoch), self._planner.horizon.progress(state)
        begins = {
            TimeUnit.EPOCH: int(now.epoch) + 1,
            TimeUnit.BATCH: int(now.batch - now.batch_in_epoch) + loader.full_batches,
            TimeUnit.SAMPLE: int(now.sample - now.sample_in_epoch) + loader.full_samples,
        }.get(end.unit)
        return None if begins is None else (int(now.epoch) + 1, begins / int(end.value))

    # ------------------------------------------------------------------ what is said

    def _log(self, logger: Logger) -> None:
        metrics = {'samples_saved': self.samples_saved, 'pruned_fraction': self._planner.loader.metrics.pruned_fraction}
        if self.rule.history:
            table = self._table
            scores = table.rows.scores[table.rows.scored]
            mean = table.shard.finite_mean(scores) if isinstance(table, ShardTable) else finite_mean(scores.numpy())
            metrics |= {'mean_score': mean, 'not_finite': table.total(int(torch.isinf(scores).sum()))}
        logger.log_metrics({f'{type(self).__name__.lower()}/{name}': value for name, value in metrics.items()})

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(f'{type(self).__name__}: {message}', stacklevel=2)

    def _warn_at_end(self, event: Event, state: State) -> None:
        """Warns if no epoch of a run with pruning was pruned."""
        end = self._planner.horizon.end
        if event != Event.FIT_END or end is None or state.timestamp.get(end.unit) < end or self.epochs_pruned or not self._wanted():
            return
        table, limit = self._table, self._planner.loader.max_batches
        why = (
            f'{table.total(int(table.rows.scored.sum()))} of {len(table)} samples have a score'
            if self.rule.history
            else 'the rule was never asked'
        )
        if self._decided:
            why = f'{type(self.rule).__name__} decided on {self._decided} of {int(state.timestamp.epoch)} epochs'
            few = ' or too few to train on' if 'too few' in self._warned else ''
            why += f' and kept every sample{few}' if limit is None else ''
        if limit is not None:
            why += f'; train_subset_num_batches={limit} ends every epoch before pruning would'
        self._warn_once('none', f'no epoch of this run was shortened: {why}')
