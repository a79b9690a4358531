"""The epoch clock: learning-rate schedules follow the time of the unpruned run at the initial batch size.

Composer's schedules convert epochs to batches using the length of the *current* epoch, so epochs of varying length distort them. PyTorch
schedulers that are stepped once per batch fall behind. With the clock, both have the value at every epoch boundary that they would have
without pruning, selection or batch growth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from composer.core import State, Time, Timestamp, TimeUnit
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from composer_effalgos.plan.loader import PlannedDataLoader


def virtual_batch(samples: int, samples_before_last: int, full_batches: int, batches_left: int | None = 1) -> int:
    """Maps a batch of the planned epoch to a batch of the full epoch, by the number of samples before it.

    The mapping is ``s -> s (L - 1) / S``, rounded. Schedules are stepped *after* a batch's update and *before* the timestamp advances, so
    the last planned batch must map to the last full batch. Every remaining batch needs a step of its own, so a small batch before the last
    must not map to the same step as the last. If the planned epoch has more batches than the full one, several share a step; the mapping is
    then rounded down, so that only the last planned batch maps to the last full one.

    Args:
        samples: Samples of the planned epoch before the batch, ``s``.
        samples_before_last: Samples before the planned epoch's last batch, ``S``.
        full_batches: Batches of the full epoch, ``L``.
        batches_left: Batches of the planned epoch from this one on; ``None`` if it has more batches than the full epoch.

    Returns:
        Batch number in the full epoch, 0 to ``L - 1``.
    """
    if batches_left is None:
        return min(samples * (full_batches - 1) // samples_before_last, full_batches - 1) if samples_before_last else full_batches - 1
    batch = round(samples * (full_batches - 1) / samples_before_last) if samples_before_last else full_batches - 1
    return max(0, min(batch, full_batches - batches_left))


def is_composer_schedule(scheduler: LRScheduler) -> bool:
    """Whether a schedule is one of Composer's: a ``LambdaLR`` whose functions read the trainer's state."""
    return isinstance(scheduler, LambdaLR) and all(
        getattr(f, '__module__', None) == 'composer.optim.scheduler' or hasattr(f, 'epoch_clock') for f in scheduler.lr_lambdas
    )


class EpochClock:
    """Shows learning-rate schedules the time of the unpruned run.

    Composer's schedules are pure functions of the state, so they are evaluated while the state shows virtual time. Every other PyTorch
    scheduler that the trainer steps per batch gets extra steps, as many as the full epoch would have given it.
    """

    def __init__(self) -> None:
        self.batch_base = 0  # virtual batches and samples before the current epoch
        self.sample_base = 0
        self.batches_done = 0  # virtual batches of the current epoch that PyTorch schedulers were stepped for
        self.budget: Time | None = None  # the run length that schedules see instead of max_duration
        self._loader: PlannedDataLoader | None = None
        self._steps_seen: dict[int, int] = {}

    def state_dict(self) -> dict[str, int]:
        """The virtual time at which the current epoch began, and how many of its virtual batches schedulers were stepped for."""
        return {'batch_base': self.batch_base, 'sample_base': self.sample_base, 'batches_done': self.batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restores the result of :meth:`state_dict`."""
        self.batch_base, self.sample_base = state['batch_base'], state['sample_base']
        self.batches_done = state.get('batches_done', 0)

    def start(self, state: State, loader: PlannedDataLoader) -> None:
        """Puts the run's schedules on this clock, unless they already are on it.

        Args:
            state: The trainer's state at ``FIT_START``.
            loader: The planned loader, which knows the length of the full epoch.
        """
        self._loader = loader
        for scheduler in state.schedulers:
            if not is_composer_schedule(scheduler):
                continue
            assert isinstance(scheduler, LambdaLR)
            fresh = [not hasattr(f, 'epoch_clock') for f in scheduler.lr_lambdas]
            scheduler.lr_lambdas = [self._on_clock(f, state) if new else f for f, new in zip(scheduler.lr_lambdas, fresh, strict=True)]
            if any(fresh) and scheduler.last_epoch == 0 and state.timestamp.batch > 0:
                # The schedule was passed to a later fit(): Composer has just set its first value from real time.
                for group, base, function in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                    group['lr'] = base * function(0)
        self._note_steps(state)

    def _on_clock(self, function: Callable[[int], float], state: State) -> Callable[[int], float]:
        # must be a plain function: LambdaLR saves the attributes of callable objects in checkpoints
        def clocked(step: int) -> float:
            with self.virtual_time(state):
                return function(step)

        clocked.epoch_clock = self  # type: ignore[attr-defined]
        return clocked

    @contextmanager
    def virtual_time(self, state: State) -> Iterator[None]:
        """Makes the state show the time and epoch length of the unpruned run; no change if the run's length is not in epochs."""
        loader, length = self._loader, state.max_duration
        if loader is None or length is None or length.unit != TimeUnit.EPOCH:
            yield
            return
        real, real_len = state.timestamp, state._dataloader_len
        state.max_duration = length if self.budget is None else self.budget
        # as long as nothing has been pruned, real time is virtual time
        if loader.num_batches != loader.full_batches or self.batch_base != int(real.batch - real.batch_in_epoch):
            state.timestamp = self._virtual_timestamp(real, loader)
            state._dataloader_len = Time(loader.full_batches, TimeUnit.BATCH)  # type: ignore[assignment]  # the setter would clip it to the planned epoch
        try:
            yield
        finally:
            state.timestamp, state._dataloader_len, state.max_duration = real, real_len, length

    def _virtual_timestamp(self, real: Timestamp, loader: PlannedDataLoader) -> Timestamp:
        batch = self._virtual(int(real.batch_in_epoch))
        sample = min(batch * loader.initial_batch_size * loader.world_size, loader.full_samples)
        samples = self.sample_base + sample
        return real.copy(
            batch=self.batch_base + batch,
            batch_in_epoch=batch,
            sample=samples,
            sample_in_epoch=sample,
            token=round(int(real.token) * samples / max(1, int(real.sample))),  # tokens of skipped samples are unknown: scaled by samples
        )

    def batch_end(self, state: State) -> None:
        """Gives PyTorch schedulers that were stepped for this batch the additional steps of the full epoch; at ``BATCH_END``."""
        loader = self._loader
        assert loader is not None
        assert state.max_duration is not None
        if state.max_duration.unit != TimeUnit.EPOCH:
            self.batches_done = 0  # schedulers follow real time
        else:
            batch = int(state.timestamp.batch_in_epoch) - 1
            if batch > 0 and self.batches_done == 0:  # an earlier fit began the epoch in real time
                self.batches_done = self._virtual(batch - 1) + 1
            steps = self._virtual(batch) - self.batches_done
            for scheduler in state.schedulers:
                if not is_composer_schedule(scheduler) and _steps(scheduler) > self._steps_seen.get(id(scheduler), 0):
                    for _ in range(steps):
                        scheduler.step()
            self.batches_done += 1 + max(0, steps)
        self._note_steps(state)

    def epoch_end(self, state: State) -> None:
        """Advances the virtual time by one full epoch; at ``EPOCH_END``."""
        assert self._loader is not None
        self.batch_base += self._loader.full_batches
        self.sample_base += self._loader.full_samples
        self.batches_done = 0
        self._note_steps(state)

    def _virtual(self, batch: int) -> int:
        """Maps a batch of the planned epoch to a batch of the full epoch; the end of the former to the end of the latter."""
        loader = self._loader
        assert loader is not None
        if batch >= loader.num_batches:
            return loader.full_batches
        if loader.plan is None:  # before an epoch
            return batch
        before, before_last = loader.samples_before(batch), loader.samples_before(loader.num_batches - 1)
        left = loader.num_batches - batch if loader.num_batches <= loader.full_batches else None
        return virtual_batch(before, before_last, loader.full_batches, left)

    def _note_steps(self, state: State) -> None:
        self._steps_seen = {id(s): _steps(s) for s in state.schedulers}


def _steps(scheduler: Any) -> int:
    parts = getattr(scheduler, '_schedulers', None)  # ChainedScheduler has no counter of its own
    return scheduler.last_epoch if hasattr(scheduler, 'last_epoch') else _steps(parts[0]) if parts else 0
