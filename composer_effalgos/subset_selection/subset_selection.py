"""SubsetSelection: trains on a weighted subset that a selection strategy picks anew every few epochs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from composer.algorithms import EMA
from composer.core import Algorithm, Event, State, TimeUnit, get_precision_context
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from composer_effalgos.adabatch.adabatch import parse_time
from composer_effalgos.errors import InputError
from composer_effalgos.plan import Plan, WeightedLoss, check_seed, stream_seed
from composer_effalgos.subset_selection.gradients import LastLayerGradients, last_layer_gradients
from composer_effalgos.subset_selection.strategies import check_options, select_subset

_STREAM = 11  # of random numbers, see stream_seed
_RANDOM = ('random', 'adaptive-random')


class SubsetSelection(Algorithm):
    """Trains on a weighted subset of the data, selected again every few epochs.

    A selection makes one forward pass over the data in evaluation mode, shared out over the ranks, and hands the per-sample gradients of
    the last linear layer to the strategy. Rank 0 decides, all ranks train on the same subset. The weights enter the loss, scaled to mean
    1. Schedules keep the time of the run on all data. A selection that fails leaves the last good subset in place, with one warning.

    Runs on ``INIT``, ``FIT_START`` and ``EPOCH_START``. Sources: GLISTER, Killamsetty et al., arXiv 2012.10630; GradMatch, Killamsetty et
    al., arXiv 2103.00123; CRAIG, Mirzasoleiman et al., arXiv 1906.01827; the CORDS package.

    Args:
        strategy: ``glister``, ``gradmatch``, ``craig``, ``facility-location``, ``graph-cut``, ``sum-redundancy``,
            ``saturated-coverage``, ``random`` (drawn once) or ``adaptive-random`` (drawn at every selection).
        fraction: The share of the data to train on, in (0, 1].
        select_every: Time between selections, in whole epochs.
        kappa: The share of the run trained on all data first, in [0, 1): CORDS's warm start.
        backend: ``torch`` (ours) or ``cords`` (the CORDS package).
        selection_type: ``PerClass``, ``PerBatch``, ``Supervised`` or ``PerClassPerGradient`` as in CORDS; ``None`` for the strategy's own
            default.
        linear_layer: Whether weight gradients of the last layer are used; otherwise its bias gradients alone.
        val_dataloader: The data whose gradient GLISTER and ``valid=True`` GradMatch match; ``None`` for the training data.
        seed: Seeds the selections; ``None`` for the trainer's seed.
        **strategy_options: The strategy's own options, named as in CORDS (``eta``, ``greedy``, ``r``, ``lam``, ``eps``, ...).

    Raises:
        InputError: For an argument outside its range or an unknown option; when training starts, for a run it cannot be used in.

    Example:
        >>> from composer import Trainer
        >>> from composer_effalgos import SubsetSelection
        >>> trainer = Trainer(
        ...     model=model, train_dataloader=loader, max_duration='100ep', algorithms=[SubsetSelection('glister', 0.3)]
        ... )  # doctest: +SKIP
    """

    _plan: Plan  # from INIT on
    _loss: WeightedLoss

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
        val_dataloader: DataLoader | None = None,
        seed: int | None = None,
        **strategy_options: Any,
    ) -> None:
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise InputError(f'fraction: must be a number in (0, 1], got {fraction!r}')
        if isinstance(kappa, bool) or not isinstance(kappa, int | float) or not 0 <= kappa < 1:
            raise InputError(f'kappa: must be a number in [0, 1), got {kappa!r}')
        check_seed(seed)
        if not isinstance(linear_layer, bool):
            raise InputError(f'linear_layer: must be true or false, got {linear_layer!r}')
        if val_dataloader is not None and not isinstance(val_dataloader, DataLoader):
            raise InputError(f'val_dataloader: must be a torch.utils.data.DataLoader, got {type(val_dataloader).__name__}')
        options = dict(strategy_options) if selection_type is None else {**strategy_options, 'selection_type': selection_type}
        check_options(strategy, backend=backend, **options)
        self.strategy = strategy
        self.fraction = fraction
        self.select_every = parse_time('select_every', select_every, [TimeUnit.EPOCH])
        self.kappa = kappa
        self.backend = backend
        self.selection_type = selection_type
        self.linear_layer = linear_layer
        self.val_dataloader = val_dataloader
        self.seed = seed
        self.strategy_options = strategy_options
        self._options = options
        self._indices: Tensor | None = None  # the subset, ascending
        self._weights: Tensor | None = None  # None for ones
        self._data_changes = 0
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
            **self.strategy_options,
        }
        return f'{type(self).__name__}({", ".join(f"{name}={value!r}" for name, value in settings.items())})'

    @property
    def indices(self) -> Tensor | None:
        """The samples trained on, int64 ``[k]`` ascending; ``None`` before the first selection."""
        return self._indices

    @property
    def weights(self) -> Tensor | None:
        """Their loss weights, float32 ``[k]`` with mean 1; ``None`` before the first selection."""
        if self._indices is None:
            return None
        return torch.ones(len(self._indices)) if self._weights is None else self._weights

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.INIT, Event.FIT_START, Event.EPOCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._initialise(state)
            return
        assert state.max_duration is not None
        warm_up = 0
        if state.max_duration.unit == TimeUnit.EPOCH:
            warm_up = math.ceil(self.kappa * state.max_duration.value - 1e-9)
        elif self.kappa > 0:
            raise InputError(f'kappa: needs max_duration in epochs, got {state.max_duration.to_timestring()!r}; leave it 0')
        epoch = int(state.timestamp.epoch)
        if event == Event.EPOCH_START:
            budget = self._budget()
            self._forget_other_data()
            facts = self._plan.loader.facts
            facts['selection_seconds'] = 0.0
            redraw = self.strategy != 'random' and (epoch - warm_up) % self.select_every.value == 0
            if epoch >= warm_up and (redraw or self._indices is None or len(self._indices) != budget):
                start = time.perf_counter()
                self._select(state, budget, epoch)
                facts['selection_seconds'] = time.perf_counter() - start
                logger.log_metrics({'subset_selection/samples': budget})  # the time is EfficiencyMonitor's to log
        in_use = epoch >= warm_up
        self._plan.candidates = self._indices if in_use else None
        self._plan.candidate_weights = self._weights if in_use else None

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), 'indices': self._indices, 'weights': self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._indices = None if state['indices'] is None else state['indices'].cpu()
        self._weights = None if state['weights'] is None else state['weights'].cpu()

    def _initialise(self, state: State) -> None:
        if sum(isinstance(algorithm, SubsetSelection) for algorithm in state.algorithms) > 1:
            raise InputError('algorithms: SubsetSelection is given twice; keep one')
        self._plan = Plan.of(state)
        self._indices = self._weights = None
        self._data_changes, self._failure_warned = 0, False
        uniform = self.strategy in ('glister', *_RANDOM)  # weights are all 1
        self._loss = self._plan.request_loss(state, f'{type(self).__name__}({self.strategy!r})', by_position=not uniform)

    @property
    def _needs_no_pass(self) -> bool:
        return self.strategy in _RANDOM and self.selection_type in (None, 'Supervised')

    def _budget(self) -> int:
        loader = self._plan.loader
        budget = round(self.fraction * loader.num_samples)
        batch = loader.initial_batch_size * loader.world_size
        if budget < batch:
            raise InputError(
                f'fraction: {self.fraction} of {loader.num_samples} samples is {budget}, less than one batch of {batch}; '
                f'use a fraction of at least {batch / loader.num_samples:.4g} or a smaller batch'
            )
        return budget

    def _forget_other_data(self) -> None:
        if self._plan.data_changes != self._data_changes:
            if self._data_changes > 0:  # else the subset came from a checkpoint, or there is none
                self._indices = self._weights = None
            self._data_changes = self._plan.data_changes

    def _select(self, state: State, budget: int, epoch: int) -> None:
        """Selects on rank 0; every rank gets the same subset, or the same error."""
        num_samples = self._plan.loader.num_samples
        outcome: list[Any] = [None]
        error: Exception | None = None
        try:
            inputs = None if self._needs_no_pass else self._gradients(state, epoch)
            failed = 0
        except Exception as caught:  # whatever the model raises must not leave the other ranks waiting
            error, failed, inputs = caught, 1, None
        if self._any_rank(state, failed):
            outcome = [str(error) if error is not None else 'another rank failed']
        elif dist.get_global_rank() == 0:
            try:
                outcome = [self._decide(inputs, budget, num_samples, epoch, state)]
            except Exception as caught:
                error, outcome = caught, [str(caught) or type(caught).__name__]
        dist.broadcast_object_list(outcome, src=0)
        if not isinstance(outcome[0], str):
            self._indices, self._weights = outcome[0]
            return
        if self._indices is None:
            if error is not None and not isinstance(error, InputError):
                raise error
            raise InputError(outcome[0])
        if not self._failure_warned:
            self._failure_warned = True
            warnings.warn(
                f'SubsetSelection: the selection at epoch {epoch} failed ({outcome[0]}); training goes on with the last subset',
                stacklevel=2,
            )

    def _decide(self, inputs: Any, budget: int, num_samples: int, epoch: int, state: State) -> tuple[Tensor, Tensor | None]:
        seed = state.rank_zero_seed if self.seed is None else self.seed
        generator = torch.Generator().manual_seed(stream_seed(seed, _STREAM, epoch))
        if inputs is None:
            return torch.randperm(num_samples, generator=generator)[:budget].sort().values, None
        gradients, labels, val_gradients, val_labels = inputs
        options = dict(self._options)
        if val_gradients is not None:
            options.update(val_gradients=val_gradients, val_labels=val_labels)
        if self.selection_type == 'PerBatch':
            options.setdefault('batch_size', self._plan.loader.initial_batch_size)
        indices, weights = select_subset(
            self.strategy, gradients, budget, labels=labels, backend=self.backend, generator=generator, **options
        )
        indices, order = indices.cpu().sort()
        weights = weights.cpu()[order].float()
        if bool((weights == weights[0]).all()):
            return indices, None
        return indices, weights * (len(weights) / weights.sum())

    def _gradients(self, state: State, epoch: int) -> tuple[LastLayerGradients, Tensor, LastLayerGradients | None, Tensor | None]:
        """Last-layer gradients of all training samples, in their order, and of the validation samples: the same on every rank."""
        for algorithm in state.algorithms:
            if isinstance(algorithm, EMA) and algorithm.ema_model is not None:
                algorithm._ensure_training_weights_active(state)  # a checkpoint at the epoch's end leaves the average in place
        loader = self._plan.loader
        rank, world_size = loader.rank, loader.world_size
        share = range(rank, loader.num_samples, world_size)
        parts = self._pass_over(state, loader.read(share, loader.initial_batch_size, seed=epoch))
        gradients, labels = _interleave(parts, loader.num_samples, state)
        if self.val_dataloader is None:
            return gradients, labels, None, None
        batches: Iterable[Any] = self.val_dataloader
        if world_size > 1 and not isinstance(self.val_dataloader.sampler, DistributedSampler):
            batches = (batch for i, batch in enumerate(self.val_dataloader) if i % world_size == rank)
        val_gradients, val_labels = _concatenate(self._pass_over(state, batches), state)
        return gradients, labels, val_gradients, val_labels

    def _pass_over(self, state: State, batches: Iterable[Any]) -> tuple[LastLayerGradients, Tensor]:
        self._loss.require_per_sample(type(self).__name__)

        def on_device() -> Iterator[Any]:
            for batch in batches:
                yield state.device.batch_to_device(batch)

        return last_layer_gradients(
            state.model,
            on_device(),
            self._loss.per_sample,
            linear_layer=self.linear_layer,
            context=lambda: get_precision_context(state.precision, state.precision_config),
        )

    @staticmethod
    def _any_rank(state: State, failed: int) -> bool:
        flag = state.device.tensor_to_device(torch.tensor([failed], dtype=torch.uint8))
        dist.all_reduce(flag, reduce_operation='MAX')
        return bool(flag.item())


def _gather_rows(rows: Tensor, state: State) -> list[Tensor]:
    """Every rank's rows; ranks may have different numbers of them."""
    rows = state.device.tensor_to_device(rows)
    counts = dist.all_gather(state.device.tensor_to_device(torch.tensor([len(rows)])))
    longest = max(int(count.item()) for count in counts)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    return [part[: int(count.item())] for part, count in zip(dist.all_gather(padded), counts, strict=True)]


def _concatenate(part: tuple[LastLayerGradients, Tensor], state: State) -> tuple[LastLayerGradients, Tensor]:
    if dist.get_world_size() == 1:
        return part
    (error, embedding), labels = (part[0].error, part[0].embedding), part[1]
    whole = LastLayerGradients(
        torch.cat(_gather_rows(error, state)), None if embedding is None else torch.cat(_gather_rows(embedding, state))
    )
    return whole, torch.cat(_gather_rows(labels, state))


def _interleave(part: tuple[LastLayerGradients, Tensor], num_samples: int, state: State) -> tuple[LastLayerGradients, Tensor]:
    """Puts rank ``r``'s rows at ``r, r + w, r + 2 w, ...``."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return part
    by_rank = torch.cat([torch.arange(rank, num_samples, world_size) for rank in range(world_size)])
    gradients, labels = _concatenate(part, state)
    back = by_rank.argsort().to(labels.device)
    return gradients.take(back), labels[back]
