"""A model's loss sample by sample: called, as the caller's function or with ``reduction='none'``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from composer.models import ComposerClassifier, ComposerModel
from torch import Tensor, nn

from composer_effalgos.plan.graph import edge_of, walk
from composer_effalgos.plan.outputs import NotReadableError, detached, entries_of, in_full, tensors_of, total_of
from composer_effalgos.plan.probe import Probe
from composer_effalgos.utils.errors import InputError

PerSampleLoss = Callable[[Any, Any], Any]
"""``(outputs, batch) -> losses``: float ``[B, ...]``, reduced to ``[B]`` by the mean over all other dimensions."""


def check_per_sample_loss(given: Any) -> None:
    """Refuses what is no :data:`PerSampleLoss`; None passes.

    Args:
        given: The argument ``per_sample_loss``.
    """
    if given is not None and not callable(given):
        raise InputError(f'per_sample_loss: expected callable(outputs, batch) -> [B], got {given!r}')


def per_sample_mean(losses: Tensor) -> Tensor:
    """Reduces losses to one a sample.

    Args:
        losses: Float ``[B, ...]``.

    Returns:
        Float32 (or float64) ``[B]``: the mean over all but the first dimension.
    """
    losses = in_full(losses)
    return losses if losses.ndim == 1 else losses.flatten(1).mean(dim=1)


class Samples(NamedTuple):
    """The loss of each sample."""

    losses: Tensor  # [B], as it is per sample
    shares: list[Tensor]  # [B] each: what it adds to each of the losses that the model returns, or to their sum
    # weighs the gradients, but for what is in the set already, where there is a cheaper way than at the outputs
    weigh: Callable[[Tensor, set[Any]], None] | None = None


class Form(Protocol):
    """One way to the loss of each sample."""

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        """Float ``[B]``."""

    def samples(self, own: Any, outputs: Any, batch: Any) -> Samples:
        """With the shares in ``own``, the model's loss for this batch."""

    def probe(self, own: Any, outputs: Any, batch: Any) -> Probe:
        """For a check."""


class Called:
    """Losses that a function of outputs and batch gives.

    Args:
        function: Gives ``[B, ...]``, or several of them as ``model.loss`` does.
        name: Of the function, for messages.
    """

    def __init__(self, function: PerSampleLoss, name: str) -> None:
        self.function, self.name = function, name
        self.plain_mean = False  # whether the model's loss is their mean and terms for the whole batch

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        return torch.stack(self._each(outputs, batch)).sum(dim=0)

    def samples(self, own: Any, outputs: Any, batch: Any) -> Samples:
        each, entries = self._each(outputs, batch), entries_of(own)
        total = torch.stack(each).sum(dim=0)
        if self.plain_mean:
            return Samples(total, [losses / len(losses) for losses in each])
        if len(each) != len(entries):
            return Samples(total, [total * _factor(total, total_of(own))])
        # whatever the mean is taken over (class weights, ignored labels, a scale), it is found anew in every batch
        pairs = zip(each, entries, strict=True)
        return Samples(total, [losses * _factor(losses, in_full(entry.detach()).mean()) for losses, entry in pairs])

    def probe(self, own: Any, outputs: Any, batch: Any) -> Probe:
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

    def _each(self, outputs: Any, batch: Any) -> list[Tensor]:
        found = self.function(outputs, batch)
        try:
            each = entries_of(found)
        except NotReadableError as error:
            raise NotReadableError(f'{self.name} must give a tensor [B, ...], got {type(found).__name__}') from error
        for losses in each:
            if losses.ndim == 0 or len(losses) != len(each[0]):
                raise NotReadableError(f'{self.name} must give a tensor [B, ...], got shape {tuple(losses.shape)}')
        return [per_sample_mean(losses) for losses in each]


def _factor(losses: Tensor, mean: Tensor) -> Tensor:
    """``1 / M``: what the model's own loss divides the sum of this batch's losses by."""
    total = losses.detach().sum()
    return torch.where(total != 0, mean / total, torch.full_like(total, 1 / len(losses)))


def reduction_form(model: ComposerModel, original: Callable[..., Any]) -> Called | None:
    """The loss called with ``reduction='none'``, where it takes one."""
    loss_fn = getattr(model, '_loss_fn', None)
    name = f"{type(model).__name__}.loss with reduction='none'"
    if isinstance(model, ComposerClassifier) and isinstance(loss_fn, nn.Module):
        # a torch.nn loss takes no reduction when it is called, but reads its attribute then
        if not hasattr(loss_fn, 'reduction'):
            return None

        def module_loss(outputs: Any, batch: Any) -> Any:
            reduction, loss_fn.reduction = loss_fn.reduction, 'none'  # type: ignore[assignment]
            try:
                return original(outputs, batch)
            finally:
                loss_fn.reduction = reduction

        return Called(module_loss, name)
    if not _takes_reduction(original) or (isinstance(model, ComposerClassifier) and not _takes_reduction(model._loss_fn)):
        return None
    return Called(lambda outputs, batch: original(outputs, batch, reduction='none'), name)


def _takes_reduction(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == 'reduction' or p.kind is p.VAR_KEYWORD for p in parameters)
