"""AdaBatch: batch sizes that grow during training (Devarakonda et al., arXiv 1712.02029; Smith et al., arXiv 1711.00489)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from composer.core import Algorithm, Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger
from torch.optim.lr_scheduler import LRScheduler

from composer_effalgos.adabatch.policies import Every, Milestones, Policy, Progress, find_policy, progress_of
from composer_effalgos.checks import check_number
from composer_effalgos.errors import InputError
from composer_effalgos.plan import BatchSize, Plan

_PROBED = 8  # batches after a growth in which an out-of-memory error is taken for its consequence
_LARGEST_FACTOR = 1e6  # no batch or learning rate is multiplied by more at once
_SCALES = (-300, 30)  # powers of ten that a learning rate may be multiplied by in all: float32 bears no more


class AdaBatch(Algorithm):
    """Grows the batch size during training, with the learning rate coupled to it.

    At each growth the batch size per rank is multiplied by ``growth_factor`` and the learning rate, on top of whatever schedule runs, by
    ``lr_factor``. The batch grows at the very batch that the policy says, whatever was prefetched; no sample is lost or repeated, workers
    live on, and schedules keep the time of the run without growth.

    Without ``device_train_microbatch_size`` the device batch grows with the batch. Where it does not fit on the device any more, the batch
    is trained on again in portions of the last size that did, and gradients are accumulated from then on.

    Runs on ``INIT``, ``FIT_START``, ``BEFORE_DATALOADER``, ``BATCH_START``, ``BEFORE_TRAIN_BATCH``, ``BATCH_END`` and ``FIT_END``.
    Source: Devarakonda et al., "AdaBatch: Adaptive Batch Sizes for Training Deep Neural Networks", arXiv 1712.02029; Smith et al., "Don't
    Decay the Learning Rate, Increase the Batch Size", arXiv 1711.00489.

    Args:
        growth_factor: What the batch size is multiplied by, greater than 1, at most 1e6. Sizes are rounded to whole samples.
        interval: Time between growths: epochs (``'20ep'``), batches (``'2000ba'``), samples (``'1000000sp'``), tokens (``'50000000tok'``)
            or a share of the run (``'0.2dur'``).
        milestones: Times of the growths, in place of ``interval``.
        max_batch_size: Largest batch size per rank; a growth past it, or past the samples there are, does not happen.
        lr_factor: What the learning rate is multiplied by at each growth: 0.75 with factor 2 is the paper's, in place of a step decay of
            0.375; 1 grows instead of decaying; ``growth_factor`` is linear scaling.
        policy: When the batch grows, in place of ``interval`` and ``milestones``: a function of the
            :class:`~composer_effalgos.adabatch.policies.Progress` that gives how often the batch should have grown by now,
            :class:`~composer_effalgos.adabatch.policies.LossPlateau`, :class:`~composer_effalgos.adabatch.policies.NoiseScale`, or one
            of these two by name (``'loss_plateau'``, ``{'name': 'noise_scale', 'ratio': 1.0}``).

    Raises:
        InputError: For an argument outside its range; in ``fit``, for a policy that gives something else than a number of growths, or that
            counts tokens where the batches have none.

    Example:
        >>> from composer import Trainer
        >>> from composer_effalgos import AdaBatch
        >>> trainer = Trainer(model=model, train_dataloader=loader, max_duration='100ep', algorithms=[AdaBatch()])  # doctest: +SKIP
        >>> AdaBatch(policy=lambda progress: progress.epoch // 20 + progress.epoch // 50)  # doctest: +SKIP
    """

    _plan: Plan  # from INIT on
    _state: State

    def __init__(
        self,
        growth_factor: float = 2.0,
        interval: str | int | Time = '20ep',
        *,
        milestones: Sequence[str | int | Time] | None = None,
        max_batch_size: int | None = None,
        lr_factor: float = 1.0,
        policy: Policy | str | Mapping[str, Any] | None = None,
    ) -> None:
        check_number('growth_factor', growth_factor, above=1, most=_LARGEST_FACTOR)
        check_number('lr_factor', lr_factor, least=1 / _LARGEST_FACTOR, most=_LARGEST_FACTOR)
        if max_batch_size is not None and (isinstance(max_batch_size, bool) or not isinstance(max_batch_size, int) or max_batch_size < 1):
            raise InputError(f'max_batch_size: must be a whole number of samples per rank, at least 1, got {max_batch_size!r}')
        if policy is not None and milestones is not None:
            raise InputError('policy: stands in place of milestones; give one of the two')
        self.growth_factor = growth_factor
        self.max_batch_size = max_batch_size
        self.lr_factor = lr_factor
        if policy is None:
            policy = Every(interval) if milestones is None else Milestones(milestones)
        self.policy = find_policy(policy)
        self._reset()

    def _reset(self) -> None:
        self._growths = 0  # that the policy has asked for
        self._lr_scale = 1.0  # what the learning rate has been multiplied by
        self._capped = False
        self._batch_size = 0  # that was last in use
        self._microbatch: int | None = None  # that was last set
        self._explicit_microbatch = False
        self._fits: int | None = None  # the microbatch that fitted when a larger one did not
        self._tried: int | float | None = None  # the microbatch that this batch was begun with
        self._fitted = 0  # the largest microbatch that was trained on
        self._probing = 0  # batches left in which an out-of-memory error is caught

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(growth_factor={self.growth_factor}, {self._when()}, max_batch_size={self.max_batch_size}, '
            f'lr_factor={self.lr_factor})'
        )

    def _when(self) -> str:
        if isinstance(self.policy, Every):
            return f'interval={self.policy.times[0].to_timestring()!r}'
        if isinstance(self.policy, Milestones):
            return f'milestones={[m.to_timestring() for m in self.policy.times]}'
        return f'policy={getattr(self.policy, "__name__", type(self.policy).__name__)}'

    def match(self, event: Event, state: State) -> bool:
        return event in (
            Event.INIT,
            Event.FIT_START,
            Event.BEFORE_DATALOADER,
            Event.BATCH_START,
            Event.BEFORE_TRAIN_BATCH,
            Event.BATCH_END,
            Event.FIT_END,
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._initialise(state, logger)
        elif event == Event.FIT_START:
            self._start(state)
        elif event == Event.BEFORE_DATALOADER:
            self._ask(state)
        elif event == Event.BATCH_START:
            self._grow(state, logger)
        elif event == Event.BEFORE_TRAIN_BATCH:
            self._tried = self._tried or state.device_train_microbatch_size  # of a batch that is replayed, the first
        elif event == Event.BATCH_END:
            self._check_memory(state)
        elif self._probing:
            self._stop_probing(state)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), 'growths': self._growths, 'lr_scale': self._lr_scale, 'fits': self._fits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._growths, self._lr_scale, self._fits = state['growths'], state['lr_scale'], state['fits']

    # ------------------------------------------------------------------ when

    def _initialise(self, state: State, logger: Logger) -> None:
        if sum(isinstance(algorithm, AdaBatch) for algorithm in state.algorithms) > 1:
            raise InputError('algorithms: AdaBatch is given twice; keep one')
        self._plan, self._state = Plan.of(state), state
        self._plan.batch_size = self._batch_sizes
        self._reset()
        self._explicit_microbatch = state.device_train_microbatch_size is not None and not state.auto_microbatching
        if isinstance(self.policy, Callback) and self.policy not in state.callbacks:
            state.callbacks.append(self.policy)
            self.policy.run_event(Event.INIT, state, logger)

    def _start(self, state: State) -> None:
        if int(state.timestamp.batch) == 0:
            self._growths = 0
        microbatch = state.device_train_microbatch_size
        if self._microbatch is not None and microbatch != self._microbatch and not state.auto_microbatching:
            self._explicit_microbatch = True  # given to this fit()
        rescale_schedules(state, self._lr_scale)

    def _wanted(self, progress: Progress) -> int:
        """How often the batch should have grown: what the policy says, but never less than before."""
        growths = self.policy(progress)
        if isinstance(growths, bool) or not isinstance(growths, int) or growths < 0:
            raise InputError(
                f'policy: must give how often the batch should have grown by now, a whole number of at least 0, got {growths!r}'
            )
        return max(self._growths, growths)

    def _batch_sizes(self) -> BatchSize:
        """The plan asks for this epoch's batch sizes, as far as the policy knows them beforehand."""
        state = self._state
        batch = int(state.timestamp.batch) - int(state.timestamp.batch_in_epoch)
        sample = int(state.timestamp.sample) - int(state.timestamp.sample_in_epoch)
        return lambda b, s: self._size(self._wanted(progress_of(state, batch + b, sample + s)))[0]

    def _ask(self, state: State) -> None:
        """Before a batch is fetched: is what was planned what the policy wants now?"""
        plan = self._plan.loader.plan
        batch = int(state.timestamp.batch_in_epoch)
        if plan is None or batch >= plan.num_batches:  # the epoch is over
            return
        progress = progress_of(state)
        self._growths = self._wanted(progress)
        if progress.batch > 0 and progress.token == 0 and any(time.unit == TimeUnit.TOKEN for time in getattr(self.policy, 'times', ())):
            raise InputError(
                f'{self._when()}: counts tokens, but the batches have none; give samples, or get_num_tokens_in_batch in a DataSpec'
            )
        if plan.sizes[batch - plan.first_batch] != self._size(self._growths)[0] * self._plan.loader.world_size:
            self._plan.resize(state)

    # ------------------------------------------------------------------ how far

    def _size(self, growths: int) -> tuple[int, int]:
        """The batch size per rank after so many growths, and how many of them fit."""
        loader = self._plan.loader
        initial = loader.initial_batch_size
        available = loader.num_samples if self._plan.candidates is None else len(self._plan.candidates)
        limit, why = max(initial, available // loader.world_size), f'the {available} samples there are'
        if self.max_batch_size is not None and self.max_batch_size < limit:
            limit, why = max(initial, self.max_batch_size), f'max_batch_size {self.max_batch_size}'
        fitting = min(growths, math.ceil(math.log((limit + 1) / initial, self.growth_factor)))
        while self._grown(fitting) > limit:
            fitting -= 1
        if fitting < growths and not self._capped:
            self._capped = True
            warnings.warn(
                f'AdaBatch: growing to {self._grown(fitting + 1)} samples per rank would pass {why}; '
                f'the batch stays at {self._grown(fitting)}',
                stacklevel=2,
            )
        return self._grown(fitting), fitting

    def _grown(self, growths: int) -> int:
        return round(self._plan.loader.initial_batch_size * self.growth_factor**growths)

    def _grow(self, state: State, logger: Logger) -> None:
        size, growths = self._size(self._growths)
        loader, scale = self._plan.loader, self._scale(growths)
        if scale != self._lr_scale:
            for group in (group for optimizer in state.optimizers for group in optimizer.param_groups):
                group['lr'] = group['lr'] * (scale / self._lr_scale)
            rescale_schedules(state, scale, now=False)
            self._lr_scale = scale
        if size != loader.batch_size:
            loader.set_batch_size(size)
        if size != self._batch_size:
            self._batch_size = size
            if not self._explicit_microbatch:
                self._set_microbatch(state, size)
            logger.log_metrics({'adabatch/batch_size': size * loader.world_size, 'adabatch/lr_scale': scale})

    def _scale(self, growths: int) -> float:
        """What so many growths multiply the learning rate by."""
        logarithm = growths * math.log10(self.lr_factor)
        if not _SCALES[0] <= logarithm <= _SCALES[1]:
            raise InputError(
                f'lr_factor: {self.lr_factor} at each of {growths} growths multiplies the learning rate by 1e{logarithm:+.0f}; '
                'a factor nearer to 1, or fewer growths, are right'
            )
        return self.lr_factor**growths

    # ------------------------------------------------------------------ memory

    def _set_microbatch(self, state: State, size: int) -> None:
        """Lets the device batch grow with the batch, and has Composer catch it where it does not fit."""
        users_auto = state.auto_microbatching and not self._probing
        self._microbatch = size if users_auto or self._fits is None else min(size, self._fits)
        state.device_train_microbatch_size = self._microbatch
        if not users_auto and self._fits is None and size > self._plan.loader.initial_batch_size and not state.fsdp_enabled:
            state.auto_microbatching, self._plan.probing, self._probing = True, True, _PROBED

    def _check_memory(self, state: State) -> None:
        """After a batch: did it fit on the device?"""
        if not self._probing:
            self._tried = None
            return
        found, self._tried, tried = state.device_train_microbatch_size, None, self._tried
        assert isinstance(found, int)
        assert isinstance(tried, int)
        assert state.previous_timestamp is not None
        if found >= tried:
            trained = self._plan.loader.batch_slice(int(state.previous_timestamp.batch_in_epoch))
            self._fitted = max(self._fitted, min(found, trained.stop - trained.start))
            # an epoch's last two batches may say nothing, nor does one that is split to measure it
            self._probing -= self._fitted == self._microbatch
            if not self._probing:
                self._stop_probing(state)
            return
        self._fits = max(found, self._fitted, self._plan.loader.initial_batch_size)
        warnings.warn(
            f'AdaBatch: {tried} samples do not fit on the device; larger batches are put together from {self._fits} at a time',
            stacklevel=2,
        )
        self._microbatch = state.device_train_microbatch_size = self._fits
        self._stop_probing(state)

    def _stop_probing(self, state: State) -> None:
        self._probing, self._plan.probing, state.auto_microbatching = 0, False, False


def rescale_schedules(state: State, scale: float, *, now: bool = True) -> None:
    """Makes every schedule set ``scale`` times the learning rates that it was made for.

    What a schedule is scaled by is noted on it and travels in its checkpoint, so a schedule that was restored is found as it is and one
    that was given to a later ``fit`` is scaled too.

    Args:
        state: The trainer's state.
        scale: The factor.
        now: Whether learning rates that the schedule has already set are scaled as well.
    """
    for scheduler in state.schedulers:
        factor = scale / getattr(scheduler, 'adabatch_lr_scale', 1.0)
        if factor == 1:
            continue
        _scale_base(scheduler, factor)
        scheduler.adabatch_lr_scale = scale  # type: ignore[attr-defined]
        for group in scheduler.optimizer.param_groups:
            if now:
                group['lr'] = group['lr'] * factor
            if 'max_lr' in group and 'min_lr' in group:  # OneCycleLR keeps its base here
                for key in ('initial_lr', 'max_lr', 'min_lr'):
                    group[key] = group[key] * factor


def _scale_base(scheduler: LRScheduler, factor: float) -> None:
    for name in ('base_lrs', 'max_lrs'):  # the latter of CyclicLR
        if hasattr(scheduler, name):
            setattr(scheduler, name, [lr * factor for lr in getattr(scheduler, name)])
    if hasattr(scheduler, 'eta_min'):  # of the cosines
        scheduler.eta_min = scheduler.eta_min * factor
    for part in getattr(scheduler, '_schedulers', []):  # SequentialLR, ChainedScheduler
        _scale_base(part, factor)
