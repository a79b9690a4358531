"""A model's loss sample by sample, read from the graph of the loss itself."""

from __future__ import annotations

import functools
import re
from collections import UserDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from composer_effalgos.plan.graph import Edge, between, edge_of, inputs_of, pull, walk
from composer_effalgos.plan.outputs import NotReadableError, entries_of, in_full, is_near, tensors_of, total_of
from composer_effalgos.plan.per_sample import Samples, per_sample_mean
from composer_effalgos.plan.probe import Probe


class _Elements(NamedTuple):
    """What a node of the graph took the mean of."""

    losses: Tensor  # of any shape, the samples' dimension first
    counted: Tensor | None  # bool, the same shape; None for all
    total: Tensor | float  # what their mean divides by


def token_losses(log_probabilities: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihoods of what a cross-entropy takes the mean of.

    Args:
        log_probabilities: Float ``[n, C]`` or ``[B, C, ...]``.
        target: Class indices, int64, the same shape without ``C``.
        ignore_index: The index that is left out.

    Returns:
        Losses, float32 or float64, 0 where left out; where they count, bool; and the targets, 0 where left out. All of one shape.
    """
    counted = target != ignore_index
    target = target.masked_fill(~counted, 0)
    return -in_full(log_probabilities.gather(1, target.unsqueeze(1)).squeeze(1)) * counted, counted, target


def node_token_losses(node: Any) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`token_losses` of the node of a cross-entropy."""
    ignored = (node._saved_ignore_index + 2**63) % 2**64 - 2**63  # torch shows it without its sign
    return token_losses(node._saved_self, node._saved_target, ignored)


def _nll(node: Any) -> _Elements:
    losses, counted, target = node_token_losses(node)
    weight = node._saved_weight
    return _Elements(losses if weight is None else losses * weight[target], counted, node._saved_total_weight)


def is_cross_entropy(node: Any) -> bool:
    """Whether a node took the mean of a cross-entropy over class indices."""
    return _READERS.get(node.name()) is _nll


def weighing(target: Tensor, weights: Tensor) -> Callable[..., tuple[Tensor | None, ...]]:
    """A hook that multiplies the gradients of the targets' log-probabilities, the only ones that are not zero."""

    def weigh(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        gradient, *others = gradients
        if gradient is None:
            return gradients
        weighted = (gradient.gather(1, target) * weights.unsqueeze(1)).to(gradient.dtype)
        # the gradient was made by this node for the next one: nobody else has it
        fresh = gradient.scatter(1, target, weighted) if gradient.requires_grad else gradient.scatter_(1, target, weighted)
        return (fresh, *others)

    return weigh


def _elementwise(function: Callable[..., Tensor], *options: str) -> Callable[[Any], _Elements]:
    def read(node: Any) -> _Elements:
        settings = {option: getattr(node, f'_saved_{option}') for option in options}
        losses = in_full(function(node._saved_self, node._saved_target, reduction='none', **settings))
        return _Elements(losses, None, losses.numel())

    return read


_READERS: dict[str, Callable[[Any], _Elements]] = {
    'NllLossBackward0': _nll,
    'NllLoss2DBackward0': _nll,
    'MseLossBackward0': _elementwise(functional.mse_loss),
    'SmoothL1LossBackward0': _elementwise(functional.smooth_l1_loss, 'beta'),
    'HuberLossBackward0': _elementwise(functional.huber_loss, 'delta'),
    'BinaryCrossEntropyBackward0': _elementwise(functional.binary_cross_entropy, 'weight'),
    'BinaryCrossEntropyWithLogitsBackward0': _elementwise(functional.binary_cross_entropy_with_logits, 'weight', 'pos_weight'),
}


_LINEAR = {'Add', 'Alias', 'Cat', 'Clone', 'Expand', 'Index', 'IndexSelect', 'MaskedFill', 'MaskedSelect', 'Mean', 'Neg', 'Permute', 'Rsub'}
_LINEAR |= {'ReshapeAlias', 'Select', 'Slice', 'Squeeze', 'Stack', 'Sub', 'Sum', 'T', 'ToCopy', 'Transpose', 'Unbind', 'UnsafeView'}
_LINEAR |= {'Unsqueeze', 'View', 'Where'}


class Term(NamedTuple):
    """One mean of elements in a loss."""

    node: Any
    elements: _Elements
    coefficient: Tensor  # of the mean in the loss, one number; of each element where the node took no mean
    reduction: str


class GraphReading(NamedTuple):
    """What the graph of one loss shows."""

    terms: list[Term]
    read: list[Edge]  # the outputs that the terms read
    rows: _Rows
    reads_parameters: bool


class ReadFromGraph:
    """Losses read from the nodes of the model's own loss: what its cross-entropy saved for the backward pass holds each token's loss.

    Nothing is assumed about shifts, ignored labels, class weights or smoothing, since the nodes have them; no logits are copied, and no
    softmax is taken again. Where there is no graph to read (a compiled model), the usual formulas are tried until one gives the same value.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self._formula: int | None = None

    def losses(self, outputs: Any, batch: Any) -> Tensor:
        return self.samples(self.original(outputs, batch), outputs, batch).losses

    def samples(self, own: Any, outputs: Any, batch: Any) -> Samples:
        each: list[tuple[Tensor, Tensor]] = []
        nodes: list[tuple[Any, _Rows]] = []
        for entry in entries_of(own):
            reading = read_graph(entry, outputs)
            if reading is None:
                return _samples([self._by_formula(own, outputs, batch)])
            each.append(_summed([_of_term(term, reading.rows) for term in reading.terms]))
            nodes += [(term.node, reading.rows) for term in reading.terms]
        plain = all(is_cross_entropy(node) for node, _ in nodes)
        return _samples(each)._replace(weigh=functools.partial(_weigh, nodes) if plain else None)

    def probe(self, own: Any, outputs: Any, batch: Any) -> Probe:
        readings = [read_graph(entry, outputs) for entry in entries_of(own)]
        with torch.enable_grad():
            shares = torch.stack(self.samples(own, outputs, batch).shares).sum(dim=0)
        if not all(readings):
            return Probe(shares, lambda result: {}, False)
        positions = {edge: position for edge, position in _positions(outputs).items() if any(edge in r.read for r in readings if r)}
        for edge in positions:
            if any(other in positions for _, other in walk(inputs_of(edge[0]), positions).arrivals):
                raise NotReadableError('it reads an output and what that output was computed from')

        def slopes(result: Tensor) -> dict[int, Tensor]:
            return {positions[edge]: gradient for edge, gradient in pull(result, positions).items()}

        return Probe(shares, slopes, any(r.reads_parameters for r in readings if r))

    def _by_formula(self, own: Any, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        candidates = _formulas(outputs, batch)
        if self._formula is None:
            target = total_of(own)
            for number, candidate in enumerate(candidates):
                with torch.no_grad():
                    _, shares = candidate()
                if is_near(shares.sum(), target, tensors_of(outputs)[0]):
                    self._formula = number
                    break
            else:
                raise NotReadableError(
                    "it takes no reduction='none', and neither its graph nor the usual formulas show the samples' losses"
                )
        return candidates[self._formula]()


def _samples(each: Sequence[tuple[Tensor, Tensor]]) -> Samples:
    return Samples(torch.stack([losses for losses, _ in each]).sum(dim=0), [shares for _, shares in each])


def _weigh(nodes: Sequence[tuple[Any, _Rows]], weights: Tensor, done: set[Any]) -> None:
    """Weighs plain cross-entropies where they begin their backward pass: one number a token, in place of all logits' gradients."""
    for node, rows in nodes:
        if node in done:
            continue
        done.add(node)
        *_, target = node_token_losses(node)
        node.register_hook(weighing(target.unsqueeze(1), rows.spread(weights, target)))


def _positions(outputs: Any) -> dict[Edge, int]:
    return {edge_of(tensor): position for position, tensor in enumerate(tensors_of(outputs)) if tensor.requires_grad}


def _is_reader(node: Any) -> bool:
    return node.name() in _READERS


def read_graph(entry: Tensor, outputs: Any) -> GraphReading | None:
    """The terms of a loss; ``None`` where its graph shows none.

    Raises:
        NotReadableError: Where the outputs enter the loss by a way that is not understood.
    """
    if not entry.requires_grad:
        return None
    root, positions = edge_of(entry), _positions(outputs)
    readers = [node for node in walk([root], positions, _is_reader).nodes if _is_reader(node)]
    if not readers:
        return None
    inputs = {inputs_of(node)[0]: node for node in readers}
    # a smoothed cross-entropy sums up the log-probabilities too
    others = walk([root], {*positions, *inputs}, _is_reader).arrivals
    sums = [(node, inputs[edge]) for node, edge in others if edge in inputs and _sums_classes(node)]
    understood = {node for node, _ in sums}
    behind = walk([edge for node in readers for edge in inputs_of(node)], positions)
    read = list(dict.fromkeys(edge for _, edge in behind.arrivals))
    if any(node not in understood and (edge in inputs or edge in read) for node, edge in others):
        raise NotReadableError('a further term in it reads the outputs')
    if not read:
        raise NotReadableError('it does not come from the outputs that the model returns')
    ends = {(node, 0) for node in (*readers, *understood)}
    if not all(_is_linear(node) for node in between(root, ends)):
        raise NotReadableError('it goes from the samples to their loss by more than a weighted mean')
    coefficients = pull(entry, ends)
    terms = [
        Term(node, _READERS[node.name()](node), coefficients[node, 0], ('none', 'mean', 'sum')[node._saved_reduction])
        for node in readers
        if (node, 0) in coefficients
    ]
    terms += [
        Term(node, _Elements(in_full(reader._saved_self).sum(dim=1), None, 1.0), coefficients[node, 0], 'none')
        for node, reader in sums
        if (node, 0) in coefficients
    ]
    reads_parameters = any(hasattr(node, 'variable') for node in behind.nodes)
    return GraphReading(terms, read, _Rows(behind.nodes, read, outputs), reads_parameters)


def _is_linear(node: Any) -> bool:
    """Whether a node adds up, or takes the mean or multiples of, what it is given, so that its gradient does not depend on it."""
    name, given = re.sub(r'Backward\d*$', '', node.name()), [source is not None for source, _ in node.next_functions]
    return name in _LINEAR or (name == 'Mul' and sum(given) == 1) or (name == 'Div' and not any(given[1:]))


def _sums_classes(node: Any) -> bool:
    return node is not None and node.name() == 'SumBackward1' and tuple(node._saved_dim) == (1,) and not node._saved_keepdim


class _Rows:
    """How elements belong to samples: in their order, or as the model indexed its outputs.

    Args:
        nodes: The nodes between outputs and elements.
        read: The outputs that are read.
        outputs: The model's outputs.
    """

    def __init__(self, nodes: Collection[Any], read: Sequence[Edge], outputs: Any) -> None:
        positions, tensors = _positions(outputs), tensors_of(outputs)
        sizes = {len(tensors[positions[edge]]) for edge in read}
        if len(sizes) != 1:
            raise NotReadableError(f'the outputs that it reads have {sorted(sizes)} rows; one a sample is needed')
        (self.samples,) = sizes
        self._indexed = [node for node in nodes if node.name() == 'IndexBackward0' and node._saved_indices[0] is not None]

    def index(self, rows: int) -> Tensor | None:
        """The sample of each row of elements, int64 ``[rows]``; ``None`` where they follow one another, each with as many."""
        for node in self._indexed:
            index = node._saved_indices[0]
            index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.flatten()
            if len(index) == rows:
                return index * self.samples // node._saved_self_sym_sizes[0]
        if rows % self.samples:
            raise NotReadableError(f'it is a mean over {rows} rows of {self.samples} samples')
        return None

    def sums(self, elements: Tensor) -> Tensor:
        """Elements summed per sample, ``[B]``."""
        index = self.index(len(elements))
        if index is None:
            return elements.reshape(self.samples, -1).sum(dim=1)
        return elements.new_zeros(self.samples).index_add(0, index, elements.reshape(len(elements), -1).sum(dim=1))

    def spread(self, weights: Tensor, like: Tensor) -> Tensor:
        """Weights of samples ``[B]`` as weights of rows, shaped to multiply elements."""
        index = self.index(len(like))
        spread = weights.repeat_interleave(len(like) // self.samples) if index is None else weights[index]
        return spread.view(-1, *(1 for _ in like.shape[1:]))


def _of_term(term: Term, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Losses and shares of the samples, ``[B]`` each."""
    elements, coefficient = term.elements, term.coefficient
    if term.reduction == 'none':
        coefficient = coefficient.to(elements.losses.dtype)
        shares, weight = rows.sums(elements.losses * coefficient), rows.sums(coefficient)
        return shares * torch.where(weight == 0, 0, coefficient.sum() / weight), shares
    sums = rows.sums(elements.losses)
    counts = rows.sums(torch.ones_like(elements.losses) if elements.counted is None else elements.counted.to(sums.dtype))
    if term.reduction == 'mean':
        return sums * (coefficient / counts.clamp(min=1)), sums * (coefficient / elements.total)
    return sums * (coefficient * counts.sum() / counts.clamp(min=1)), sums * coefficient


def _summed(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    losses, shares = zip(*pairs, strict=True)
    return torch.stack(losses).sum(dim=0), torch.stack(shares).sum(dim=0)


# ---------------------------------------------------------------------- formulas, where there is no graph


def _formulas(outputs: Any, batch: Any) -> list[Callable[[], tuple[Tensor, Tensor]]]:
    """What the usual models' loss may be; each gives losses and shares of the samples, ``[B]``."""
    labels = None
    if isinstance(batch, Mapping | UserDict):
        labels = batch.get('labels')
    elif isinstance(batch, Sequence) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(labels, Tensor):
        return []
    fitting = [t for t in tensors_of(outputs) if t.shape[: labels.ndim] == labels.shape and t.ndim <= labels.ndim + 1]
    if not fitting:
        return []
    logits = fitting[0]

    def tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
        # sample by sample, so that no more than one sample's logits are copied
        sums = torch.stack(
            [functional.cross_entropy(row.float(), label, reduction='sum') for row, label in zip(logits, labels, strict=True)]
        )
        counts = (labels != -100).flatten(1).sum(dim=1) if labels.ndim > 1 else (labels != -100).long()
        return sums / counts.clamp(min=1), sums / counts.sum().clamp(min=1)

    def elements(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        losses = per_sample_mean(function(logits.float().reshape(labels.shape), labels.float(), reduction='none'))
        return losses, losses / len(losses)

    if labels.is_floating_point():
        found = [functional.mse_loss, functional.binary_cross_entropy_with_logits]
        return [lambda function=f: elements(function) for f in found] if logits.numel() == labels.numel() else []  # type: ignore[misc]
    if labels.ndim == 1:
        return [lambda: tokens(labels)] if logits.shape[-1] > 1 else [lambda: elements(functional.mse_loss)]
    return [lambda: tokens(labels), lambda: tokens(functional.pad(labels[:, 1:], (0, 1), value=-100))]
