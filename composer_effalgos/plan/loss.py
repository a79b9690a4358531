"""The weighted loss: the model's own, with each sample's gradient multiplied by its weight in the plan."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from composer.models import ComposerModel
from torch import Tensor

from composer_effalgos.plan.graph import OpaqueGraphError, edge_of
from composer_effalgos.plan.order import is_due
from composer_effalgos.plan.outputs import NotReadableError, is_near, same_structure, tensors_of, total_of, with_added
from composer_effalgos.plan.per_sample import Called, Form, PerSampleLoss, Samples, per_sample_mean, reduction_form
from composer_effalgos.plan.probe import Comparison, Probe, compare_gradients
from composer_effalgos.plan.read_loss import ReadFromGraph
from composer_effalgos.plan.repeated import repeated
from composer_effalgos.plan.token_loss import read_tokens
from composer_effalgos.utils.errors import InputError

__all__ = ['PerSampleLoss', 'Weigher', 'WeightedLoss', 'per_sample_mean']


class Weigher(Protocol):
    """Weighs the samples or tokens of a microbatch by their losses."""

    by_token: ClassVar[bool]

    def begun(self) -> bool:
        """Whether there are weights now."""

    def weigh(self, losses: Any, batch: Any) -> Tensor:
        """Float ``[B]`` for losses ``[B]``, or ``[n]`` for :class:`~composer_effalgos.plan.token_loss.Tokens`."""


class WeightedLoss:
    """Stands in for ``model.loss``.

    The model's own loss stays the loss: it is evaluated once, with its graph, and where the epoch has no weights what it returned is
    returned untouched. Where all weights are 1 the value and the gradient are its own bit for bit.

    A loss that is ``sum(c_i l_i) / M`` plus terms that do not read the outputs has ``sum(w_i c_i l_i) / M`` weighted: its gradient at
    the outputs is the loss's own with the rows of sample i multiplied by ``w_i``. A hook on the outputs does that (for a plain cross-
    entropy a hook on the targets' log-probabilities, which costs next to nothing), and the value returned is the own one plus
    ``sum((w_i - 1) c_i l_i) / M`` without a gradient. The model's own normalisation ``M`` (class weights, ignored labels, tokens) is
    kept, and terms for the whole batch (the router loss of a mixture of experts) stay unweighted.

    That is checked in the first batch and in each whose number is a power of two: each sample's loss must depend on its own rows alone and
    have the direction of the own loss's gradient there. Where the own loss's graph does not pass through the outputs (a compiled model),
    and for a caller's per-sample loss that is not the model's, the correction ``sum((w_i - 1) c_i l_i) / M`` carries the gradient instead.

    Outside training steps (evaluation, SelectiveBackprop's look-ahead) it is the model's own loss. The position in the batch moves on
    events, not on calls: MixUp and CutMix call the loss twice for one microbatch, microbatching splits one batch into several calls, and a
    batch may be replayed after an out-of-memory error. Only a microbatch's first call is shown to subscribers.

    Args:
        model: The model whose ``loss`` it replaces.
        per_sample_loss: The caller's per-sample loss; ``None`` for the model's own, by ``reduction='none'`` or from its graph.
        user: The algorithm that takes one, for messages.

    Attributes:
        subscribers: Called as ``subscriber(losses, where, outputs, batch)`` with detached float32 ``[B]`` and the slice of the rank's epoch
            that they fill.
        weigher: Weighs each microbatch by its own losses, on top of the epoch's weights; ``None`` for no such weights.
    """

    def __init__(self, model: ComposerModel, per_sample_loss: PerSampleLoss | None = None, *, user: str = 'InfoBatch') -> None:
        self.original: Callable[..., Any] = model.loss
        self._model = model
        self._logger: Any = None  # each Trainer gives the model its own: identifies the Trainer that opened the window
        self._user = user
        self._given = False
        self._form: Form = reduction_form(model, self.original) or ReadFromGraph(self.original)
        self.subscribers: list[Callable[[Tensor, slice, Any, Any], None]] = []
        self.weigher: Weigher | None = None
        self._weights: Tensor | None = None
        self._window: slice | None = None  # the batch's place in the rank's epoch, while it is trained on
        self._position = self._next_position = 0
        self._first_call = True
        self._batches = 0  # begun in this fit
        self._check_due = True
        self._read: list[int] | None = None  # positions of the outputs whose gradients take the weights; None where a correction does
        self._settled = self._parted = False  # whether the form is the one to stay with, and was tried on a part of a batch
        self._checked = self._foreign = False  # foreign: the caller's per-sample loss is not the model's own
        self._hooked: set[Any] = set()  # what takes the weights in this microbatch
        if per_sample_loss is not None:
            self.use(per_sample_loss)

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
        self._form, self._given = Called(per_sample_loss, 'per_sample_loss', self.original, given=True), True

    def begin_fit(self) -> None:
        """Before a fit: its first batch is checked."""
        self._batches, self._check_due = 0, True

    @property
    def check_due(self) -> bool:
        """Whether the next loss of a training step is checked, which waits for the device."""
        return self._check_due

    def per_sample(self, outputs: Any, batch: Any) -> Tensor:
        """The loss of each sample, differentiable; in a training step or outside.

        Args:
            outputs: The model's outputs.
            batch: The batch.

        Returns:
            Float ``[B]``.

        Raises:
            InputError: Where the loss has no per-sample form.
        """
        self._settle(outputs, batch)
        if not self._parted and not self._given:  # outside training there is no other check
            self._parted = True
            if dependent := self._why_dependent(self._form.evaluate(outputs, batch), outputs, batch):
                self._refuse(dependent)
        return self._refusing(self._form.losses, outputs, batch)

    def _settle(self, outputs: Any, batch: Any) -> None:
        """Looks once whether ``reduction`` does what its name says, and whether the loss can be computed twice for each batch."""
        if not self._settled and not self._given and isinstance(self._form, Called):
            with repeated(self._model) as changed:
                ignores = self._form.ignores_reduction(outputs, batch)
            if ignores or changed:
                self._form = ReadFromGraph(self.original)
        self._settled = True

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
        self._hooked.clear()
        self._logger = getattr(self._model, 'logger', None)
        self._batches += 1
        self._check_due |= is_due(self._batches)

    def end_microbatch(self) -> None:
        """After a microbatch's backward pass."""
        self._position, self._first_call = self._next_position, True
        self._hooked.clear()
        self._form.forget()

    def end_batch(self) -> None:
        """After a batch's last backward pass.

        Raises:
            InputError: Where the batch held other samples than planned.
        """
        window, self._window = self._window, None
        if window is not None and self._by_position and self._position != window.stop - window.start:
            self._wrong_size(self._position, window)

    @property
    def _by_position(self) -> bool:
        return bool(self.subscribers) or self._weights is not None

    @property
    def _active(self) -> bool:
        # a loss that cannot be weighed is refused at once, not at the end of a burn-in
        return self._by_position or (self.weigher is not None and (self._check_due or self.weigher.begun()))

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
                f'{self.model_name}.loss: {reason}; take torch.nn.functional.cross_entropy of all tokens, in a loss() that is not compiled'
            )
        raise InputError(f'{self.model_name}.loss: {reason}; pass {self._user}(per_sample_loss=callable(outputs, batch) -> [B])')

    def __call__(self, outputs: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        # a run that broke off within a batch leaves its window behind, and another Trainer may go on with the model
        if self._window is None or not self._active or getattr(self._model, 'logger', None) is not self._logger:
            return self.original(outputs, batch, *args, **kwargs)
        if self.weigher is not None and not self._first_call:
            raise InputError(
                f'algorithms: {type(self.weigher).__name__} cannot be combined with a second loss for the same microbatch, as of MixUp and '
                'CutMix with interpolate_loss=True; leave it False'
            )
        if self.weigher is not None and self.weigher.by_token:
            return self._weigh_tokens(self.weigher, self.original(outputs, batch, *args, **kwargs), outputs, batch)
        given_outputs, given_batch = outputs, batch
        outputs, batch = same_structure(outputs), same_structure(batch)  # a loss may pop from what it is given
        self._settle(outputs, batch)
        own = self._form.evaluate(given_outputs, given_batch, *args, **kwargs)
        samples = self._read_samples(own, outputs, batch)
        start = self._window.start + self._position
        where = slice(start, start + len(samples.losses))
        if where.stop > self._window.stop and self._by_position:
            self._wrong_size(self._position + len(samples.losses), self._window)
        if self._check_due:
            self._check(own, outputs, batch)
            samples = self._read_samples(own, outputs, batch)  # of which the check may have found what their mean is over
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
        if weights is None or not self._checked:  # unchecked: nothing has been finite yet
            return own
        if self._read is None:
            shares = self._corrections(own, outputs, batch)
        elif samples.weigh is not None:
            samples.weigh(weights, self._hooked)
        else:
            self._weigh_gradients(outputs, weights)
        return with_added(own, [((weights - 1) * share).sum() for share in shares])

    def _read_samples(self, own: Any, outputs: Any, batch: Any) -> Samples:
        with torch.no_grad():
            return self._refusing(self._form.samples, own, outputs, batch)

    def _weigh_tokens(self, weigher: Weigher, own: Any, outputs: Any, batch: Any) -> Any:
        """The loss with a weight for each token. What is read from its graph needs no check: it is linear in the tokens' losses."""
        self._first_call = self._check_due = False
        with torch.no_grad():
            tokens = self._refusing(read_tokens, own, outputs)
            added = tokens.weigh(weigher.weigh(tokens, batch)) if weigher.begun() else None
        return own if added is None else with_added(own, [added])

    def _weigh_gradients(self, outputs: Any, weights: Tensor) -> None:
        """Has the backward pass multiply each sample's gradient at the outputs, once a microbatch."""
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
        """Shares of the samples with their graph; of a loss that is not the model's own, those in its plain mean."""
        if self._foreign:
            losses = self._form.losses(outputs, batch)
            return [losses / len(losses)]
        return self._form.samples(own, outputs, batch).shares

    # ------------------------------------------------------------------ the check

    def _why_dependent(self, own: Any, outputs: Any, batch: Any) -> str:
        """Why samples' losses are other ones in another batch; empty where they are not."""
        with repeated(self._model):
            dependent = self._refusing(self._form.depends_on_others, own, outputs, batch)
        if not dependent:
            return ''
        with repeated(self._model) as changed, torch.no_grad():
            again = total_of(self.original(same_structure(outputs), same_structure(batch)))
        if 'random numbers' in changed or not is_near(again, total_of(own).detach(), tensors_of(outputs)[0]):
            return 'it is another number each time it is computed (it draws random numbers, or keeps a state)'
        return (
            "its samples' losses depend on which others are in the batch (a mask or a mean over it; or the outputs do not have the samples "
            'along their first dimension)'
        )

    def _check(self, own: Any, outputs: Any, batch: Any) -> None:
        """Holds the per-sample losses against the model's own loss and decides how the weights enter."""
        dependent = self._why_dependent(own, outputs, batch)  # first: it settles what the losses are
        probe: Probe = self._refusing(self._form.probe, own, outputs, batch)
        total = total_of(own)
        if not probe.shares.requires_grad:
            self._refuse('its losses do not depend on the outputs, so that weights would change nothing')
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
            difference = f'average to {estimate.item():.6g}, where it returns {total.item():.6g}'
        if difference is not None and not self._given:
            self._refuse(f'its per-sample losses {difference}')
        if difference is not None and not self._foreign:
            warnings.warn(
                f"per_sample_loss: its losses {difference} ({self.model_name}.loss); the run trains on the model's own loss plus "
                'mean((weight - 1) * per_sample_loss)',
                stacklevel=2,
            )
        if dependent:
            self._refuse(dependent)
        self._foreign = difference is not None
        if isinstance(self._form, Called):
            self._form.plain_mean = compared.plain and not near
        by_gradient = bool(compared.read) and not self._foreign and not probe.reads_parameters
        self._read, self._checked, self._check_due = (compared.read if by_gradient else None), True, False


def _itself(loss: Any) -> Any:
    return loss
