"""Finds the microbatch size that fits on the device when the batch grows."""

from __future__ import annotations

import warnings

from composer.core import State

from composer_effalgos.plan import EpochPlanner

_TRIES = 8  # batches after a growth in which an out-of-memory error is attributed to it


class MemorySearch:
    """Lets the microbatch grow with the batch, and falls back to the last size that fitted.

    After a growth, Composer's automatic microbatching is on for a few batches: it catches an out-of-memory error and repeats the batch in
    smaller parts. The search then keeps the largest microbatch that is known to fit and turns automatic microbatching off. A microbatch
    size set by the user is not changed.

    Attributes:
        fits: Largest number of samples per rank that fitted; ``None`` if nothing has failed yet. Saved in checkpoints.
    """

    def __init__(self) -> None:
        self.fits: int | None = None
        self._explicit = False  # whether the user set a microbatch size
        self._size = 0  # the batch size that the microbatch was last set for
        self._microbatch: int | None = None  # the microbatch last set here
        self._tried: int | float | None = None  # the microbatch at the start of this batch
        self._fitted = 0  # the largest microbatch that was trained on during a search
        self._tries_left = 0

    def init(self, state: State) -> None:
        """Records at ``INIT`` whether the user set a microbatch size."""
        self._explicit = state.device_train_microbatch_size is not None and not state.auto_microbatching

    def fit_start(self, state: State) -> None:
        """Detects a microbatch size that was passed to this ``fit``."""
        microbatch = state.device_train_microbatch_size
        if self._microbatch is not None and microbatch != self._microbatch and not state.auto_microbatching:
            self._explicit = True

    def resize(self, state: State, planner: EpochPlanner, size: int, smallest: int) -> bool:
        """Sets the microbatch for a batch size, and starts a search if the batch is larger than what is known to fit.

        Args:
            state: The trainer's state, before the first batch of this size.
            planner: The run's planner.
            size: Samples per rank and batch.
            smallest: The run's smallest batch size, which is assumed to fit.

        Returns:
            Whether the size has changed.
        """
        if size == self._size:
            return False
        self._size = size
        if self._explicit:
            return True
        users_auto = state.auto_microbatching and not self._tries_left
        self._microbatch = size if users_auto or self.fits is None else min(size, self.fits)
        state.device_train_microbatch_size = self._microbatch
        if not users_auto and self.fits is None and size > max(smallest, self._fitted) and not state.fsdp_enabled:
            state.auto_microbatching, planner.whole_batches, self._tries_left = True, True, _TRIES
        return True

    def before_batch(self, state: State) -> None:
        """Records the microbatch of the first attempt, which a replay after an out-of-memory error must not overwrite."""
        self._tried = self._tried or state.device_train_microbatch_size

    def after_batch(self, state: State, planner: EpochPlanner, smallest: int) -> None:
        """Ends the search once the batch has fitted often enough, or did not fit."""
        tried, self._tried = self._tried, None
        if not self._tries_left:
            return
        found = state.device_train_microbatch_size
        assert isinstance(found, int)
        assert isinstance(tried, int)
        assert state.previous_timestamp is not None
        if found >= tried:
            trained = planner.loader.batch_slice(int(state.previous_timestamp.batch_in_epoch))
            self._fitted = max(self._fitted, min(found, trained.stop - trained.start))
            # Count full microbatches only: the last two batches of an epoch and those split for a noise measurement may be smaller.
            self._tries_left -= self._fitted == self._microbatch
            if not self._tries_left:
                self._end(state, planner)
            return
        self.fits = max(found, self._fitted, smallest)
        warnings.warn(
            f'AdaBatch: {tried} samples do not fit on the device; larger batches accumulate gradients over microbatches of {self.fits}',
            stacklevel=2,
        )
        self._microbatch = state.device_train_microbatch_size = self.fits
        self._end(state, planner)

    def stop(self, state: State, planner: EpochPlanner) -> None:
        """Ends a running search at the end of ``fit``."""
        if self._tries_left:
            self._end(state, planner)

    def _end(self, state: State, planner: EpochPlanner) -> None:
        self._tries_left, planner.whole_batches, state.auto_microbatching = 0, False, False
