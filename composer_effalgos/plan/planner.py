"""The plan of a run: one object that all algorithms share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from composer.algorithms import SelectiveBackprop
from composer.core import Callback, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist

from composer_effalgos.plan.clock import EpochClock
from composer_effalgos.plan.epoch import BatchSize, EpochPlan, Tail
from composer_effalgos.plan.given import planned_loader
from composer_effalgos.plan.horizon import Horizon
from composer_effalgos.plan.loader import PlannedDataLoader, tokens_per_sample
from composer_effalgos.plan.loss import WeightedLoss
from composer_effalgos.plan.order import OrderCheck
from composer_effalgos.plan.per_sample import PerSampleLoss
from composer_effalgos.plan.samples import length_of
from composer_effalgos.plan.selector import EpochMetrics, Selectors
from composer_effalgos.plan.sharded import pack, unpack
from composer_effalgos.plan.trainer import trainer_of
from composer_effalgos.utils.errors import CheckpointError, InputError

_ENDLESS = 2**62  # placeholder for the epoch length in batches; the loader itself ends the epoch


class EpochPlanner(Callback):
    """Determines the samples, weights and batch sizes that each epoch trains on.

    Algorithms add a :class:`~composer_effalgos.plan.selector.Selector` to ``selectors`` or set ``batch_size``, and change nothing else in
    the trainer. Composer runs callbacks after algorithms, so at ``EPOCH_START`` all algorithms have registered, whatever the order of
    ``algorithms=[...]``, and callbacks that prepare the epoch, such as by ``sampler.set_epoch``, have run. The planner then queries the
    selectors, installs the epoch's plan in the loader, sets the clock and passes the weights to the loss.

    Args:
        tail: How the samples that do not fill an epoch's last batch are handled. ``'shared'`` merges a small remainder with the batch
            before it and splits both about evenly. ``'half'`` makes a batch of half the size, or none, and drops the rest, so that there
            are only two batch sizes for each size that AdaBatch requests. A model under ``torch.compile(dynamic=False)`` is then compiled
            only that often; to use it, add ``EpochPlanner(tail='half')`` to the callbacks.

    Attributes:
        selectors: Choose the samples of each epoch.
        batch_size: Returns, at the start of an epoch, the number of samples per rank and batch; ``None`` for the initial size.
        loss: The weighted loss, from ``INIT`` on, if an algorithm requested it.
        by_position: Names of the algorithms that identify samples by their position in the batch.
        whole_batches: Whether automatic microbatching is on only to try whole batches; set by the code that turned it on.
        exchanges: Whether an algorithm communicates between ranks at every microbatch.
        full_budget: Whether ``max_duration`` in samples or batches counts what a run without pruning would train.
        expects_state: Whether an algorithm of the run was loaded from the checkpoint, which must then hold the planner's state too.
        may_lengthen: Whether :meth:`resize` may give an epoch more batches than it began with.
        horizon: The planned length of the run.
    """

    _state: State  # from INIT on

    def __init__(self, tail: Tail = 'shared') -> None:
        if tail not in ('shared', 'half'):
            raise InputError(f"tail: expected 'shared' or 'half', got {tail!r}")
        self.tail: Tail = tail
        self.batch_size: Callable[[], BatchSize] | None = None
        self.selectors = Selectors()
        self._loader: PlannedDataLoader | None = None
        self._last_length: Time | None = None  # of the epoch when the last fit ended: this very object, unless another was given since
        self.loss: WeightedLoss | None = None
        self._given_loss: tuple[str, PerSampleLoss] | None = None  # who gave a per-sample loss, and which
        self.whole_batches = self.may_lengthen = self.exchanges = self.full_budget = False
        self.clock, self.horizon = EpochClock(), Horizon()
        self._advance = _Advance(self)
        self.by_position: list[str] = []
        self._loaded: dict[str, Any] | None = None
        self.expects_state = False
        self._done: tuple[int, ...] = ()  # sizes of the batches trained before a resume, which the loader's plan does not contain
        self._started = self._in_epoch = self._duration_warned = False
        self._counts = True  # whether the samples that Composer counts in a batch are still to be checked

    @classmethod
    def of(cls, state: State) -> EpochPlanner:
        """The run's planner, one of its callbacks; the first call creates it."""
        planner = cls.find(state)
        if planner is None:
            planner = cls()
            state.callbacks.append(planner)
        planner._join(state)
        return planner

    def _join(self, state: State) -> None:
        self._state = state
        if self._advance not in state.callbacks:
            state.callbacks.insert(0, self._advance)

    @classmethod
    def find(cls, state: State) -> EpochPlanner | None:
        """The run's planner, or ``None`` if there is none."""
        return next((callback for callback in state.callbacks if isinstance(callback, cls)), None)

    def request_loss(
        self, state: State, who: str, per_sample_loss: PerSampleLoss | None = None, *, by_position: bool = True
    ) -> WeightedLoss:
        """Wraps ``model.loss``, once per run. Must be called at ``INIT``.

        Args:
            state: The trainer's state.
            who: The requesting algorithm, for messages.
            per_sample_loss: The caller's per-sample loss; ``None`` for the model's own.
            by_position: Whether scores or weights are assigned to samples by their position in the batch.

        Returns:
            The weighted loss.

        Raises:
            InputError: Another algorithm requested it with another ``per_sample_loss``.
        """
        model = state.model
        if self.loss is None:
            found = model.__dict__.get('loss')
            # a model that was trained by another Trainer before still has that run's wrapper
            if isinstance(found, WeightedLoss):
                model.loss = found.original  # type: ignore[method-assign,assignment]
            self.loss = WeightedLoss(model, user=who.partition('(')[0])  # type: ignore[arg-type]
            model.loss = self.loss  # type: ignore[method-assign,assignment]
        if per_sample_loss is not None:
            other, given = self._given_loss or (who, per_sample_loss)
            if given != per_sample_loss:
                raise InputError(f'per_sample_loss: {other} and {who} got different ones, but a run has one loss; give both the same')
            self._given_loss = (who, per_sample_loss)
            self.loss.use(per_sample_loss)
        if by_position:
            self.by_position.append(who)
        return self.loss

    @property
    def loader(self) -> PlannedDataLoader:
        """The planned loader, from ``FIT_START`` on."""
        assert self._loader is not None, 'installed at FIT_START'
        return self._loader

    @property
    def num_candidates(self) -> int | None:
        """Number of samples that may be trained on now, over all ranks; ``None`` if the length of the dataset is unknown."""
        return self.loader.num_samples if self.selectors.candidates is None else len(self.selectors.candidates)

    # ------------------------------------------------------------------ events

    def init(self, state: State, logger: Logger) -> None:
        """Stores the state, for a planner that the user passed as a callback."""
        self._join(state)

    def after_load(self, state: State, logger: Logger) -> None:
        """Records the Trainer's ``max_duration``."""
        self.horizon.after_load(state)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Replaces the user's loader by the planned one, unless it is installed, and puts the schedules on the clock."""
        self._check_combination(state)
        self.install(state)
        if self.full_budget:
            self._convert_budget(state)
        self.horizon.fit_start(state, None if self._loaded is None else self._loaded['planned_end'])
        # The last batch of a pruned epoch is usually smaller than a microbatch, and Composer warns once per size. The Trainer calls
        # split_batch itself and the state does not lead to its DataSpec, so only a filter for the process can silence this.
        warnings.filterwarnings('ignore', 'Cannot split tensor of length', UserWarning, module=r'composer\.core\.data_spec')
        self.loader.note_microbatch(state)
        if self.loss is not None:
            self.loss.begin_fit()
        self._counts = True
        self._order = OrderCheck(state, self.loader.seed)
        self._warn_of_duration(state)
        in_epoch = int(state.timestamp.batch_in_epoch)
        if state.timestamp.epoch == 0 and in_epoch == 0:
            self.clock.load_state_dict({'batch_base': 0, 'sample_base': 0})
        elif self._loaded is not None:
            self.clock.load_state_dict(self._loaded['clock'])
        elif self.expects_state and not self._started:
            raise CheckpointError(
                'state.callbacks: expected the state of EpochPlanner next to that of the algorithms, got none, as in checkpoints of '
                'an earlier version of composer_effalgos; resume with the version that saved it, or load_weights_only=True'
            )
        elif not self._started:  # a checkpoint of a run without this package: all its epochs were full
            samples = int(state.timestamp.sample - state.timestamp.sample_in_epoch)
            self.clock.load_state_dict({'batch_base': int(state.timestamp.batch) - in_epoch, 'sample_base': samples})
        self.selectors.begin(state)
        if in_epoch > 0:
            self._resume(state)
        else:
            self.loader.plan = None
        self._loaded, self._started = None, True
        self.clock.start(state, self.loader)

    def _convert_budget(self, state: State) -> None:
        full = self.loader.full_epoch
        if self.batch_size is not None:  # with varying batch sizes, the number of batches of a full epoch is unknown
            del full[TimeUnit.BATCH]
        self.horizon.convert(state, full, tokens_per_sample(self.loader.dataset))
        self.clock.budget = self.horizon.budget

    def _warn_of_duration(self, state: State) -> None:
        length = state.max_duration
        assert length is not None
        if length.unit == TimeUnit.EPOCH or self._duration_warned or not self.selectors.prune:
            return
        self._duration_warned = True
        warnings.warn(
            f'max_duration is {length.to_timestring()!r}: in a run of fixed length, other samples replace the pruned ones, so pruning '
            'saves no time, and schedules follow real time; to save time, give '
            f"{self.selectors.names[-1]}(budget='full'), or max_duration in epochs",
            stacklevel=2,
        )

    def epoch_start(self, state: State, logger: Logger) -> None:
        """Plans the epoch from the choices of the selectors."""
        self._done = ()
        self._take(self._plan_epoch(state), state)

    def _plan_epoch(self, state: State) -> EpochPlan:
        loader, epoch = self.loader, int(state.timestamp.epoch)
        loader.metrics = EpochMetrics()
        kept, weights = self.selectors.choose(epoch, loader.world_size)
        return loader.plan_epoch(kept, weights, self.current_batch_size(), epoch, even=self.in_step(state))

    def resize(self, state: State) -> None:
        """Replans the rest of the epoch, from the next batch on, with the batch sizes requested now.

        Must be called between two batches, on every rank (at ``BEFORE_DATALOADER``).
        """
        loader, batches = self.loader, int(state.timestamp.batch_in_epoch)
        assert loader.plan is not None
        plan = loader.resize_rest(batches, self.current_batch_size())
        if plan.sizes != loader.plan.sizes:
            loader.set_plan(plan, int(state.timestamp.epoch), self._done)
            state.set_dataloader(loader, state.dataloader_label)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Restores the true length of the epoch, once Composer has read the placeholder."""
        if state._dataloader_len == _ENDLESS:
            state.set_dataloader(self.loader, state.dataloader_label)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Tells the loss which samples come next."""
        if self.loss is not None:
            self.loss.start_batch(self.loader.batch_slice(int(state.timestamp.batch_in_epoch)))

    def before_forward(self, state: State, logger: Logger) -> None:
        """Checks the transforms between loader and model."""
        self._order.before_forward(self.loader)

    def before_loss(self, state: State, logger: Logger) -> None:
        """Makes the loss take the next call as that of the training step."""
        if self.loss is not None:
            self.loss.start_microbatch()

    def after_forward(self, state: State, logger: Logger) -> None:
        """Checks that the model kept the order of the batch."""
        self._order.after_forward()

    def after_backward(self, state: State, logger: Logger) -> None:
        """Advances the loss to the next microbatch."""
        if self.loss is not None:
            self.loss.end_microbatch()

    def _check_count(self, state: State) -> None:
        """Checks after the first batch of a fit that Composer counts samples as the plan does, if an algorithm depends on it."""
        counts, self._counts = self._counts, False
        weighs = self.loss is not None and self.loss.weigher is not None
        if not counts or not (self.batch_size is not None or weighs or self.full_budget):
            return
        plan, batch = self.loader.plan, int(state.timestamp.batch_in_epoch) - 1
        assert plan is not None
        assert state.previous_timestamp is not None
        counted, planned = int(state.timestamp.sample - state.previous_timestamp.sample), plan.sizes[batch - plan.first_batch]
        if counted > planned or (counted < planned and not self.loader.may_fall_short):
            raise InputError(
                f'train_dataloader: expected the number of dataset items from get_num_samples_in_batch of the DataSpec, {planned} in this '
                f'batch, got {counted}; times in samples and shares of the run count items'
            )

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Makes the loss pass calls through to the original again."""
        if self.loss is not None:
            self.loss.end_batch()

    def fit_end(self, state: State, logger: Logger) -> None:
        """Restores the user's loader in the state, so that later users see all samples and not those of the last plan."""
        state.train_dataloader = self.loader.given
        self.loader.between_fits, self._last_length = True, state.dataloader_len

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The clock and the plan of the current epoch, so that a run resumed within the epoch continues with it.

        A resumed run saves the same as an uninterrupted one: the whole epoch, including the batches trained before the resume.
        """
        return pack(self._state, {} if self._loader is None else self._saved(self._loader))

    def _saved(self, loader: PlannedDataLoader) -> dict[str, Any]:
        assert self.horizon.end is not None
        plan = loader.plan if self._in_epoch else None
        return {
            'clock': self.clock.state_dict(),
            'num_samples': loader.num_samples,
            'planned_end': self.horizon.end.to_timestring(),
            'metrics': asdict(loader.metrics),
            'plan': None if plan is None else {**plan.state_dict(self._done), 'world_size': loader.world_size},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stores the loaded state until ``FIT_START``, when the loader exists to check it against."""
        self._loaded = unpack(state) or None

    # ------------------------------------------------------------------ parts

    def _check_combination(self, state: State) -> None:
        selective = [a for a in state.algorithms if isinstance(a, SelectiveBackprop)]
        if selective and self.by_position:
            raise InputError(
                f'algorithms: SelectiveBackprop cannot be combined with {self.by_position[0]}: it drops samples from a '
                'loaded batch, so positions no longer name samples; remove one of the two'
            )

    def install(self, state: State) -> None:
        """Replaces the user's loader by the planned one; does not wrap a planned loader again."""
        if isinstance(state.dataloader, PlannedDataLoader):
            if state.dataloader is not self._loader:
                raise InputError("train_dataloader: this is another run's planned loader; give fit() the DataLoader it was made from")
            self._limit(state.dataloader_len)
            state.train_dataloader = self.loader
            return
        before = self._loader
        self._loader = planned_loader(
            state.dataloader,
            needs_numbers=[*self.selectors.names, *self.by_position],
            max_batches=None if state.dataloader_len is None else int(state.dataloader_len),
            tail=self.tail,
            seed=state.rank_zero_seed,
            rank=dist.get_global_rank(),
            world_size=dist.get_world_size(),
            ranks=self.selectors.ranks(state),
        )
        self.loader.by_position = bool(self.by_position)
        self.loader.catch_up(state)
        if self._loaded is not None and self._loaded['num_samples'] != self.loader.num_samples:
            raise CheckpointError(
                f'the checkpoint was saved with a training set of {self._loaded["num_samples"]} samples, this one has '
                f'{self.loader.num_samples}; resume with the same dataset, or load_weights_only=True'
            )
        if before is not None and self.loader.reads_as(before):  # same data: a current epoch continues with its plan
            self.loader.plan, self.loader.metrics = before.plan, before.metrics
        else:
            self.selectors.new_data(first=before is None)
        state.set_dataloader(self.loader, state.dataloader_label)
        state.train_dataloader = self.loader

    def _limit(self, length: Time | None) -> None:
        """Limits the epochs if ``train_subset_num_batches`` was given to this ``fit``.

        Args:
            length: Composer's length of the epoch, which is still that of the last plan if nothing was given.
        """
        loader = self.loader
        given, loader.between_fits = loader.between_fits and length is not self._last_length, False
        if length is None:
            return
        batches = int(length)
        if batches < loader.num_batches:
            loader.limit(batches)
        elif given:
            loader.limit(None if batches == length_of(loader.given) else batches)

    def in_step(self, state: State) -> bool:
        """Whether ranks communicate at every microbatch, so that all of them need the same number of microbatches.

        This is the case with FSDP, with DDP if an algorithm makes Composer look for unused parameters, with Composer's automatic
        microbatching (unless it only tries whole batches), and with an algorithm that sets ``exchanges``.
        """
        searches = state.auto_microbatching and not self.whole_batches
        unused = getattr(state.model, 'find_unused_parameters', False)
        return dist.get_world_size() > 1 and (state.fsdp_enabled or searches or unused or self.exchanges)

    def current_batch_size(self) -> BatchSize:
        """Samples per rank and batch that are requested now."""
        return self.loader.initial_batch_size if self.batch_size is None else self.batch_size()

    def _take(self, plan: EpochPlan, state: State) -> None:
        loader = self.loader
        if plan.kept_weights is not None and (self.loss is None or not self.by_position):
            raise CheckpointError(
                "the checkpoint's epoch is weighted by algorithms that this run does not have; resume with the same "
                'algorithms, or from a checkpoint saved at the end of an epoch'
            )
        loader.set_plan(plan, int(state.timestamp.epoch), self._done)
        self._in_epoch = True
        state.set_dataloader(loader, state.dataloader_label)  # reads the epoch's new length
        if self.may_lengthen:
            # Composer reads the length once, before the epoch's first batch, and would skip every batch beyond it
            state._dataloader_len = Time(_ENDLESS, TimeUnit.BATCH)  # type: ignore[assignment]
        if self.loss is not None:
            weights = plan.rank_weights(loader.rank, loader.world_size)
            self.loss.start_epoch(None if weights is None else state.device.tensor_to_device(weights.clone()))

    def _resume(self, state: State) -> None:
        """Continues within an epoch, with the plan from the checkpoint, or with the present one if ``fit`` is called again."""
        loader, trainer = self.loader, trainer_of(state)
        if trainer is not None and not trainer.spin_dataloaders:
            raise InputError(
                'spin_dataloaders: expected True for a run that continues within an epoch, got False, with which Composer would train on '
                'the finished batches again; the planned loader skips them without reading them'
            )
        if self._loaded is not None and (saved := self._loaded['plan']) is not None:
            loader.metrics = EpochMetrics(**self._loaded['metrics'])
            plan, world_size = loader.plan_from_state(saved), saved['world_size']
        elif loader.plan is not None:
            plan, world_size = loader.plan, loader.world_size
        elif self._started:  # fit() was called with another loader within an epoch
            plan, world_size, self._done = self._plan_epoch(state), loader.world_size, ()
        else:
            raise CheckpointError(
                'the checkpoint was saved within an epoch by a run without these algorithms; resume from one saved at the end '
                'of an epoch, or load_weights_only=True'
            )
        self.selectors.resume(int(state.timestamp.epoch))
        batches = int(state.timestamp.batch_in_epoch)
        rest, done = loader.resume(plan, batches, self.current_batch_size(), world_size=world_size, even=self.in_step(state))
        self._done = (*self._done, *done) if world_size == loader.world_size else ()
        self._take(rest, state)


class _Advance(Callback):
    """Advances the planner's clock before all other callbacks of the run, one of which may save a checkpoint at the same event."""

    __qualname__ = 'EpochPlanner'  # under which Composer saves a callback: the planner's own entry then replaces this one, which is empty

    def __init__(self, planner: EpochPlanner) -> None:
        self._planner = planner

    def batch_end(self, state: State, logger: Logger) -> None:
        """Steps PyTorch schedulers that lag behind the clock."""
        self._planner.clock.batch_end(state)
        self._planner.horizon.check_tokens(state)
        self._planner._check_count(state)

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Advances the clock by one full epoch."""
        self._planner.clock.epoch_end(state)
        self._planner._in_epoch = False
