"""AdaBatch: batch sizes that change during training (Devarakonda et al., arXiv 1712.02029; Smith et al., arXiv 1711.00489)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from composer.core import Algorithm, Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger

from composer_effalgos.adabatch.learning_rate import (
    LR_RULES,
    lr_exponent,
    note_originals,
    rescale_beta2,
    rescale_schedules,
    scale_learning_rate,
    scale_new_schedules,
)
from composer_effalgos.adabatch.memory import MemorySearch
from composer_effalgos.adabatch.policies import Every, Milestones, Policy, find_policy
from composer_effalgos.adabatch.schedules import ScheduleLike, SizePolicy, find_schedule
from composer_effalgos.adabatch.seesaw import Seesaw
from composer_effalgos.adabatch.sizes import Size, Sizes
from composer_effalgos.plan import BatchSize, EpochPlanner
from composer_effalgos.plan.clock import is_composer_schedule
from composer_effalgos.plan.progress import Progress, progress_of
from composer_effalgos.utils.checks import check_number, check_whole
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import shown

_LARGEST_FACTOR = 1e6  # maximum factor of a single growth, for batch size and learning rate
_SCALES = (-300, 30)  # allowed total factor of the learning rate, as powers of ten: float32 cannot represent more


class AdaBatch(Algorithm):
    """Changes the batch size during training, and couples the learning rate to it.

    Either the batch size per rank is multiplied by ``growth_factor`` at the times given by ``interval``, ``milestones`` or ``policy``, or
    ``schedule`` gives the batch size itself. The size changes exactly at the requested batch despite prefetching; no sample is lost or
    repeated, workers persist, and learning-rate schedules follow the time of the run with a fixed batch size.

    Without ``device_train_microbatch_size`` the microbatch grows with the batch. If it does not fit on the device, the batch is repeated in
    microbatches of the last size that did, and gradients are accumulated from then on.

    Runs on ``INIT``, ``BEFORE_LOAD``, ``FIT_START``, ``BEFORE_DATALOADER``, ``BATCH_START``, ``BEFORE_TRAIN_BATCH``, ``BATCH_END`` and
    ``FIT_END``. Source: Devarakonda et al., "AdaBatch: Adaptive Batch Sizes for Training Deep Neural Networks", arXiv 1712.02029; Smith et
    al., "Don't Decay the Learning Rate, Increase the Batch Size", arXiv 1711.00489.

    Args:
        growth_factor: Factor of the batch size at each growth, greater than 1, at most 1e6. Sizes are rounded to whole samples.
        interval: Time between growths: epochs (``'20ep'``), batches (``'2000ba'``), samples (``'1Msp'``), tokens (``'50Mtok'``) or a
            fraction of the run (``'0.2dur'``). The default is ``'20ep'``, if none of ``milestones``, ``policy`` and ``schedule`` is given.
        milestones: Times of the growths, instead of ``interval``.
        schedule: The batch sizes themselves, instead of growths: ``'0:32 1ep:64 250ktok:96'`` (times and sizes), a linear ramp
            (``{'start': 32, 'stop': 256, 'increment': 32, 'over': '1Mtok'}``, see :func:`~composer_effalgos.adabatch.schedules.ramp`), or a
            function from :class:`~composer_effalgos.plan.progress.Progress` to a size. Sizes may shrink.
        max_batch_size: Largest batch size per rank; growths beyond it, or beyond the number of samples, are skipped.
        lr_factor: Factor of the learning rate at each growth. The paper uses 0.75 with growth factor 2, instead of a step decay of 0.375; 1
            replaces decay by growth; ``growth_factor`` is linear scaling.
        lr: How the learning rate follows the batch size, instead of ``lr_factor``: ``'linear'``, ``'sqrt'``, ``'none'``, or ``'auto'``
            (square root for Adam and other adaptive optimizers, linear for SGD). The optimizer's learning rate must be the one for the
            loader's batch size.
        policy: When the batch grows, instead of ``interval`` and ``milestones``: a function from the progress to the number of growths
            until now, :class:`~composer_effalgos.adabatch.policies.LossPlateau`,
            :class:`~composer_effalgos.adabatch.gradient_noise.NoiseScale`, :class:`~composer_effalgos.adabatch.gradient_noise.NormTest`,
            :class:`~composer_effalgos.adabatch.seesaw.Seesaw`, or one of these by name (``'seesaw'``,
            ``{'name': 'noise_scale', 'ratio': 1.0}``).
        beta2: ``'rescale'`` keeps the half-life of Adam's second moment, in samples, as the batch size changes; ``'keep'`` leaves ``beta2``
            unchanged.
        global_sizes: Whether the sizes in ``schedule`` are global. By default all batch sizes are per rank.

    Raises:
        InputError: For an argument outside its range or an invalid schedule; in ``fit``, for a schedule with sizes larger than the dataset,
            a policy that does not return a number of growths, or times in tokens if the batches have none.

    Example:
        >>> from composer import Trainer
        >>> from composer_effalgos import AdaBatch
        >>> trainer = Trainer(model=model, train_dataloader=loader, max_duration='100ep', algorithms=[AdaBatch()])  # doctest: +SKIP
        >>> AdaBatch(schedule='0:32 1ep:64 2Mtok:256', lr='sqrt')  # doctest: +SKIP
        >>> AdaBatch(policy=lambda progress: progress.epoch // 20 + progress.epoch // 50)  # doctest: +SKIP
    """

    _planner: EpochPlanner  # from INIT on
    _state: State

    def __init__(
        self,
        growth_factor: float = 2.0,
        interval: str | int | Time | None = None,
        *,
        milestones: Sequence[str | int | Time] | None = None,
        schedule: ScheduleLike | None = None,
        max_batch_size: int | None = None,
        lr_factor: float = 1.0,
        lr: str | None = None,
        policy: Policy | str | Mapping[str, Any] | None = None,
        beta2: str = 'keep',
        global_sizes: bool = False,
    ) -> None:
        check_number('growth_factor', growth_factor, above=1, most=_LARGEST_FACTOR)
        check_number('lr_factor', lr_factor, least=1 / _LARGEST_FACTOR, most=_LARGEST_FACTOR)
        if max_batch_size is not None:
            check_whole('max_batch_size', max_batch_size, least=1, what='a whole number of samples per rank')
        _check_one({'interval': interval, 'milestones': milestones, 'policy': policy, 'schedule': schedule})
        _check_lr(lr, lr_factor, beta2)
        if schedule is None and global_sizes:
            raise InputError(
                'global_sizes: expected a schedule with it, got none; it makes the sizes in schedule global, all other sizes are per rank'
            )
        self.growth_factor = growth_factor
        self.max_batch_size = max_batch_size
        self.lr_factor, self.lr, self.beta2 = lr_factor, lr, beta2
        self.global_sizes = global_sizes
        if schedule is not None:
            self.policy: Policy | SizePolicy = find_schedule(schedule)
        elif policy is not None:
            self.policy = find_policy(policy)
        else:
            self.policy = Every('20ep' if interval is None else interval) if milestones is None else Milestones(milestones)
        if isinstance(self.policy, SizePolicy):
            what = 'schedule' if policy is None else f'policy {type(self.policy).__name__}'
            for name, value, usual in (('growth_factor', growth_factor, 2), ('lr_factor', lr_factor, 1)):
                if value != usual:
                    hint = "give lr, such as lr='sqrt'" if name == 'lr_factor' else 'give one of the two'
                    raise InputError(f'{name}: expected none with {what}, which gives the batch sizes itself, got {value}; {hint}')
        if isinstance(self.policy, Seesaw):
            if lr_factor != 1 or lr == 'none':
                got = "'none'" if lr == 'none' else f'lr_factor={lr_factor}'
                raise InputError(
                    f"lr: expected 'auto', 'sqrt' or 'linear' with seesaw, which couples the learning rate to the batch size, got {got}"
                )
            self.lr, self.policy.growth_factor = lr or 'auto', growth_factor
        if isinstance(self.policy, SizePolicy) and max_batch_size is not None and max(self.policy.known_sizes, default=0) > max_batch_size:
            raise InputError(f'max_batch_size: expected at least the {max(self.policy.known_sizes)} of the schedule, got {max_batch_size}')
        self._sizes = Sizes(self.policy, growth_factor, max_batch_size, over_ranks=global_sizes)
        self._reset()

    def _reset(self) -> None:
        self._size = Size()  # size of the last batch
        self._lr_scale = 1.0  # total factor of the learning rate so far
        self._memory = MemorySearch()
        self._warned = False

    def __repr__(self) -> str:
        if isinstance(self.policy, SizePolicy):
            return f'{type(self).__name__}({self._when()}, lr={self.lr!r}, global_sizes={self.global_sizes})'
        lr = f'lr_factor={self.lr_factor}' if self.lr is None else f'lr={self.lr!r}'
        return f'{type(self).__name__}(growth_factor={self.growth_factor}, {self._when()}, max_batch_size={self.max_batch_size}, {lr})'

    def _when(self) -> str:
        if isinstance(self.policy, Every):
            return f'interval={self.policy.times[0].to_timestring()!r}'
        if isinstance(self.policy, Milestones):
            return f'milestones={[m.to_timestring() for m in self.policy.times]}'
        if isinstance(self.policy, SizePolicy) and not isinstance(self.policy, Callback):
            return f'schedule={self.policy!r}'
        return f'policy={getattr(self.policy, "__name__", type(self.policy).__name__)}'

    def match(self, event: Event, state: State) -> bool:
        return event in (
            Event.INIT,
            Event.BEFORE_LOAD,
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
        elif event == Event.BEFORE_LOAD:
            note_originals(state, beta2=self.beta2 == 'rescale')
        elif event == Event.FIT_START:
            self._start(state)
        elif event == Event.BEFORE_DATALOADER:
            self._replan_if_resized(state)
        elif event == Event.BATCH_START:
            self._resize(state, logger)
        elif event == Event.BEFORE_TRAIN_BATCH:
            self._memory.before_batch(state)
        elif event == Event.BATCH_END:
            self._memory.after_batch(state, self._planner, self._sizes.smallest(self._planner.loader))
        else:
            self._memory.stop(state, self._planner)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), 'growths': self._size.asked, 'lr_scale': self._lr_scale, 'fits': self._memory.fits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._planner.expects_state = True
        self._size = Size(asked=state['growths'])
        self._lr_scale, self._memory.fits = state['lr_scale'], state['fits']

    # ------------------------------------------------------------------ when

    def _initialise(self, state: State, logger: Logger) -> None:
        if sum(isinstance(algorithm, AdaBatch) for algorithm in state.algorithms) > 1:
            raise InputError('algorithms: AdaBatch is given twice; keep one')
        self._planner, self._state = EpochPlanner.of(state), state
        self._planner.batch_size = self._batch_sizes
        self._planner.may_lengthen = isinstance(self.policy, SizePolicy | Seesaw)  # others never shrink the batch
        self._reset()
        self._memory.init(state)
        if isinstance(self.policy, Callback) and self.policy not in state.callbacks:
            state.callbacks.append(self.policy)
            self.policy.run_event(Event.INIT, state, logger)

    def _start(self, state: State) -> None:
        if int(state.timestamp.batch) == 0:
            self._size = Size()
        self._memory.fit_start(state)
        if self.lr is not None:
            lr_exponent(self.lr, state)  # raises now, not at the first growth, for an unknown optimizer
        scale_new_schedules(state, self._lr_scale)

    def _size_at(self, progress: Progress) -> Size:
        return self._sizes.at(progress, self._planner.loader, self._planner.num_candidates, self._size.asked)

    def _batch_sizes(self) -> BatchSize:
        """Batch sizes of this epoch for the plan, as far as the policy knows them in advance."""
        state, loader = self._state, self._planner.loader
        self._sizes.check_known(loader)
        for size in self._sizes.known:
            self._check_schedulers(self._sizes.per_rank(size, loader.world_size))
        self._warn_of_times()
        batch = int(state.timestamp.batch) - int(state.timestamp.batch_in_epoch)
        sample = int(state.timestamp.sample) - int(state.timestamp.sample_in_epoch)
        return lambda b, s: self._size_at(progress_of(state, self._planner, batch + b, sample + s)).samples

    def _warn_of_times(self) -> None:
        """Warns once if all times at which the batch size would change are at or after the end of the run."""
        end, loader = self._planner.horizon.end, self._planner.loader
        times = list(getattr(self.policy, 'times', ()))[1 if isinstance(self.policy, SizePolicy) else 0 :]
        if self._warned or end is None or not times:
            return
        ends = {end.unit: end.value, TimeUnit.DURATION: 1.0}
        if end.unit == TimeUnit.EPOCH and loader.num_samples is not None:
            ends |= {unit: end.value * length for unit, length in loader.full_epoch.items()}
        if all(time.unit in ends and time.value >= ends[time.unit] for time in times):
            self._warned = True
            warnings.warn(
                f'AdaBatch: the batch size never changes in this run: {self._when()} lies at or past its end, {end.to_timestring()!r}; '
                "give shorter times, or fractions of the run such as '0.25dur'",
                stacklevel=2,
            )

    def _replan_if_resized(self, state: State) -> None:
        """Before a batch is fetched: replans the rest of the epoch if the policy now requests another size."""
        plan = self._planner.loader.plan
        batch = int(state.timestamp.batch_in_epoch)
        if plan is None or batch >= plan.num_batches:  # the epoch is over
            return
        progress = progress_of(state, self._planner)
        if progress.batch > 0 and progress.token == 0 and any(time.unit == TimeUnit.TOKEN for time in getattr(self.policy, 'times', ())):
            raise InputError(
                f'{self._when()}: expected batches with tokens to count, got none; give samples, or get_num_tokens_in_batch in a DataSpec'
            )
        size, before = self._size_at(progress), self._size
        self._size = size
        if size.refused and not before.refused:
            warnings.warn(f'AdaBatch: {size.refused}', stacklevel=2)
        if plan.sizes[batch - plan.first_batch] != size.samples * self._planner.loader.world_size:
            self._planner.resize(state)

    # ------------------------------------------------------------------ what follows the size

    def _check_schedulers(self, size: int) -> None:
        """Rejects sizes below the loader's if a scheduler counts batches: the clock cannot step it less than once per batch."""
        initial, length = self._planner.loader.initial_batch_size, self._state.max_duration
        counting = [scheduler for scheduler in self._state.schedulers if not is_composer_schedule(scheduler)]
        if size < initial and counting and length is not None and length.unit == TimeUnit.EPOCH:
            raise InputError(
                f"schedule: expected sizes of at least the DataLoader's {initial} per rank with {type(counting[0]).__name__}, which"
                f' counts batches, got {size}; give the DataLoader the smallest size, or use a Composer schedule'
            )

    def _resize(self, state: State, logger: Logger) -> None:
        """Before a batch: adjusts the learning rate, the microbatch size and the loader to the batch size."""
        loader, at = self._planner.loader, self._size_at(progress_of(state, self._planner))
        size = at.samples
        if size != loader.batch_size:
            self._check_schedulers(size)
        ratio = size / loader.initial_batch_size
        scale = self._scale(at.growths) if self.lr is None else ratio ** lr_exponent(self.lr, state)
        if scale != self._lr_scale:
            scale_learning_rate(state, scale / self._lr_scale)
            rescale_schedules(state, scale)
            self._lr_scale = scale
        if size != loader.batch_size:
            loader.set_batch_size(size)
        if self._memory.resize(state, self._planner, size, self._sizes.smallest(loader)):
            if self.beta2 == 'rescale':
                rescale_beta2(state, ratio)
            logger.log_metrics({'adabatch/batch_size': size * loader.world_size, 'adabatch/lr_scale': scale})

    def _scale(self, growths: int) -> float:
        """The factor of the learning rate after this many growths."""
        if isinstance(self.policy, SizePolicy):
            return 1.0
        logarithm = growths * math.log10(self.lr_factor)
        if not _SCALES[0] <= logarithm <= _SCALES[1]:
            raise InputError(
                f'lr_factor: expected a factor nearer to 1, or fewer growths, got {self.lr_factor} at each of {growths} growths, which '
                f'multiplies the learning rate by 1e{logarithm:+.0f}'
            )
        return self.lr_factor**growths


def _check_one(given: Mapping[str, Any]) -> None:
    """Refuses more than one of the arguments that determine when the batch grows."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        first, other = names[:2]
        got = shown(given[first])
        raise InputError(f'{first}: expected none with {other}, which replaces it, got {got}; give one of the two')


def _check_lr(lr: str | None, lr_factor: float, beta2: str) -> None:
    if lr is not None and lr not in LR_RULES:
        raise InputError(f'lr: expected one of {", ".join(map(repr, LR_RULES))}, got {lr!r}')
    if lr is not None and lr_factor != 1:
        raise InputError(f'lr_factor: expected none with lr={lr!r}, which replaces it, got {lr_factor}; give one of the two')
    if beta2 not in ('keep', 'rescale'):
        raise InputError(f"beta2: expected 'keep' or 'rescale', got {beta2!r}")
