"""SubsetSelection: trains on a weighted subset that a strategy reselects every few epochs."""

from __future__ import annotations

import math
import time
import warnings
from typing import Any

import torch
from composer.algorithms import EMA
from composer.core import Algorithm, DataSpec, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader

from composer_effalgos.plan import (
    Budget,
    Choice,
    EpochPlanner,
    PerSampleLoss,
    Selector,
    WeightedLoss,
    check_budget,
    check_per_sample_loss,
    check_seed,
    stream_seed,
)
from composer_effalgos.plan.progress import parse_time
from composer_effalgos.plan.sharded import pack, unpack
from composer_effalgos.subset_selection.data_pass import DataPass, SelectionInputs
from composer_effalgos.subset_selection.sources import SelectionContext, make_source
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError

_STREAM = 11  # random stream, see stream_seed
_HOLD_OUT_STREAM = 12


class SubsetSelection(Selector, Algorithm):
    """Trains on a weighted subset of the data, reselected every few epochs.

    A selection makes one forward pass over the data in evaluation mode, sharded over the ranks, and passes the per-sample gradients of
    the last linear layer to the strategy. Rank 0 selects, and all ranks train on the same subset. The weights are scaled to mean 1.
    Schedules advance as in the run on all data. If a selection fails, the previous subset is kept, with a warning the first time.
    Batches go through the training ``DataSpec``'s transforms as in training.

    Runs on ``INIT``, ``FIT_START``, ``EPOCH_END`` and ``FIT_END``; the epoch plan triggers selections at ``EPOCH_START``. Sources: GLISTER,
    Killamsetty et al., arXiv 2012.10630; GradMatch, Killamsetty et al., arXiv 2103.00123; CRAIG, Mirzasoleiman et al., arXiv 1906.01827;
    MILO, Killamsetty et al., arXiv 2301.13287; the CORDS package; the method card lists those of the other strategies.

    Args:
        strategy: ``glister``, ``gradmatch``, ``craig``, ``facility-location``, ``graph-cut``, ``sum-redundancy``,
            ``saturated-coverage``, ``random`` (drawn once), ``adaptive-random`` (drawn at every selection), ``el2n``, ``grand``,
            ``forgetting`` (counted during ``kappa``), ``margin``, ``entropy``, ``least-confidence``, ``herding``, ``k-center``, ``milo``;
            with ``backend='cords'`` also ``fixedweight``, ``adapweights``, ``selcon``; or ``file``, the subset in the Parquet file
            ``path``, as written by ``effalgos select``.
        fraction: Fraction of the data to train on, in (0, 1]; ignored for ``file``.
        select_every: Time between selections, in whole epochs.
        kappa: Fraction of the run that trains on all data first, in [0, 1): CORDS's warm start.
        backend: ``torch`` (ours) or ``cords`` (the CORDS package).
        selection_type: ``PerClass``, ``PerBatch``, ``Supervised`` or ``PerClassPerGradient`` as in CORDS; ``None`` for the strategy's
            default.
        linear_layer: Whether to use the weight gradients of the last layer; if not, only its bias gradients.
        val_dataloader: The data whose gradient GLISTER and ``valid=True`` GradMatch match; ``None`` for the training data. A ``DataSpec``
            has its own transforms.
        val_share: Instead of ``val_dataloader``: fraction of the training data to hold out for validation, in [0, 1). It is drawn
            once and never trained on, with any strategy.
        per_sample_loss: ``(outputs, batch) -> [B, ...]``, the loss to differentiate; ``None`` to derive it from the model. Training still
            uses the model's loss.
        seed: Seeds the selections; ``None`` for the trainer's seed.
        budget: What a ``max_duration`` in samples, batches or tokens counts: ``'trained'``, what is trained on, so that a subset saves no
            time; or ``'full'``, what a run on all samples would train on. With ``'full'`` it must be a whole number of full epochs; batches
            cannot be combined with AdaBatch, and tokens need a dataset that reports the tokens per sample (``seq_len``).
        **strategy_options: The strategy's own options, named as in CORDS (``eta``, ``greedy``, ``r``, ``lam``, ``eps``, ...), and
            ``class_balance`` (``proportional`` or ``equal`` shares of the classes). ``milo`` takes ``exploration``, the fraction of the
            selections that use stochastic greedy.

    Raises:
        InputError: For an argument out of range or an unknown option; at the start of training, for an unsupported run.

    Example:
        >>> from composer import Trainer
        >>> from composer_effalgos import SubsetSelection
        >>> trainer = Trainer(
        ...     model=model, train_dataloader=loader, max_duration='100ep', algorithms=[SubsetSelection('glister', 0.3)]
        ... )  # doctest: +SKIP
    """

    stage = 'coarse'
    _planner: EpochPlanner  # set at INIT
    _loss: WeightedLoss
    _logger: Logger
    _state: State

    def __init__(
        self,
        strategy: str = 'glister',
        fraction: float = 0.1,
        select_every: str | int = '20ep',
        *,
        kappa: float = 0.0,
        backend: str = 'torch',
        selection_type: str | None = None,
        linear_layer: bool = True,
        val_dataloader: DataLoader | DataSpec | None = None,
        val_share: float = 0.0,
        per_sample_loss: PerSampleLoss | None = None,
        seed: int | None = None,
        budget: Budget = 'trained',
        **strategy_options: Any,
    ) -> None:
        check_number('fraction', fraction, above=0, most=1)
        check_number('kappa', kappa, least=0, below=1)
        check_seed(seed)
        check_budget(budget)
        if not isinstance(linear_layer, bool):
            raise InputError(f'linear_layer: expected true or false, got {linear_layer!r}')
        check_per_sample_loss(per_sample_loss)
        if val_dataloader is not None and not isinstance(val_dataloader, DataLoader | DataSpec):
            raise InputError(f'val_dataloader: expected a torch.utils.data.DataLoader, got {type(val_dataloader).__name__}')
        check_number('val_share', val_share, least=0, below=1)
        if val_share > 0 and (val_dataloader is not None or strategy == 'file'):
            other = 'strategy=file, whose samples are chosen already' if strategy == 'file' else 'val_dataloader, which does the same'
            raise InputError(f'val_share: cannot be combined with {other}; leave it 0')
        if strategy == 'forgetting' and kappa == 0:
            raise InputError(
                'kappa: expected a share above 0 with strategy forgetting, which counts while the run trains on all data, got 0; try 0.2'
            )
        options = dict(strategy_options) if selection_type is None else {**strategy_options, 'selection_type': selection_type}
        self._source = make_source(strategy, backend, options, linear_layer=linear_layer, val_dataloader=val_dataloader)
        self.strategy = strategy
        self.fraction = fraction
        self.select_every = parse_time('select_every', select_every, [TimeUnit.EPOCH])
        self.kappa = kappa
        self.backend = backend
        self.selection_type = selection_type
        self.linear_layer = linear_layer
        self.val_dataloader = val_dataloader
        self.val_share = val_share
        self.per_sample_loss = per_sample_loss
        self.seed = seed
        self.budget = budget
        self.strategy_options = strategy_options
        self._held_out: Tensor | None = None  # ascending
        self._rest: Tensor | None = None  # all samples not held out, ascending; None for all samples
        self._indices: Tensor | None = None  # the subset, ascending
        self._weights: Tensor | None = None  # None if all are 1
        self._failure_warned = False

    def __repr__(self) -> str:
        settings = {
            'strategy': self.strategy,
            'fraction': self.fraction,
            'select_every': self.select_every.to_timestring(),
            'kappa': self.kappa,
            'backend': self.backend,
            'selection_type': self.selection_type,
            'linear_layer': self.linear_layer,
            **({'val_share': self.val_share} if self.val_share else {}),
            **self.strategy_options,
        }
        return f'{type(self).__name__}({", ".join(f"{name}={value!r}" for name, value in settings.items())})'

    @property
    def indices(self) -> Tensor | None:
        """Indices of the selected samples, int64 ``[k]`` ascending; ``None`` before the first selection."""
        return self._indices

    @property
    def weights(self) -> Tensor | None:
        """Their loss weights, float32 ``[k]`` with mean 1; ``None`` before the first selection."""
        if self._indices is None:
            return None
        return torch.ones(len(self._indices)) if self._weights is None else self._weights

    @property
    def held_out(self) -> Tensor | None:
        """Indices of the samples held out by ``val_share``, int64 ascending; ``None`` before the first epoch or if ``val_share`` is 0."""
        return self._held_out

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.FIT_START, Event.EPOCH_END, Event.FIT_END)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._initialise(state, logger)
        else:
            self._source.epoch_end(state)

    def choose(self, candidates: Tensor | None, epoch: int) -> Choice | None:
        state = self._state
        warm_up, budget = self._warm_up(state), self._budget()
        redraw = not self._source.once and (epoch - warm_up) % self.select_every.value == 0
        if epoch >= warm_up and (redraw or self._indices is None or len(self._indices) != budget):
            start = time.perf_counter()
            self._select(state, budget)
            self._planner.loader.metrics.selection_seconds = time.perf_counter() - start
            self._logger.log_metrics({'subset_selection/samples': budget})  # EfficiencyMonitor logs the time
        samples = self.candidates(epoch)
        return None if samples is None else Choice(samples, self._weights if epoch >= warm_up else None)

    def candidates(self, epoch: int) -> Tensor | None:
        return self._indices if epoch >= self._warm_up(self._state) else self._rest

    def select(self, state: State) -> tuple[Tensor, Tensor]:
        """Selects once, outside training, in a trainer that was built with this algorithm and not fitted.

        Args:
            state: The trainer's state.

        Returns:
            Sample indices, int64 ``[k]`` ascending, and their weights, float32 ``[k]`` with mean 1.

        Raises:
            InputError: If the selection fails.
        """
        self._planner.install(state)
        self._indices = self._weights = None
        self._select(state, self._budget())
        assert self._indices is not None
        assert self.weights is not None
        return self._indices, self.weights

    def state_dict(self) -> dict[str, Any]:
        saved = {'indices': self._indices, 'weights': self._weights, 'held_out': self._held_out}
        return pack(self._state, {**super().state_dict(), **saved, 'source': self._source.state_dict(self._state)})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state, self._planner.expects_state = unpack(state), True
        self._indices, self._weights, self._held_out = (
            None if state.get(name) is None else state[name].cpu() for name in ('indices', 'weights', 'held_out')
        )
        if state.get('source'):
            self._source.load_state_dict(state['source'])

    def _initialise(self, state: State, logger: Logger) -> None:
        if state.fsdp_enabled and self._source.runs_model:
            raise InputError(
                f'strategy: {self.strategy} cannot be combined with FSDP: its pass over the data has not the same number of steps on every '
                'rank; use random, adaptive-random, forgetting or file, or DDP'
            )
        self._planner, self._state, self._logger = EpochPlanner.of(state), state, logger
        self._planner.selectors.add(self)
        self._planner.full_budget |= self.budget == 'full'
        self._indices = self._weights = self._held_out = self._rest = None
        self._failure_warned = False
        by_position = self._source.weighted or self._source.by_position
        self._loss = self._planner.request_loss(
            state, f'{type(self).__name__}({self.strategy!r})', self.per_sample_loss, by_position=by_position
        )
        self._source.start(self._planner, self._loss)

    def _length(self, state: State) -> Time:
        """The planned duration of the run; outside ``fit`` the Trainer's ``max_duration``."""
        length = self._planner.horizon.end or state.max_duration
        assert length is not None
        return length

    def _warm_up(self, state: State) -> int:
        """Number of epochs at the start that train on all data."""
        end = self._length(state)
        if end.unit == TimeUnit.EPOCH:
            return math.ceil(self.kappa * end.value - 1e-9)
        if self.kappa > 0:
            raise InputError(f'kappa: expected max_duration in epochs, got {end.to_timestring()!r}; leave it 0')
        return 0

    def new_data(self, *, first: bool) -> None:
        if not first:
            self._indices = self._weights = self._held_out = None
        dataset, size = self._planner.loader.dataset, self._planner.loader.num_samples
        self._source.new_data(dataset, known=first)
        self._rest = None
        if self.val_share > 0:
            if self._held_out is None:
                generator = torch.Generator().manual_seed(stream_seed(self._seed(self._state), _HOLD_OUT_STREAM))
                number = max(1, round(self.val_share * size))
                self._held_out = torch.randperm(size, generator=generator)[:number].sort().values
            mask = torch.ones(size, dtype=torch.bool)
            mask[self._held_out] = False
            self._rest = mask.nonzero()[:, 0]

    def _seed(self, state: State) -> int:
        return state.rank_zero_seed if self.seed is None else self.seed

    @property
    def _num_candidates(self) -> int:
        return self._planner.loader.num_samples if self._rest is None else len(self._rest)

    def _budget(self) -> int:
        loader = self._planner.loader
        budget = self._source.budget(loader.num_samples, self.fraction)
        batch = loader.initial_batch_size * loader.world_size
        if batch > loader.num_samples:  # no epoch has a full batch
            batch = loader.world_size
        if budget < batch and self.strategy == 'file':
            raise InputError(f'path: expected at least one batch of {batch} samples, got {budget}; use a larger subset or a smaller batch')
        if budget < batch:
            raise InputError(
                f'fraction: expected at least one batch of {batch} samples, got {budget} ({self.fraction} of {loader.num_samples}); '
                f'use a fraction of at least {batch / loader.num_samples:.4g} or a smaller batch'
            )
        if budget > self._num_candidates:
            raise InputError(
                f'fraction: expected at most the {self._num_candidates} samples that val_share leaves, got {budget} ({self.fraction} of '
                f'{loader.num_samples}); '
                f'use a fraction of at most {self._num_candidates / loader.num_samples:.4g} or a smaller val_share'
            )
        return budget

    def _select(self, state: State, budget: int) -> None:
        """Selects on rank 0; every rank gets the same subset, or the same error."""
        epoch, num_samples = int(state.timestamp.epoch), self._planner.loader.num_samples
        outcome: list[Any] = [None]
        error: Exception | None = None
        inputs: SelectionInputs | None = None
        try:
            _put_training_weights_back(state)
            inputs = self._source.read(DataPass(state, self._planner.loader, self._loss, epoch))
        except Exception as caught:  # any error of the model: the other ranks must not be left waiting in a collective call
            error = caught
        if self._any_rank(state, error is not None):
            outcome = [_message(error) if error is not None else 'another rank failed']
        else:
            inputs = None if inputs is None else inputs.gathered(num_samples, state)
            if dist.get_global_rank() == 0:
                try:
                    outcome = [self._decide(inputs, budget, state)]
                except Exception as caught:
                    error, outcome = caught, [_message(caught)]
        dist.broadcast_object_list(outcome, src=0)
        if not isinstance(outcome[0], str):
            self._indices, self._weights = outcome[0]
            self._source.picked()
            return
        if self._indices is None:
            if error is not None and not isinstance(error, InputError):
                raise error
            raise InputError(outcome[0])
        if not self._failure_warned:
            self._failure_warned = True
            warnings.warn(
                f'SubsetSelection: the selection at epoch {epoch} failed ({outcome[0]}); keeping the previous subset',
                stacklevel=2,
            )

    def _decide(self, inputs: SelectionInputs | None, budget: int, state: State) -> tuple[Tensor, Tensor | None]:
        end = self._length(state)
        epoch, warm_up = int(state.timestamp.epoch), self._warm_up(state)
        rest, every = self._rest, int(self.select_every.value)
        if inputs is not None and rest is not None:
            assert self._held_out is not None
            device = inputs.train.labels.device
            inputs = SelectionInputs(inputs.train.take(rest.to(device)), inputs.train.take(self._held_out.to(device)))
        positions, weights = self._source.pick(
            inputs,
            SelectionContext(
                budget=budget,
                num_candidates=self._num_candidates,
                candidates=rest,
                generator=torch.Generator().manual_seed(stream_seed(self._seed(state), _STREAM, epoch)),
                number=max(0, epoch - warm_up) // every,
                total=-(-(int(end.value) - warm_up) // every) if end.unit == TimeUnit.EPOCH else None,
                batch_size=self._planner.loader.initial_batch_size,
                current=self._indices if rest is None or self._indices is None else torch.searchsorted(rest, self._indices),
            ),
        )
        positions, order = positions.cpu().sort()
        indices = positions if rest is None else rest[positions]
        weights = weights.cpu()[order].float()
        if bool((weights == weights[0]).all()):
            return indices, None
        weights = weights.double()  # weights from a file may be so large that their float32 sum overflows
        return indices, (weights * (len(weights) / weights.sum())).float()

    @staticmethod
    def _any_rank(state: State, failed: bool) -> bool:
        flag = state.device.tensor_to_device(torch.tensor([failed], dtype=torch.uint8))
        dist.all_reduce(flag, reduce_operation='MAX')
        return bool(flag.item())


def _message(error: Exception) -> str:
    return str(error) or type(error).__name__


def _put_training_weights_back(state: State) -> None:
    for algorithm in state.algorithms:
        if isinstance(algorithm, EMA) and algorithm.ema_model is not None:
            algorithm._ensure_training_weights_active(state)  # a checkpoint at the end of an epoch leaves the averaged weights in the model
