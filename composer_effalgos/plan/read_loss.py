"""Per-sample losses, read from the autograd graph of the model's own loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from composer_effalgos.plan.graph import pull
from composer_effalgos.plan.known_losses import formulas
from composer_effalgos.plan.outputs import NotReadableError, entries_of, is_near, positions_of, tensors_of, total_of
from composer_effalgos.plan.part import alike, computed_before, evaluated, part_of, take_part
from composer_effalgos.plan.per_sample import SampleLosses
from composer_effalgos.plan.probe import Probe
from composer_effalgos.plan.terms import (
    NORMALISATIONS,
    GraphReading,
    Rows,
    is_apart,
    is_cross_entropy,
    node_token_losses,
    of_term,
    read_graph,
    weighing,
)
from composer_effalgos.plan.watch import Reduced, ReductionRecorder


class ReadFromGraph:
    """Per-sample losses read from the graph of the model's own loss.

    The tensors that a cross-entropy saved for the backward pass contain the loss of each token. The nodes also record shifts, ignored
    labels, class weights and smoothing, so nothing is assumed about them; no logits are copied, and no softmax is recomputed. Any other
    loss is watched while it is computed: the input of its last mean or sum contains the losses of the samples. If there is no graph to read
    (a compiled model), the usual formulas are tried until one gives the same value.

    The loss of a sample must be that of the sample alone, so the normalisation must be known: the mean is over the elements of all samples
    (``'weighted'``), over the samples (``'averaged'``), or there is none (``'summed'``: a sum, possibly divided by a constant). Evaluating
    a part of the batch shows which of them applies.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self._formula: int | None = None
        self._normalisation = NORMALISATIONS[0]
        self._watching = True  # until a check shows that the graph alone is sufficient
        self._seen: dict[Any, Reduced] = {}
        self._was_read = False  # whether the graph of some batch could be read

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        if not self._watching:
            return self.original(*args, **kwargs)
        with ReductionRecorder() as recorder:
            own = self.original(*args, **kwargs)
        self._seen = recorder.seen
        return own

    def forget(self) -> None:
        self._seen = {}

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        found = self.samples(self.evaluate(outputs, batch), outputs, batch).losses
        self.forget()
        return found

    def samples(self, own: Any, outputs: Any, batch: Any) -> SampleLosses:
        readings = self._readings(own, outputs)
        if not readings:
            return _combined([self._nothing(own, outputs) or self._by_formula(own, outputs, batch)])
        self._was_read = True
        return self._samples(readings, self._normalisation)

    def _samples(self, readings: Sequence[GraphReading | None], normalisation: str) -> SampleLosses:
        nodes = [(term.node, reading.rows) for reading in readings if reading for term in reading.terms]
        each = [_summed([of_term(term, r.rows, normalisation) for term in r.terms]) if r else None for r in readings]
        plain, nothing = all(is_cross_entropy(node) for node, _ in nodes), torch.zeros_like(next(pair for pair in each if pair)[0])
        return _combined([pair or (nothing, nothing) for pair in each])._replace(weigh=functools.partial(_weigh, nodes) if plain else None)

    def _readings(self, own: Any, outputs: Any) -> list[GraphReading | None]:
        """A reading per loss, ``None`` for a loss that does not depend on the outputs; empty if nothing can be read."""
        entries = entries_of(own)
        readings = [self._reading(entry, outputs) for entry in entries]
        unread = [entry for entry, reading in zip(entries, readings, strict=True) if reading is None and not is_apart(entry, outputs)]
        return [] if unread or not any(readings) else readings

    def _reading(self, entry: Tensor, outputs: Any) -> GraphReading | None:
        try:
            reading = read_graph(entry, outputs)
        except NotReadableError:
            if not self._seen:
                raise
            reading = None
        return reading or read_graph(entry, outputs, self._seen)

    def probe(self, own: Any, outputs: Any, batch: Any) -> Probe:
        readings = [reading for reading in self._readings(own, outputs) if reading]
        with torch.enable_grad():
            shares = torch.stack(self.samples(own, outputs, batch).shares).sum(dim=0)
        if not readings:
            return Probe(shares, lambda result: {}, False)
        self._watching = any(reading.watched for reading in readings)
        positions = {edge: position for edge, position in positions_of(outputs).items() if any(edge in r.read for r in readings)}

        def slopes(result: Tensor) -> dict[int, Tensor]:
            return {positions[edge]: gradient for edge, gradient in pull(result, positions).items()}

        return Probe(shares, slopes, any(r.reads_parameters for r in readings))

    def depends_on_others(self, own: Any, outputs: Any, batch: Any) -> bool:
        readings = self._readings(own, outputs)
        if not readings or computed_before(own, outputs):
            return False
        whole = {name: self._samples(readings, name).losses.detach() for name in NORMALISATIONS}
        rows = part_of(whole[self._normalisation])
        if rows is None:
            return False
        part, part_batch = take_part(outputs, batch, rows, len(whole[self._normalisation]))
        seen = self._seen
        try:
            part_own = evaluated(self.evaluate, part, part_batch)
            found = self._readings(part_own, part)
        finally:
            self._seen = seen
        if computed_before(part_own, part):  # the loss comes from the forward pass and was stored
            return False
        for name in NORMALISATIONS:
            if found and alike(self._samples(found, name).losses.detach(), whole[name][rows], tensors_of(part)[0]):
                self._normalisation = name
                return False
        return True

    def _nothing(self, own: Any, outputs: Any) -> tuple[Tensor, Tensor] | None:
        """Zeros for a batch without a target, in which a loss often returns ``0 * outputs.sum()``; ``None`` for any other."""
        if not self._was_read or (total := total_of(own)) != 0:
            return None
        zeros = total.new_zeros(len(tensors_of(outputs)[0]))
        return zeros, zeros

    def _by_formula(self, own: Any, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        candidates = formulas(outputs, batch)
        if self._formula is None:
            target = total_of(own)
            for number, candidate in enumerate(candidates):
                try:
                    with torch.no_grad():
                        _, shares = candidate()
                except (IndexError, RuntimeError):  # labels that this formula has no place for
                    continue
                if is_near(shares.sum(), target, tensors_of(outputs)[0]):
                    self._formula = number
                    break
            else:
                raise NotReadableError(
                    "it takes no reduction='none', and neither its graph nor the usual formulas show the samples' losses"
                )
        return candidates[self._formula]()


def _combined(each: Sequence[tuple[Tensor, Tensor]]) -> SampleLosses:
    return SampleLosses(torch.stack([losses for losses, _ in each]).sum(dim=0), [shares for _, shares in each])


def _weigh(nodes: Sequence[tuple[Any, Rows]], weights: Tensor, done: set[Any]) -> None:
    """Weights plain cross-entropies at the start of their backward pass: one factor per token instead of all logits' gradients."""
    for node, rows in nodes:
        if node in done:
            continue
        done.add(node)
        *_, target = node_token_losses(node)
        node.register_hook(weighing(target.unsqueeze(1), rows.spread(weights, target)))


def _summed(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    losses, shares = zip(*pairs, strict=True)
    return torch.stack(losses).sum(dim=0), torch.stack(shares).sum(dim=0)
