"""Sources of subsets: gradients, random selection, forgetting counts, MILO's two phases, or a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer.core import DataSpec, State
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from composer_effalgos.plan import EpochPlanner, SampleRows, SampleTable, WeightedLoss
from composer_effalgos.plan.classes import NO_CLASS, logits_and_classes
from composer_effalgos.subset_selection.data_pass import ONE_CLASS, DataPass, Rows, SelectionInputs
from composer_effalgos.subset_selection.gradients import WITHOUT_GRADIENTS, LastLayerGradients
from composer_effalgos.subset_selection.problem import Selection
from composer_effalgos.subset_selection.selection import check_options, select_subset
from composer_effalgos.subset_selection.strategies import STRATEGIES
from composer_effalgos.subset_selection.strategies.milo import importance
from composer_effalgos.subset_selection.subset_file import check_subset, read_subset
from composer_effalgos.utils.checks import check_number
from composer_effalgos.utils.errors import InputError

_INSTEAD = {
    'generator': 'seed',
    'val_gradients': 'val_dataloader',
    'val_labels': 'val_dataloader',
}  # of an option of select_subset


@dataclass(frozen=True)
class SelectionContext:
    """Context of one selection.

    Attributes:
        budget: Number of samples to select.
        num_candidates: Number of samples to select from.
        candidates: Their indices in the dataset, int64, ascending; ``None`` for all samples.
        generator: The only source of randomness.
        number: Number of earlier selections, including failed ones.
        total: Number of selections in the whole run; ``None`` if its duration is not in epochs.
        batch_size: Batch size per rank.
        current: The current subset, as positions among the candidates, int64; ``None`` before the first selection.
    """

    budget: int
    num_candidates: int
    candidates: Tensor | None
    generator: torch.Generator
    number: int
    total: int | None
    batch_size: int
    current: Tensor | None


class Source:
    """Selects subsets. Every rank reads its shard of the data; rank 0 selects.

    Args:
        strategy: The strategy's name.
        backend: The strategy's backend.
        options: The strategy's options; checked here.
    """

    once = False  # whether one subset serves the whole run
    weighted = False  # whether the weights may differ
    by_position = False  # whether it needs the position of samples in a batch for more than weights
    runs_model = False  # whether it runs the model on the data, in other steps than training

    def __init__(self, strategy: str, backend: str, options: Mapping[str, Any]) -> None:
        for name in _INSTEAD.keys() & options:
            raise InputError(f'{name}: an option of select_subset alone; give SubsetSelection {_INSTEAD[name]}')
        self.strategy, self.backend, self.options = strategy, backend, dict(options)
        self.settings: Any = check_options(strategy, backend=backend, **options)

    def start(self, planner: EpochPlanner, loss: WeightedLoss) -> None:
        """Called at ``INIT``."""

    def epoch_end(self, state: State) -> None:
        """Called on every rank at the end of an epoch or fit, and at the start of a fit (an earlier one may have been interrupted)."""

    def new_data(self, dataset: Dataset[Any], *, known: bool) -> None:
        """Called before the first epoch on a dataset; ``known`` if state loaded from a checkpoint belongs to this dataset."""

    def budget(self, num_samples: int, fraction: float) -> int:
        """Number of samples in a subset."""
        return round(fraction * num_samples)

    def read(self, data: DataPass) -> SelectionInputs | None:
        """Reads this rank's inputs, without collective calls; ``None`` if none are needed."""
        raise NotImplementedError

    def pick(self, inputs: SelectionInputs | None, context: SelectionContext) -> Selection:
        """Returns positions among the candidates and their weights; called on rank 0 only."""
        raise NotImplementedError

    def picked(self) -> None:
        """Called on every rank after a successful selection."""

    def state_dict(self, state: State) -> dict[str, Any]:
        """Returns the state needed to resume; a collective call."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores the state returned by :meth:`state_dict`."""

    def _classes(self, rows: Rows) -> Tensor | None:
        """Returns the classes of some samples; ``None`` if they have none and the strategy does not need them."""
        by_class = (self.settings.selection_type or '').startswith('PerClass') or self.settings.class_balance == 'equal'
        if by_class and rows.classes is None:
            raise InputError(
                'selection_type: expected one class per sample for PerClass and class_balance=equal, got several labels or numbers; '
                'use selection_type=Supervised'
            )
        return rows.classes

    def _select(self, gradients: LastLayerGradients, context: SelectionContext, classes: Tensor | None, **options: Any) -> Selection:
        return select_subset(
            self.strategy,
            gradients,
            context.budget,
            labels=classes,
            backend=self.backend,
            generator=context.generator,
            **{**self.options, **options},
        )

    def _select_without_gradients(self, context: SelectionContext, classes: Tensor | None, **options: Any) -> Selection:
        """Selects at random or by scores, without gradients."""
        if classes is not None:
            classes = classes.cpu()
            options['num_classes'] = int(classes.max()) + 1
        return self._select(LastLayerGradients(torch.zeros(context.num_candidates, 1)), context, classes, **options)


class _Gradients(Source):
    """Runs a strategy on the gradients of the current model."""

    runs_model = True

    def __init__(
        self, strategy: str, backend: str, options: Mapping[str, Any], linear_layer: bool, val_dataloader: DataLoader | DataSpec | None
    ) -> None:
        super().__init__(strategy, backend, options)
        self.spec = STRATEGIES[strategy]
        self.weighted = self.spec.weighted
        by_embedding = linear_layer and (
            getattr(self.settings, 'features', '') == 'embedding' or getattr(self.settings, 'if_convex', False)
        )
        self.pass_options: dict[str, bool] = {'linear_layer': linear_layer, 'softmax': self.spec.softmax, 'errors': not by_embedding}
        self.uses_validation = self.spec.validation and getattr(self.settings, 'valid', True)
        self.val_dataloader = val_dataloader

    def read(self, data: DataPass) -> SelectionInputs:
        train = data.gradients(**self.pass_options)
        if self.val_dataloader is None or not self.uses_validation:
            return SelectionInputs(train)
        return SelectionInputs(train, data.validation(self.val_dataloader, train, **self.pass_options))

    def pick(self, inputs: SelectionInputs | None, context: SelectionContext) -> Selection:
        assert inputs is not None
        assert inputs.train.gradients is not None
        options: dict[str, Any] = {}
        if inputs.validation is not None and self.uses_validation:
            options.update(val_gradients=inputs.validation.gradients, val_labels=self._labels(inputs.validation))
        if self.settings.selection_type == 'PerBatch' and self.settings.batch_size is None:
            options['batch_size'] = context.batch_size
        if hasattr(self.settings, 'ss_indices') and self.settings.ss_indices is None:
            options['ss_indices'] = context.current
        return self._select(inputs.train.gradients, context, self._labels(inputs.train), **options)

    def _labels(self, rows: Rows) -> Tensor | None:
        return rows.labels if self.spec.targets else self._classes(rows)


class _Random(Source):
    """Selects at random; labels are only used to split the budget among the classes."""

    def __init__(self, strategy: str, backend: str, options: Mapping[str, Any]) -> None:
        super().__init__(strategy, backend, options)
        self.once = strategy == 'random'
        self.by_class = self.settings.selection_type == 'PerClass' or self.settings.class_balance == 'equal'

    def read(self, data: DataPass) -> SelectionInputs | None:
        return SelectionInputs(data.labels()) if self.by_class else None

    def pick(self, inputs: SelectionInputs | None, context: SelectionContext) -> Selection:
        if inputs is None:
            chosen = torch.randperm(context.num_candidates, generator=context.generator)[: context.budget]
            return chosen, torch.ones(context.budget)
        return self._select_without_gradients(context, self._classes(inputs.train))


class _Forgetting(Source):
    """Counts how often each sample is forgotten during training, and ranks by the count."""

    by_position = True

    def __init__(self, strategy: str, backend: str, options: Mapping[str, Any]) -> None:
        if 'scores' in options:
            raise InputError(
                'scores: SubsetSelection counts the forgetting events itself, while kappa lasts; leave it out (select_subset takes it)'
            )
        super().__init__(strategy, backend, options)
        self.by_class = self.settings.selection_type != 'Supervised'
        self.events = torch.zeros(0, dtype=torch.int32)

    def start(self, planner: EpochPlanner, loss: WeightedLoss) -> None:
        self.table = SampleTable(planner)  # 1 if the sample was classified correctly when last trained on, else 0
        loss.subscribers.append(self._observe)

    def new_data(self, dataset: Dataset[Any], *, known: bool) -> None:
        size = len(dataset)  # type: ignore[arg-type]
        if not known or len(self.events) != size:
            self.events = torch.zeros(size, dtype=torch.int32)
            self.table.reset(size)

    def epoch_end(self, state: State) -> None:
        if self.table.noted:
            before = self.table.rows
            self.table.exchange(state)
            self.events = self._counted(before, self.table.rows)

    def read(self, data: DataPass) -> SelectionInputs | None:
        return SelectionInputs(data.labels()) if self.by_class else None

    def pick(self, inputs: SelectionInputs | None, context: SelectionContext) -> Selection:
        rows = self.table.rows
        if not bool(rows.scored.any()):
            raise InputError('strategy: forgetting has counted nothing yet; train with this strategy and kappa above 0 first')
        learnt = (self.events > 0) | (rows.scores == 1)
        lowest = self.settings.keep == 'lowest'
        # never trained on: the last to be chosen, with keep='lowest' after those that were never learned
        never_learnt, unseen = (torch.finfo(torch.float32).max, math.inf) if lowest else (math.inf, -1.0)
        scores = torch.where(learnt, self.events.float(), never_learnt)
        scores[~rows.scored] = unseen
        scores = scores if context.candidates is None else scores[context.candidates]
        return self._select_without_gradients(context, None if inputs is None else self._classes(inputs.train), scores=scores)

    def state_dict(self, state: State) -> dict[str, Any]:
        table = self.table.state_dict(state)
        return {'events': self._counted(self.table.rows, SampleRows(**table)), **table}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.events = saved['events'].cpu()
        if 'history' in saved:  # the planner refuses an older version's checkpoint at FIT_START
            self.table.load_state_dict(saved)

    def _observe(self, losses: Tensor, where: slice, outputs: Any, batch: Any) -> None:
        logits, classes = logits_and_classes(outputs, batch, 'strategy', WITHOUT_GRADIENTS)
        right = (logits.detach().argmax(dim=1) == classes).float()
        self.table.note(torch.where(classes == NO_CLASS, -1.0, right), where)

    def _counted(self, before: SampleRows, after: SampleRows) -> Tensor:
        """Adds the forgetting events between ``before`` and ``after``: samples that were classified correctly and no longer are."""
        if bool((after.scores < 0).any()):
            raise InputError(f'labels: {ONE_CLASS}, but strategy forgetting counts right answers; use gradmatch, glister or random')
        return self.events + ((before.scores == 1) & (after.scores == 0)).int()


class _Milo(Source):
    """Prepares both of MILO's phases in one data pass; later selections need no pass."""

    runs_model = True

    def __init__(self, strategy: str, backend: str, options: Mapping[str, Any], linear_layer: bool) -> None:
        options, self.linear_layer = dict(options), linear_layer
        self.exploration = options.pop('exploration', 1 / 6)
        check_number('exploration', self.exploration, least=0, most=1)
        for name in ('phase', 'scores'):
            if name in options:
                raise InputError(f'{name}: SubsetSelection goes through both phases by itself; exploration is the share of the first')
        super().__init__(strategy, backend, options)
        self.prepared: dict[str, Tensor] = {}
        self.ready = False  # known on every rank; only rank 0 has ``prepared``

    def new_data(self, dataset: Dataset[Any], *, known: bool) -> None:
        self.ready = self.ready and known

    def read(self, data: DataPass) -> SelectionInputs | None:
        by_embedding = self.linear_layer and self.settings.features == 'embedding'
        return (
            None if self.ready else SelectionInputs(data.gradients(linear_layer=self.linear_layer, softmax=False, errors=not by_embedding))
        )

    def pick(self, inputs: SelectionInputs | None, context: SelectionContext) -> Selection:
        if inputs is not None:
            self.prepared = self._prepare(inputs.train, context)
        subsets = self.prepared['subsets']
        if context.number < len(subsets):
            return subsets[context.number].long(), torch.ones(context.budget)
        gains, labels = self.prepared['importance'], self.prepared.get('labels')
        return self._select_without_gradients(context, labels, scores=gains, phase='weighted-random')

    def picked(self) -> None:
        self.ready = True

    def _prepare(self, train: Rows, context: SelectionContext) -> dict[str, Tensor]:
        if context.total is None:
            raise InputError('max_duration: expected epochs with strategy milo, which divides the run into two phases, got another unit')
        assert train.gradients is not None
        classes = None if self.settings.selection_type == 'Supervised' else self._classes(train)
        subsets = [
            self._select(train.gradients, context, classes, phase='stochastic-greedy')[0].int().cpu()
            for _ in range(math.ceil(self.exploration * context.total - 1e-9))
        ]
        gains = importance(train.gradients, classes, self.settings.features)
        prepared = {'subsets': torch.stack(subsets) if subsets else torch.zeros(0, context.budget, dtype=torch.int32)}
        prepared['importance'] = gains.cpu()
        return prepared if classes is None else {**prepared, 'labels': classes.cpu()}

    def state_dict(self, state: State) -> dict[str, Any]:
        return {'prepared': self.prepared}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.prepared = {name: value.cpu() for name, value in saved['prepared'].items()}
        self.ready = bool(self.prepared)


class _File(Source):
    """Trains on a subset from a file."""

    once = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        path = options.get('path')
        if path is None or set(options) != {'path'}:
            other = next((name for name in options if name != 'path'), None)
            raise InputError('path: missing; strategy=file needs the file' if other is None else f'{other}: unknown option of file')
        self.path = Path(path)
        self.subset = read_subset(self.path)
        self.weighted = bool((self.subset.weights != self.subset.weights[0]).any())

    def new_data(self, dataset: Dataset[Any], *, known: bool) -> None:
        check_subset(self.path, self.subset, dataset)

    def budget(self, num_samples: int, fraction: float) -> int:
        return len(self.subset.indices)

    def read(self, data: DataPass) -> None:
        return None

    def pick(self, inputs: SelectionInputs | None, context: SelectionContext) -> Selection:
        return self.subset.indices, self.subset.weights


def make_source(
    strategy: str, backend: str, options: Mapping[str, Any], *, linear_layer: bool, val_dataloader: DataLoader | DataSpec | None
) -> Source:
    """Returns the source for a strategy.

    Raises:
        InputError: For an unknown strategy, backend, option or value, or a file that cannot be read.
    """
    if strategy == 'file':
        return _File(options)
    if strategy in ('random', 'adaptive-random'):
        return _Random(strategy, backend, options)
    if strategy == 'forgetting':
        return _Forgetting(strategy, backend, options)
    if strategy == 'milo':
        return _Milo(strategy, backend, options, linear_layer)
    return _Gradients(strategy, backend, options, linear_layer, val_dataloader)
