"""The weighted loss: the model's own loss, with the gradient of each sample multiplied by its weight in the plan."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from composer.models import ComposerModel
from torch import Tensor

from composer_effalgos.plan.graph import OpaqueGraphError, are_nested, edge_of
from composer_effalgos.plan.order import is_due
from composer_effalgos.plan.outputs import NotReadableError, is_near, num_rows, same_structure, tensors_of, total_of, with_added
from composer_effalgos.plan.per_sample import Called, PerSampleLoss, SampleLosses, reduction_form
from composer_effalgos.plan.probe import Comparison, Probe, compare_gradients
from composer_effalgos.plan.read_loss import ReadFromGraph
from composer_effalgos.plan.side_effects import RANDOM, undo_side_effects
from composer_effalgos.plan.token_loss import read_tokens
from composer_effalgos.utils.errors import InputError


class Weigher(Protocol):
    """Computes weights for the samples or tokens of a microbatch from their losses."""

    by_token: ClassVar[bool]

    def begun(self) -> bool:
        """Whether weights apply now; False during a burn-in."""

    def weigh(self, losses: Any, batch: Any) -> Tensor:
        """Float ``[B]`` for losses ``[B]``, or ``[n]`` for :class:`~composer_effalgos.plan.token_loss.Tokens`."""


class WeightedLoss:
    """Replaces ``model.loss``.

    The model's own loss is evaluated once, with its graph. If the epoch has no weights, its result is returned unchanged. If all weights
    are 1, value and gradient are bitwise equal to the original.

    If the loss is ``sum(c_i l_i) / M`` plus terms that do not read the outputs, the weighted loss is ``sum(w_i c_i l_i) / M`` plus these
    terms. Its gradient at the outputs is that of the original loss, with the rows of sample i multiplied by ``w_i``. A hook on the outputs
    does this (for a plain cross-entropy, a hook on the log-probabilities of the targets, which costs next to nothing). The returned value
    is the original one plus ``sum((w_i - 1) c_i l_i) / M``, detached from the graph. The model's normalisation ``M`` (class weights,
    ignored labels, tokens) is kept, and terms for the whole batch (the router loss of a mixture of experts) are not weighted.

    This form is verified in the first batch and in every batch whose number is a power of two: the loss of each sample must depend only on
    the sample's own rows, and its gradient there must have the direction of the original loss's gradient. If the graph of the original loss
    does not pass through the outputs (a compiled model), or if the caller's per-sample loss is not the model's, the correction
    ``sum((w_i - 1) c_i l_i) / M`` carries the gradient instead.

    Outside training steps (evaluation, SelectiveBackprop's look-ahead) the original loss is called. The position in the batch advances on
    events, not on calls: MixUp and CutMix call the loss twice for one microbatch, microbatching splits one batch into several calls, and a
    batch may be replayed after an out-of-memory error. Subscribers are notified only of the first call for a microbatch.

    Args:
        model: The model whose ``loss`` it replaces.
        per_sample_loss: The caller's per-sample loss; ``None`` for the model's own, computed with ``reduction='none'`` or read from its
            graph.
        user: The algorithm with the argument ``per_sample_loss``, for messages.

    Attributes:
        subscribers: Called as ``subscriber(losses, where, outputs, batch)`` with detached float32 ``[B]`` and their slice of the rank's
            epoch.
        weigher: Weights each microbatch by its own losses, in addition to the epoch's weights; ``None`` for no such weights.
        check_due: Whether the next loss of a training step is checked, which synchronises with the device.
    """

    def __init__(self, model: ComposerModel, per_sample_loss: PerSampleLoss | None = None, *, user: str = 'InfoBatch') -> None:
        self.original: Callable[..., Any] = model.loss
        self._model, self._name = model, type(model).__name__
        self._logger: Any = None  # each Trainer sets its own on the model: identifies the Trainer that opened the window
        self._user = user
        self._given = False
        self._form: Called | ReadFromGraph = reduction_form(model, self.original) or ReadFromGraph(self.original)
        self.subscribers: list[Callable[[Tensor, slice, Any, Any], None]] = []
        self.weigher: Weigher | None = None
        self._weights: Tensor | None = None
        self._window: slice | None = None  # position of the current batch in the rank's epoch; None outside training steps
        self._position = self._next_position = 0
        self._first_call, self._rows = True, 0  # rows of the outputs in the first call for a microbatch
        self._awaited = self._inside = False  # whether the next call is of the training step; whether one is being computed
        self._batches = 0  # started in this fit
        self.check_due = True
        self._read: list[int] | None = None  # positions of the outputs whose gradients are weighted; None if a correction is added instead
        self._settled = self._parted = False  # whether the form is final, and whether it was tested on a part of a batch
        self._checked = self._foreign = False  # foreign: the caller's per-sample loss differs from the model's
        self._hooked: set[Any] = set()  # nodes that already have a hook in this microbatch
        if per_sample_loss is not None:
            self.use(per_sample_loss)

    def __deepcopy__(self, memo: dict) -> Callable[..., Any]:
        # a copy of the model (SWA, export) has no plan, so it gets the original loss
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.original,)  # a pickled model gets the original loss too

    def use(self, per_sample_loss: PerSampleLoss) -> None:
        """Sets the caller's per-sample loss.

        Args:
            per_sample_loss: ``(outputs, batch) -> [B, ...]``.
        """
        self._form, self._given = Called(per_sample_loss, 'per_sample_loss', self.original, given=True), True

    def begin_fit(self) -> None:
        """Schedules a check of the first batch; called before each fit."""
        self._batches, self.check_due = 0, True

    def per_sample(self, outputs: Any, batch: Any) -> Tensor:
        """The loss of each sample, float ``[B]``, differentiable; inside or outside a training step.

        Raises:
            InputError: If the loss has no per-sample form.
        """
        self._settle(outputs, batch)
        if not self._parted and not self._given:  # outside training steps this is the only check
            self._parted = True
            if dependent := self._why_dependent(self._form.evaluate(outputs, batch), outputs, batch):
                self._refuse(dependent)
        return self._refusing(self._form.losses, outputs, batch)

    def _settle(self, outputs: Any, batch: Any) -> None:
        """Checks once whether ``reduction='none'`` works and whether the loss can be computed twice per batch without side effects."""
        if not self._settled and not self._given and isinstance(self._form, Called):
            with undo_side_effects(self._model) as changed:
                ignores = self._form.ignores_reduction(outputs, batch)
            if ignores or changed:
                self._form = ReadFromGraph(self.original)
        self._settled = True

    def start_epoch(self, weights: Tensor | None) -> None:
        """Sets the weights of the epoch.

        Args:
            weights: Float32 ``[m]`` on the training device, in the rank's order; ``None`` for ones.
        """
        self._weights = weights

    def start_batch(self, window: slice) -> None:
        """Called before a batch is trained on or replayed.

        Args:
            window: The batch's position in the rank's epoch.
        """
        self._window, self._position, self._first_call, self._awaited = window, 0, True, False
        self._hooked.clear()
        self._logger = getattr(self._model, 'logger', None)
        self._batches += 1
        self.check_due |= is_due(self._batches)

    def start_microbatch(self) -> None:
        """Called before the loss of a microbatch is computed. Calls before it, as in ``forward()`` or a callback, get the original loss."""
        self._awaited = True

    def end_microbatch(self) -> None:
        """Called after the backward pass of a microbatch."""
        self._awaited = False
        self._position, self._first_call = self._next_position, True
        self._hooked.clear()
        self._form.forget()

    def end_batch(self) -> None:
        """Called after the last backward pass of a batch.

        Raises:
            InputError: If the number of samples in the batch was not the planned one.
        """
        window, self._window = self._window, None
        if window is not None and self._by_position and self._position != window.stop - window.start:
            self._wrong_size(self._position, window)

    @property
    def _by_position(self) -> bool:
        return bool(self.subscribers) or self._weights is not None

    @property
    def _active(self) -> bool:
        # report a loss that cannot be weighted in the first batch, not only at the end of a burn-in
        return self._by_position or (self.weigher is not None and (self.check_due or self.weigher.begun()))

    def _wrong_size(self, seen: int, window: slice) -> None:
        raise InputError(
            f'train_dataloader: the plan says {window.stop - window.start} samples in this batch, the loss saw {seen}; another algorithm, '
            'collate_fn or per_sample_loss adds or drops samples, so positions no longer name them'
        )

    def _refusing(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except NotReadableError as error:
            self._refuse(str(error))

    def _refuse(self, reason: str) -> None:
        if self._given:
            raise InputError(f'per_sample_loss: {reason.removeprefix("per_sample_loss ")}')
        if self.weigher is not None and self.weigher.by_token:
            raise InputError(
                f'{self._name}.loss: {reason}; use torch.nn.functional.cross_entropy of all tokens, in a loss() that is not compiled'
            )
        raise InputError(f'{self._name}.loss: {reason}; pass {self._user}(per_sample_loss=callable(outputs, batch) -> [B])')

    def __call__(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self._inside or not self._is_of_training_step(outputs):
            return self.original(outputs, batch, *args, **kwargs)
        self._inside = True  # a loss() may call itself for its parts
        try:
            return self._weighted(outputs, batch, *args, **kwargs)
        finally:
            self._inside = False

    def _is_of_training_step(self, outputs: Any) -> bool:
        """Whether a call computes the loss that is trained on; a callback may call it too, on a part of the batch or without a graph."""
        # A run that failed within a batch leaves its window open, and another Trainer may reuse the model.
        if self._window is None or not self._active or getattr(self._model, 'logger', None) is not self._logger:
            return False
        if not self._awaited or not torch.is_grad_enabled():
            return False
        rows = num_rows(outputs)
        if self._first_call:
            self._rows = rows
        return rows == self._rows

    def _weighted(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        assert self._window is not None
        if self.weigher is not None and not self._first_call:
            raise InputError(
                f'algorithms: {type(self.weigher).__name__} cannot be combined with a second loss for the same microbatch, as in MixUp and '
                'CutMix with interpolate_loss=True; set it to False'
            )
        if self.weigher is not None and self.weigher.by_token:
            return self._weigh_tokens(self.weigher, self.original(outputs, batch, *args, **kwargs), outputs, batch)
        given_outputs, given_batch = outputs, batch
        outputs, batch = same_structure(outputs), same_structure(batch)  # copies of the containers: a loss may pop from its arguments
        self._settle(outputs, batch)
        own = self._form.evaluate(given_outputs, given_batch, *args, **kwargs)
        samples = self._read_samples(own, outputs, batch)
        start = self._window.start + self._position
        where = slice(start, start + len(samples.losses))
        if where.stop > self._window.stop and self._by_position:
            self._wrong_size(self._position + len(samples.losses), self._window)
        if self.check_due:
            self._check(own, outputs, batch)
            samples = self._read_samples(own, outputs, batch)  # the check may have determined another normalisation
        losses, shares = samples.losses, samples.shares
        self._next_position = self._position + len(losses)
        if self._first_call:
            self._first_call = False
            for subscriber in self.subscribers:
                subscriber(losses.detach().float(), where, outputs, batch)
        weights = None if self._weights is None else self._weights[where]
        if self.weigher is not None and self.weigher.begun():
            factors = self.weigher.weigh(losses, batch)
            weights = factors if weights is None else weights * factors
        if weights is None or not self._checked:  # unchecked: no loss has been finite yet
            return own
        if self._read is None:
            shares = self._corrections(own, outputs, batch)
        elif samples.weigh is not None:
            samples.weigh(weights, self._hooked)
        else:
            self._weigh_gradients(outputs, weights)
        return with_added(own, [((weights - 1) * share).sum() for share in shares])

    def _read_samples(self, own: Any, outputs: Any, batch: Any) -> SampleLosses:
        with torch.no_grad():
            return self._refusing(self._form.samples, own, outputs, batch)

    def _weigh_tokens(self, weigher: Weigher, own: Any, outputs: Any, batch: Any) -> Any:
        """The loss with a weight per token. It needs no check: the graph shows that it is linear in the token losses."""
        self._first_call = self.check_due = False
        with torch.no_grad():
            tokens = self._refusing(read_tokens, own, outputs)
            added = tokens.weigh(weigher.weigh(tokens, batch)) if weigher.begun() else None
        return own if added is None else with_added(own, [added])

    def _weigh_gradients(self, outputs: Any, weights: Tensor) -> None:
        """Registers hooks that multiply each sample's gradient at the outputs, once per microbatch."""
        tensors = tensors_of(outputs)
        for position in self._read or ():
            node, number = edge_of(tensors[position])
            if (node, number) in self._hooked:
                continue
            self._hooked.add((node, number))

            def weigh(gradients: tuple[Tensor | None, ...], number: int = number) -> tuple[Tensor | None, ...]:
                gradient = gradients[number]
                if gradient is None:
                    return gradients
                weighted = (gradient * weights.view(-1, *(1 for _ in gradient.shape[1:]))).to(gradient.dtype)
                return (*gradients[:number], weighted, *gradients[number + 1 :])

            node.register_prehook(weigh)

    def _corrections(self, own: Any, outputs: Any, batch: Any) -> list[Tensor]:
        """Shares of the samples with their graph; for a loss that is not the model's own, the shares in its plain mean."""
        if self._foreign:
            losses = self._form.losses(outputs, batch)
            return [losses / len(losses)]
        return self._form.samples(own, outputs, batch).shares

    # ------------------------------------------------------------------ the check

    def _why_dependent(self, own: Any, outputs: Any, batch: Any) -> str:
        """The reason why the losses of samples depend on the rest of the batch; empty if they do not."""
        with undo_side_effects(self._model):
            dependent = self._refusing(self._form.depends_on_others, own, outputs, batch)
        if not dependent:
            return ''
        with undo_side_effects(self._model) as changed, torch.no_grad():
            again = total_of(self.original(same_structure(outputs), same_structure(batch)))
        if RANDOM in changed or not is_near(again, total_of(own).detach(), tensors_of(outputs)[0]):
            return 'it gives a different value each time it is computed (it draws random numbers, or keeps a state)'
        return (
            'the losses of its samples depend on the rest of the batch (a mask or a mean over it; or the outputs do not have the samples '
            'along their first dimension)'
        )

    def _check(self, own: Any, outputs: Any, batch: Any) -> None:
        """Compares the per-sample losses with the model's own loss and decides how the weights are applied."""
        dependent = self._why_dependent(own, outputs, batch)  # must come first: it sets the normalisation of the losses
        probe: Probe = self._refusing(self._form.probe, own, outputs, batch)
        total = total_of(own)
        if not probe.shares.requires_grad and total == 0:
            return  # a batch without a target
        if not probe.shares.requires_grad:
            self._refuse('its losses do not depend on the outputs, so weights would have no effect')
        if not torch.isfinite(total) or not torch.isfinite(probe.shares.detach().sum()):
            return
        try:
            compared = compare_gradients(probe, own, outputs, by_direction=self._given)
        except OpaqueGraphError:
            compared = Comparison([])
        if compared is None:
            return
        difference, estimate = compared.difference, probe.shares.detach().sum()
        near = is_near(estimate, total, next(iter(tensors_of(outputs)), total))
        if difference is None and not compared.read and not near:
            difference = f'have mean {estimate.item():.6g}, {self._name}.loss returns {total.item():.6g}'
        if difference is not None and not self._given:
            self._refuse(f'its per-sample losses {difference}')
        if difference is not None and not self._foreign:
            warnings.warn(
                f'per_sample_loss: its losses {difference}; training uses {self._name}.loss plus mean((weight - 1) * per_sample_loss)',
                stacklevel=2,
            )
        if dependent:
            self._refuse(dependent)
        self._foreign = difference is not None
        if isinstance(self._form, Called):
            self._form.plain_mean = compared.plain and not near
        by_gradient = bool(compared.read) and not self._foreign and not probe.reads_parameters
        # The gradient at an output would arrive, already weighted, at the output that it was computed from
        by_gradient = by_gradient and not are_nested({edge_of(tensors_of(outputs)[position]) for position in compared.read})
        self._read, self._checked, self.check_due = (compared.read if by_gradient else None), True, False


def _itself(loss: Any) -> Any:
    return loss
