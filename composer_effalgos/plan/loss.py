"""The weighted loss: the model's own loss per sample, shown to whoever wants it, and averaged with the plan's weights."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from composer.models import ComposerClassifier, ComposerModel, HuggingFaceModel
from torch import Tensor, nn

from composer_effalgos.errors import InputError

PerSampleLoss = Callable[[Any, Any], Tensor]
"""``(outputs, batch) -> losses``: float ``[B, ...]``, reduced to ``[B]`` by the mean over all other dimensions."""


class _Counted(NamedTuple):
    losses: Tensor  # [B]
    counts: Tensor | None  # how much each counts in their mean, [B]; None for the same


def _takes_reduction(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == 'reduction' or p.kind is p.VAR_KEYWORD for p in parameters)


def _find_per_sample(model: ComposerModel, original: Callable[..., Any]) -> Callable[[Any, Any], Any] | None:
    """The per-sample form of a model's loss, where it has one: losses, or losses and how much each counts in their mean."""
    if isinstance(model, HuggingFaceModel):
        return lambda outputs, batch: _huggingface_losses(model, outputs, batch)
    loss_fn = getattr(model, '_loss_fn', None)
    if isinstance(model, ComposerClassifier) and isinstance(loss_fn, nn.Module):
        # a torch.nn loss takes no reduction when it is called, but reads its attribute then
        if not hasattr(loss_fn, 'reduction'):
            return None

        def module_loss(outputs: Any, batch: Any) -> Tensor:
            reduction, loss_fn.reduction = loss_fn.reduction, 'none'  # type: ignore[assignment]
            try:
                return original(outputs, batch)
            finally:
                loss_fn.reduction = reduction

        return module_loss
    if not _takes_reduction(original) or (isinstance(model, ComposerClassifier) and not _takes_reduction(model._loss_fn)):
        return None
    return lambda outputs, batch: original(outputs, batch, reduction='none')


def _huggingface_losses(model: HuggingFaceModel, outputs: Any, batch: Any) -> _Counted:
    """Losses of a Hugging Face model, float32 ``[B]``; of language models the mean over the tokens with a label, and their number."""
    labels = batch.get('labels') if isinstance(batch, Mapping | UserDict) else None
    if not isinstance(labels, Tensor):
        raise InputError(
            f"{type(model).__name__}.loss: the batch has no 'labels'; pass per_sample_loss=callable(outputs, batch) -> [B] to the algorithm"
        )
    logits = (outputs['logits'] if isinstance(outputs, Mapping) else outputs[1]).float()
    if labels.is_floating_point() and labels.shape == logits.shape:  # several labels, or several numbers
        several = getattr(model.config, 'problem_type', None) != 'regression'
        function = nn.functional.binary_cross_entropy_with_logits if several else nn.functional.mse_loss
        return _Counted(function(logits, labels.float(), reduction='none'), None)
    if labels.ndim == 1:  # classification of sequences, or regression with one output
        if logits.shape[-1] == 1:
            return _Counted(nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction='none'), None)
        return _Counted(nn.functional.cross_entropy(logits, labels, reduction='none'), (labels != -100).long())
    if model.shift_labels:  # a causal model's logits at a token are for the next
        logits, labels = logits[:, :-1], labels[:, 1:]
    tokens = (labels != -100).sum(dim=1)
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction='none', ignore_index=-100).view(labels.shape)
    return _Counted(losses.sum(dim=1) / tokens.clamp(min=1), tokens)


def per_sample_mean(losses: Tensor) -> Tensor:
    """Reduces losses to one a sample.

    Args:
        losses: Float ``[B, ...]``.

    Returns:
        Float32 (or float64) ``[B]``: the mean over all but the first dimension.
    """
    losses = losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses
    return losses if losses.ndim == 1 else losses.flatten(1).mean(dim=1)


class WeightedLoss:
    """Stands in for ``model.loss``.

    During a training step it evaluates the loss per sample, shows the losses to its subscribers and returns
    ``mean(weight_i * loss_i)``; everywhere else (evaluation, SelectiveBackprop's look-ahead) it is the model's own loss. The position in
    the batch moves on events, not on calls: MixUp and CutMix call the loss twice for one microbatch, microbatching splits one batch into
    several calls, and a batch may be replayed after an out-of-memory error. Only a microbatch's first call is shown to subscribers.

    Args:
        model: The model whose ``loss`` it replaces.
        per_sample_loss: The caller's per-sample loss; ``None`` to call the model's own with ``reduction='none'``.
        user: The algorithm that takes one, for messages.

    A loss whose mean is not the plain mean of its samples (class weights, ignored labels, tokens, a scale of its own) keeps its own
    normalisation: ``sum(weight_i * loss_i) / M`` with the ``M`` that the model's loss divides by in this batch. Without weights it is the
    model's loss.

    Attributes:
        subscribers: Called as ``subscriber(losses, where, outputs, batch)`` with detached float32 ``[B]`` and the slice of the rank's epoch
            that they fill.
    """

    def __init__(self, model: ComposerModel, per_sample_loss: PerSampleLoss | None = None, *, user: str = 'InfoBatch') -> None:
        self.original: Callable[..., Any] = model.loss
        self._model = model
        self._logger: Any = None  # each Trainer gives the model its own: whose training step the window is of
        self._way_out = f'pass {user}(per_sample_loss=callable(outputs, batch) -> [B])'
        self._given = per_sample_loss
        self._found = _find_per_sample(model, self.original)
        self.subscribers: list[Callable[[Tensor, slice, Any, Any], None]] = []
        self._weights: Tensor | None = None
        self._window: slice | None = None  # the batch's place in the rank's epoch, while it is trained on
        self._position = self._next_position = 0
        self._first_call = True
        self._verified = False

    @property
    def model_name(self) -> str:
        """The model's class, for messages."""
        return type(self._model).__name__

    def __deepcopy__(self, memo: dict) -> Callable[..., Any]:
        # a copy of the model (SWA, export) gets its plain loss: it has no plan
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.original,)  # a saved model has its plain loss too

    def use(self, per_sample_loss: PerSampleLoss) -> None:
        """Takes the caller's per-sample loss.

        Args:
            per_sample_loss: ``(outputs, batch) -> [B, ...]``.
        """
        self._given = per_sample_loss

    def require_per_sample(self, why: str) -> None:
        """Refuses a model whose loss has no per-sample form.

        Args:
            why: Who needs it.

        Raises:
            InputError: Naming the model and the way out.
        """
        if self._given is None and self._found is None:
            raise InputError(f"{why}: {self.model_name}.loss has no per-sample form (it takes no reduction='none'); {self._way_out}")

    def per_sample(self, outputs: Any, batch: Any) -> Tensor:
        """The loss of each sample.

        Args:
            outputs: The model's outputs.
            batch: The batch.

        Returns:
            Float ``[B]``.

        Raises:
            InputError: Where the loss gives something else.
        """
        return self._evaluate(outputs, batch)[0]

    def _evaluate(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Losses ``[B]``, and how much each counts in their mean, ``[B]`` or ``None`` for the same."""
        function = self._given or self._found
        assert function is not None, 'require_per_sample comes first'
        losses = function(outputs, batch)
        losses, counts = losses if isinstance(losses, _Counted) else (losses, None)
        if not isinstance(losses, Tensor) or losses.ndim == 0:
            got = f'shape {tuple(losses.shape)}' if isinstance(losses, Tensor) else type(losses).__name__
            if self._given is not None:
                raise InputError(f'per_sample_loss: must give a tensor [B, ...], got {got}')
            raise InputError(f'{self.model_name}.loss: the per-sample loss must be a tensor [B, ...], got {got}; {self._way_out}')
        return per_sample_mean(losses), counts

    def start_epoch(self, weights: Tensor | None) -> None:
        """Takes the weights of the epoch.

        Args:
            weights: Float32 ``[m]`` on the training device, in the rank's order; ``None`` for ones.
        """
        self._weights = weights

    def start_batch(self, window: slice) -> None:
        """Before a batch is trained on, or replayed.

        Args:
            window: The batch's place in the rank's epoch.
        """
        self._window, self._position, self._first_call = window, 0, True
        self._logger = getattr(self._model, 'logger', None)

    def end_microbatch(self) -> None:
        """After a microbatch's backward pass."""
        self._position, self._first_call = self._next_position, True

    def end_batch(self) -> None:
        """After a batch's last backward pass.

        Raises:
            InputError: Where the batch held other samples than planned.
        """
        window, self._window = self._window, None
        if window is not None and self._active and self._position != window.stop - window.start:
            self._wrong_size(self._position, window)

    @property
    def _active(self) -> bool:
        return bool(self.subscribers) or self._weights is not None

    def _wrong_size(self, seen: int, window: slice) -> None:
        raise InputError(
            f'train_dataloader: the plan says {window.stop - window.start} samples in this batch, the loss saw {seen}; another algorithm, '
            'collate_fn or per_sample_loss adds or drops samples, so positions no longer name them'
        )

    def __call__(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        # a run that broke off within a batch leaves its window behind, and another Trainer may go on with the model
        if self._window is None or not self._active or getattr(self._model, 'logger', None) is not self._logger:
            return self.original(outputs, batch, *args, **kwargs)
        losses, counts = self._evaluate(outputs, batch)
        if not self._verified:
            if self._given is None:
                self._verify(losses, counts, outputs, batch)
            else:
                self._compare(losses, outputs, batch)
        start = self._window.start + self._position
        where = slice(start, start + len(losses))
        if where.stop > self._window.stop:
            self._wrong_size(self._position + len(losses), self._window)
        self._next_position = self._position + len(losses)
        if self._first_call:
            self._first_call = False
            for subscriber in self.subscribers:
                subscriber(losses.detach().float(), where, outputs, batch)
        weighted = losses if self._weights is None else losses * self._weights[where]
        if counts is not None:
            return (weighted * counts).sum() / counts.sum().clamp(min=1)
        if self._given is None:
            # in every batch: whether the plain mean would do (no class weights, no ignored labels) can change from batch to batch
            with torch.no_grad():
                reference = self.original(outputs, batch)
            return weighted.sum() * self._mean_factor(losses, reference)
        return weighted.mean()

    @staticmethod
    def _mean_factor(losses: Tensor, reference: Tensor) -> Tensor:
        """``1 / M``: what the model's own loss divides the sum of this batch's losses by."""
        total = losses.detach().sum()
        return torch.where(total != 0, reference.detach().float().reshape(()) / total, torch.full_like(total, 1 / len(losses)))

    def _compare(self, losses: Tensor, outputs: Any, batch: Any) -> None:
        """On the first batch: says so where the caller's per-sample loss is not the model's own, which it replaces."""
        self._verified = True
        try:
            with torch.no_grad():
                reference = self.original(outputs, batch)
        except Exception:  # it is not called otherwise, and may be the reason why the caller brought another
            return
        mean = losses.detach().mean()
        if isinstance(reference, Tensor) and reference.numel() == 1 and not _close(mean, reference.reshape(()).to(mean)):
            warnings.warn(
                f'per_sample_loss: averages to {mean.item():.6g} over the first batch, where {self.model_name}.loss gives '
                f'{reference.item():.6g}; the run trains on per_sample_loss',
                stacklevel=2,
            )

    def _verify(self, losses: Tensor, counts: Tensor | None, outputs: Any, batch: Any) -> None:
        """On the first finite batch: without weights the per-sample losses must give the gradient that the model trains with."""
        reference = self.original(outputs, batch)
        if not isinstance(reference, Tensor) or reference.numel() != 1:
            got = f'shape {tuple(reference.shape)}' if isinstance(reference, Tensor) else type(reference).__name__
            raise InputError(f'{self.model_name}.loss: must return one number, got {got}; {self._way_out}')
        value = reference.float().reshape(())
        mean = losses.mean() if counts is None else (losses * counts).sum() / counts.sum().clamp(min=1)
        if not torch.isfinite(value) or not torch.isfinite(mean):
            return
        self._verified = True
        if isinstance(outputs, Tensor) and outputs.requires_grad and counts is None:
            ours = losses.sum() * self._mean_factor(losses, reference)
            agree = _close(*(torch.autograd.grad(loss, outputs, retain_graph=True)[0] for loss in (ours, value)))
        else:
            agree = _close(mean.detach(), value.detach())
        if not agree:
            raise InputError(
                f'{self.model_name}.loss: its per-sample form averages to {mean.item():.6g}, but it returns {value.item():.6g} with '
                f'another gradient; {self._way_out}'
            )


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).float().norm() <= 1e-2 * theirs.float().norm() + 1e-6)


def _itself(loss: Any) -> Any:
    return loss
