"""Per-token losses of a cross-entropy, and weights for its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from composer_effalgos.plan.outputs import NotReadableError, entries_of, in_full
from composer_effalgos.plan.terms import Term, is_cross_entropy, node_token_losses, read_graph, token_losses, weighing

_FORWARD = (torch.ops.aten.nll_loss_forward.default, torch.ops.aten.nll_loss2d_forward.default)
_CHUNK = 2**24  # log-probabilities per chunk of the entropy computation, to bound the memory


class Tokens:
    """The tokens of a loss that is one cross-entropy plus terms that do not read the outputs.

    The loss is ``sum_t m_t l_t``, where ``l_t`` is the loss of token ``t`` and ``m_t`` its share in the mean. Nothing is assumed about
    shifts, ignored labels or class weights: all of this is read from the graph of the loss.

    Args:
        likelihood: The negative log-likelihood term of the loss's graph.
        smoothing: The terms that label smoothing adds.

    Attributes:
        likelihoods: Negative log-likelihoods, float32 or float64 ``[n]``; 0 if the label is ignored.
        shares: ``m_t``, ``[n]``, normalised to sum to 1; 0 if the label is ignored.
        losses: ``l_t``, ``[n]``: equal to the likelihoods, unless the loss is smoothed or scaled.
    """

    def __init__(self, likelihood: Term, smoothing: list[Term]) -> None:
        self._likelihood, self._smoothing = likelihood, smoothing
        node = likelihood.node
        losses, counted, self._targets = node_token_losses(node)
        counts = counted.to(losses.dtype) if node._saved_weight is None else node._saved_weight[self._targets] * counted
        coefficient = likelihood.coefficient.to(losses.dtype) * counts
        if likelihood.reduction == 'mean':
            coefficient = coefficient / node._saved_total_weight
        self._amounts = coefficient * losses  # contribution of each token to the loss
        for term in smoothing:
            self._amounts = self._amounts + term.coefficient.to(losses.dtype) * term.elements.losses
        self.likelihoods = losses.flatten()
        # clamp: a microbatch may have no label at all
        self.shares = (coefficient / coefficient.sum().clamp(min=torch.finfo(coefficient.dtype).tiny)).flatten()
        self.losses = torch.where(self.shares == 0, 0, self._amounts.flatten() / self.shares)

    @property
    def targets(self) -> Tensor:
        """The labels, int64 ``[n]``; 0 if ignored."""
        return self._targets.flatten()

    def entropies(self) -> Tensor:
        """The entropy of the prediction at each token in nats, float ``[n]``."""
        log_probabilities = self._likelihood.node._saved_self.detach()
        rows = max(1, _CHUNK // max(1, log_probabilities[0].numel()))
        parts = [-(in_full(part).exp() * in_full(part)).sum(dim=1) for part in log_probabilities.split(rows)]
        return torch.cat(parts).flatten()

    def weigh(self, weights: Tensor) -> Tensor:
        """Registers hooks that multiply each token's gradient by its weight.

        Args:
            weights: Float ``[n]``, without a graph.

        Returns:
            The amount that the weights add to the value of the loss: ``sum_t (w_t - 1) m_t l_t``.
        """
        weights = weights.view_as(self._targets)

        def weigh(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
            return tuple(None if gradient is None else gradient * weights.to(gradient.dtype) for gradient in gradients)

        self._likelihood.node.register_hook(weighing(self._targets.unsqueeze(1), weights))
        for term in self._smoothing:
            term.node.register_prehook(weigh)
        return ((weights - 1) * self._amounts).sum()


def read_tokens(own: Any, outputs: Any) -> Tokens:
    """Reads the tokens of a loss from its graph.

    Raises:
        NotReadableError: If it is not one cross-entropy over class indices.
    """
    entries = entries_of(own)
    reading = read_graph(entries[0], outputs) if len(entries) == 1 else None
    if reading is None:
        raise NotReadableError('its graph does not show one cross-entropy over tokens')
    likelihoods = [term for term in reading.terms if is_cross_entropy(term.node)]
    smoothing = [term for term in reading.terms if term.node.name() == 'SumBackward1']
    if len(likelihoods) != 1 or len(likelihoods) + len(smoothing) != len(reading.terms):
        raise NotReadableError(f'its tokens must come from one cross-entropy, but its graph shows {len(reading.terms)} terms')
    return Tokens(likelihoods[0], smoothing)


class NllRecorder(TorchDispatchMode):
    """Records the arguments of every negative log-likelihood that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _FORWARD:
            self.seen.append(args)
        return func(*args, **(kwargs or {}))


def watched_tokens(compute: Callable[[], Any]) -> tuple[Tensor, Tensor]:
    """The tokens of a cross-entropy that is computed without a graph.

    Args:
        compute: Computes it.

    Returns:
        Negative log-likelihoods, float ``[n]``, and labels, int64 ``[n]``, as in :class:`Tokens`.

    Raises:
        NotReadableError: If not exactly one cross-entropy is computed.
    """
    with torch.no_grad(), NllRecorder() as recorder:
        compute()
    if len(recorder.seen) != 1:
        raise NotReadableError(f'it computes {len(recorder.seen)} cross-entropies over tokens, one is needed')
    log_probabilities, target, _, _, ignore_index = recorder.seen[0]
    losses, _, targets = token_losses(log_probabilities, target, ignore_index)
    return losses.flatten(), targets.flatten()
