"""The data pass of a selection: every rank reads its shard of the data, then the ranks exchange the results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import DataSpec, State, ensure_data_spec, get_precision_context
from composer.utils import dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

from composer_effalgos.plan import PlannedDataLoader, WeightedLoss, class_labels
from composer_effalgos.plan.classes import NO_CLASS, labels_of, logits_and_classes
from composer_effalgos.plan.trainer import training_data_spec
from composer_effalgos.subset_selection.gradients import WITHOUT_GRADIENTS, LastLayerGradients, last_layer_gradients
from composer_effalgos.utils.errors import InputError

ONE_CLASS = 'expected one class per sample (class indices [B], or non-negative rows [B, C] that sum to 1), got several labels'


@dataclass(frozen=True)
class Rows:
    """Labels ``[n]`` of some samples and, if requested, their gradients."""

    labels: Tensor
    gradients: LastLayerGradients | None = None

    def take(self, indices: Tensor | slice) -> Rows:
        """Returns a subset of the rows."""
        return Rows(self.labels[indices], None if self.gradients is None else self.gradients.take(indices))

    @property
    def classes(self) -> Tensor | None:
        """The labels if every sample has one class; ``None`` for regression or multi-label samples."""
        return None if self.labels.is_floating_point() or bool((self.labels == NO_CLASS).any()) else self.labels


@dataclass(frozen=True)
class SelectionInputs:
    """Results of a data pass: of this rank's shard, or after :meth:`gathered` of all samples in dataset order."""

    train: Rows
    validation: Rows | None = None

    def gathered(self, num_samples: int, state: State) -> SelectionInputs:
        """Gathers the rows of all ranks; a collective call."""
        world_size = dist.get_world_size()
        if world_size == 1:
            return self
        # rank r holds samples r, r + world_size, ...; the argsort inverts this rank-major order
        by_rank = torch.cat([torch.arange(rank, num_samples, world_size) for rank in range(world_size)])
        train = _concatenated(self.train, state)
        back = by_rank.argsort().to(train.labels.device)
        return SelectionInputs(train.take(back), None if self.validation is None else _concatenated(self.validation, state))


class DataPass:
    """One pass over a rank's shard of the data, in evaluation mode and in the run's precision; no collective calls.

    Batches go through the transforms of the training ``DataSpec``, as in training.

    Args:
        state: The trainer's state.
        loader: The planned loader.
        loss: The weighted loss; its per-sample form is differentiated.
        seed: Seeds the dataset's random augmentation.
    """

    def __init__(self, state: State, loader: PlannedDataLoader, loss: WeightedLoss, seed: int) -> None:
        self._state, self._loader, self._loss, self._seed = state, loader, loss, seed

    def gradients(self, *, linear_layer: bool, softmax: bool, errors: bool = True) -> Rows:
        """Last-layer gradients and labels of this rank's training samples: every ``world_size``-th, starting at ``rank``.

        Args:
            linear_layer: Whether to keep the embeddings.
            softmax: Use the gradients of a plain cross-entropy instead of the model's training loss.
            errors: Whether to compute the loss; if not, the errors are zero and only the embeddings are meaningful.
        """
        return self._complete(self._gradients_of(self._batches(), linear_layer, softmax, errors))

    def validation(self, dataloader: DataLoader | DataSpec, like: Rows, *, linear_layer: bool, softmax: bool, errors: bool = True) -> Rows:
        """Last-layer gradients and labels of this rank's shard of a validation set.

        Args:
            dataloader: Its dataloader; without a ``DistributedSampler``, its batches are divided among the ranks.
            like: Training rows; a rank without a batch returns zero rows of the same shapes and dtypes.
            linear_layer: As for the training rows.
            softmax: As for the training rows.
            errors: As for the training rows.
        """
        spec = ensure_data_spec(dataloader)
        batches: Iterable[Any] = spec.dataloader
        if not isinstance(getattr(spec.dataloader, 'sampler', None), DistributedSampler):
            batches = itertools.islice(batches, self._loader.rank, None, self._loader.world_size)
        transformed = self._on_device(batches, spec)
        first = next(transformed, None)
        if first is None:
            return like.take(slice(0, 0))
        return self._gradients_of(itertools.chain([first], transformed), linear_layer, softmax, errors)

    def labels(self) -> Rows:
        """Labels of this rank's training samples: the class labels that the dataset exposes, or else read sample by sample."""
        known = class_labels(self._loader.dataset)
        if known is not None:
            return Rows(self._state.device.tensor_to_device(known[self._loader.rank :: self._loader.world_size]))
        return self._complete(Rows(torch.cat([labels_of(batch) for batch in self._batches()])))

    @property
    def _share(self) -> range:
        return range(self._loader.rank, self._loader.num_samples, self._loader.world_size)

    def _complete(self, rows: Rows) -> Rows:
        if len(rows.labels) != len(self._share):
            raise InputError(
                f'train_dataloader: expected {len(self._share)} samples, got {len(rows.labels)}; collate_fn or a transform of the '
                'DataSpec adds or drops samples, so positions no longer identify them'
            )
        return rows

    def _batches(self) -> Iterator[Any]:
        loader = self._loader
        fits, microbatch = loader.initial_batch_size, self._state.device_train_microbatch_size
        fits = min(fits, microbatch) if isinstance(microbatch, int) else fits
        # a forward pass without autograd needs much less memory, so that several training batches fit at once
        return self._on_device(loader.read(self._share, 4 * fits, seed=self._seed), training_data_spec(self._state))

    def _on_device(self, batches: Iterable[Any], spec: DataSpec | None) -> Iterator[Any]:
        for batch in batches:
            batch = self._state.device.batch_to_device(batch)
            yield batch if spec is None else spec.microbatch_transforms(spec.batch_transforms(batch))

    def _gradients_of(self, batches: Iterable[Any], linear_layer: bool, softmax: bool, errors: bool) -> Rows:
        per_sample: Callable[[Any, Any], Tensor] | None = _cross_entropy if errors else None
        if errors and not softmax:
            per_sample = self._loss.per_sample
        gradients, labels = last_layer_gradients(
            self._state.model,
            batches,
            per_sample,
            linear_layer=linear_layer,
            context=lambda: get_precision_context(self._state.precision, self._state.precision_config),
        )
        return Rows(labels, gradients)


def _cross_entropy(outputs: Any, batch: Any) -> Tensor:
    logits, classes = logits_and_classes(outputs, batch, 'strategy', WITHOUT_GRADIENTS)
    if (classes == NO_CLASS).any():
        raise InputError(f'labels: {ONE_CLASS}; strategies gradmatch, craig, glister, grand and random do not need one')
    return cross_entropy(logits, classes, reduction='none')


def _concatenated(rows: Rows, state: State) -> Rows:
    gradients = rows.gradients
    if gradients is not None:
        embedding = None if gradients.embedding is None else _all_rows(gradients.embedding, state)
        gradients = LastLayerGradients(_all_rows(gradients.error, state), embedding)
    return Rows(_all_rows(rows.labels, state), gradients)


def _all_rows(rows: Tensor, state: State) -> Tensor:
    """Concatenates the rows of all ranks, in rank order; ranks may have different numbers of rows."""
    rows = state.device.tensor_to_device(rows)
    counts = dist.all_gather(state.device.tensor_to_device(torch.tensor([len(rows)])))
    longest = max(int(count.item()) for count in counts)
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    return torch.cat([part[: int(count.item())] for part, count in zip(dist.all_gather(padded), counts, strict=True)])
