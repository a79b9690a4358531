"""The microbatch that fits on the device when the batch grows."""

from __future__ import annotations

import warnings

from composer.core import State

from composer_effalgos.plan import EpochPlanner

_TRIES = 8  # batches after a growth in which an out-of-memory error is taken for its consequence


class MemorySearch:
    """Lets the microbatch grow with the batch, and falls back to the last one that fitted.

    After a growth, Composer's automatic microbatching is on for a few batches: it catches an out-of-memory error and repeats the batch
    in smaller parts. The search then keeps the largest microbatch that is known to fit and ends automatic microbatching. A microbatch size
    set by the user is not changed.

    Attributes:
        fits: Largest number of samples per rank that fitted; ``None`` if nothing has failed yet. Saved in checkpoints.
    """

    def __init__(self) -> None:
        self.fits: int | None = None
        self._explicit = False  # the user gave a microbatch size
        self._size = 0  # the batch size that the microbatch was last set for
        self._microbatch: int | None = None  # that was last set
        self._tried: int | float | None = None  # the microbatch that this batch was begun with
        self._fitted = 0  # the largest microbatch that was trained on during a search
        self._tries_left = 0

    def init(self, state: State) -> None:
        """Notes at ``INIT`` whether the user gave a microbatch size."""
        self._explicit = state.device_train_microbatch_size is not None and not state.auto_microbatching

    def fit_start(self, state: State) -> None:
        """Notices a microbatch size that was given to this ``fit``."""
        microbatch = state.device_train_microbatch_size
        if self._microbatch is not None and microbatch != self._microbatch and not state.auto_microbatching:
            self._explicit = True

    def resize(self, state: State, planner: EpochPlanner, size: int, smallest: int) -> bool:
        """Sets the microbatch for a batch size, and starts a search if the batch is larger than what is known to fit.

        Args:
            state: The trainer's state, before the first batch of this size.
            planner: The run's planner.
            size: Samples per rank and batch.
            smallest: The run's smallest batch size, which is taken to fit.

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
        """Keeps the first attempt's size when a batch is replayed after an out-of-memory error."""
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
            # an epoch's last two batches may be smaller, and so are the parts of one that is split to be measured
            self._tries_left -= self._fitted == self._microbatch
            if not self._tries_left:
                self._end(state, planner)
            return
        self.fits = max(found, self._fitted, smallest)
        warnings.warn(
            f'AdaBatch: {tried} samples do not fit on the device; larger batches are put together from {self.fits} at a time',
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
