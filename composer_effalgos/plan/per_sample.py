"""Per-sample losses from a function: the caller's own, or the model's loss with ``reduction='none'``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from composer.models import ComposerClassifier, ComposerModel
from torch import Tensor, nn

from composer_effalgos.plan.graph import edge_of, walk
from composer_effalgos.plan.outputs import NotReadableError, detached, entries_of, in_full, same_structure, tensors_of, total_of
from composer_effalgos.plan.part import alike, evaluated, part_of, take_part
from composer_effalgos.plan.probe import Probe
from composer_effalgos.utils.errors import InputError

PerSampleLoss = Callable[[Any, Any], Any]
"""``(outputs, batch) -> losses``: float ``[B, ...]``, reduced to ``[B]`` by the mean over all other dimensions."""


def check_per_sample_loss(given: Any) -> None:
    """Checks that the argument ``per_sample_loss`` is a :data:`PerSampleLoss` or ``None``."""
    if given is not None and not callable(given):
        raise InputError(f'per_sample_loss: expected callable(outputs, batch) -> [B], got {given!r}')


def per_sample_mean(losses: Tensor) -> Tensor:
    """Reduces losses to one per sample.

    Args:
        losses: Float ``[B, ...]``.

    Returns:
        Float32 (or float64) ``[B]``: the mean over all dimensions but the first.
    """
    losses = in_full(losses)
    return losses if losses.ndim == 1 else losses.flatten(1).mean(dim=1)


class SampleLosses(NamedTuple):
    """The loss of each sample."""

    losses: Tensor  # [B]
    shares: list[Tensor]  # [B] each: contribution of each sample to each of the losses that the model returns, or to their sum
    # weights the gradients more cheaply than at the outputs, if possible; skips nodes that are already in the set
    weigh: Callable[[Tensor, set[Any]], None] | None = None


class Called:
    """Per-sample losses returned by a function of outputs and batch.

    Has the same methods as :class:`~composer_effalgos.plan.read_loss.ReadFromGraph`.

    Args:
        function: Returns ``[B, ...]``, or several of them in the structure of ``model.loss``.
        name: Name of the function, for messages.
        original: The model's loss.
        given: Whether the function is the caller's, who is responsible for its correctness.
    """

    def __init__(self, function: PerSampleLoss, name: str, original: Callable[..., Any], *, given: bool = False) -> None:
        self._function, self.name, self.evaluate, self._given = function, name, original, given
        self._per_batch = False  # whether the losses are divided by the batch size, as in Composer's binary cross-entropy
        self.plain_mean = False  # whether the model's loss is the mean of these losses plus terms for the whole batch

    def forget(self) -> None:
        """Releases what ``evaluate``, which returns the result of ``model.loss``, recorded: nothing here."""

    def ignores_reduction(self, outputs: Any, batch: Any) -> bool:
        """Whether ``reduction='none'`` is rejected or has no effect, as in ``loss(self, outputs, batch, *args, **kwargs)``."""
        if self._given:
            return False
        try:
            with torch.no_grad():
                return all(entry.ndim == 0 for entry in entries_of(self._call(outputs, batch)))
        except TypeError:
            return True

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        """Loss of each sample, float ``[B]``."""
        return torch.stack(self._each(outputs, batch)).sum(dim=0)

    def depends_on_others(self, own: Any, outputs: Any, batch: Any) -> bool:
        """Whether the loss of a sample depends on the rest of the batch, as far as can be determined."""
        if self._given:
            return False
        with torch.no_grad():
            losses = self.losses(outputs, batch)
        rows = part_of(losses)
        if rows is None:
            return False
        part, part_batch = take_part(outputs, batch, rows, len(losses))
        found, like = evaluated(self.losses, part, part_batch).detach(), next(iter(tensors_of(part)), losses)
        if not self._per_batch and not alike(found, losses[rows], like) and alike(found * len(found), losses[rows] * len(losses), like):
            self._per_batch = True
            return False
        return not alike(found, losses[rows], like)

    def samples(self, own: Any, outputs: Any, batch: Any) -> SampleLosses:
        """Losses of the samples and their shares in ``own``, the model's loss for this batch."""
        each, entries = self._each(outputs, batch), entries_of(own)
        total = torch.stack(each).sum(dim=0)
        if self.plain_mean:
            return SampleLosses(total, [losses / len(losses) for losses in each])
        if len(each) != len(entries):
            return SampleLosses(total, [total * _factor(total, total_of(own))])
        # the divisor (class weights, ignored labels, a scale) differs between batches, so it is computed for each
        pairs = zip(each, entries, strict=True)
        return SampleLosses(total, [losses * _factor(losses, in_full(entry.detach()).mean()) for losses, entry in pairs])

    def probe(self, own: Any, outputs: Any, batch: Any) -> Probe:
        """Per-sample losses for a check of their gradients."""
        with torch.enable_grad():
            cut = detached(outputs)
            losses = self.losses(cut, batch)
            shares = losses / len(losses)
        leaves = tensors_of(cut)

        def slopes(result: Tensor) -> dict[int, Tensor]:
            found = torch.autograd.grad(result, leaves, retain_graph=True, allow_unused=True)
            return {position: gradient for position, gradient in enumerate(found) if gradient is not None}

        if not shares.requires_grad:
            return Probe(shares, lambda result: {}, False)
        nodes = walk([edge_of(shares)], {edge_of(leaf) for leaf in leaves}).nodes
        return Probe(shares, slopes, any(hasattr(node, 'variable') for node in nodes))

    def _call(self, outputs: Any, batch: Any) -> Any:
        return self._function(same_structure(outputs), same_structure(batch))  # the function may pop from its arguments

    def _each(self, outputs: Any, batch: Any) -> list[Tensor]:
        returned = self._call(outputs, batch)
        try:
            each = entries_of(returned)
        except NotReadableError as error:
            raise NotReadableError(f'{self.name} must give a tensor [B, ...], got {type(returned).__name__}') from error
        found = [per_sample_mean(losses) for losses in each if losses.ndim]
        for losses in each:
            if not found or (losses.ndim and len(losses) != len(found[0])):
                raise NotReadableError(f'{self.name} must give a tensor [B, ...], got shape {tuple(losses.shape)}')
        factor = len(found[0]) if self._per_batch else 1
        # a scalar next to losses [B] is a term for the whole batch
        return [factor * per_sample_mean(losses) if losses.ndim else torch.zeros_like(found[0]) for losses in each]


def _factor(losses: Tensor, mean: Tensor) -> Tensor:
    """``1 / M``, where ``M`` is the divisor that the model's own loss applies to the sum of this batch's losses."""
    total = losses.detach().sum()
    return torch.where(total != 0, mean / total, torch.full_like(total, 1 / len(losses)))


def reduction_form(model: ComposerModel, original: Callable[..., Any]) -> Called | None:
    """The model's loss with ``reduction='none'``; ``None`` if it has no such argument."""
    loss_fn = getattr(model, '_loss_fn', None)
    name = f"{type(model).__name__}.loss with reduction='none'"
    if isinstance(model, ComposerClassifier) and isinstance(loss_fn, nn.Module):
        # a torch.nn loss module has no reduction argument, but reads its attribute when it is called
        if not hasattr(loss_fn, 'reduction'):
            return None

        def module_loss(outputs: Any, batch: Any) -> Any:
            reduction, loss_fn.reduction = loss_fn.reduction, 'none'  # type: ignore[assignment]
            try:
                return original(outputs, batch)
            finally:
                loss_fn.reduction = reduction

        return Called(module_loss, name, original)
    if not _takes_reduction(original) or (isinstance(model, ComposerClassifier) and not _takes_reduction(model._loss_fn)):
        return None
    return Called(lambda outputs, batch: original(outputs, batch, reduction='none'), name, original)


def _takes_reduction(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == 'reduction' or p.kind is p.VAR_KEYWORD for p in parameters)
