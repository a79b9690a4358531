"""Finds, in the graph of a loss, the means over elements (samples or tokens) that it consists of."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from composer_effalgos.plan.graph import Edge, between, edge_of, inputs_of, pull, walk
from composer_effalgos.plan.outputs import NotReadableError, in_full, positions_of, rows_positions, tensors_of
from composer_effalgos.plan.watch import Reduced

_ONE_BY_ONE = 'it computes the loss of one sample at a time'


class _Elements(NamedTuple):
    """The elements that a node of the graph averages."""

    losses: Tensor  # of any shape, the samples' dimension first
    counted: Tensor | None  # bool, the same shape; None for all
    total: Tensor | float  # the divisor of their mean


def token_losses(log_probabilities: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Negative log-likelihoods that a cross-entropy averages.

    Args:
        log_probabilities: Float ``[n, C]`` or ``[B, C, ...]``.
        target: Class indices, int64, the same shape without ``C``.
        ignore_index: The ignored index.

    Returns:
        Losses, float32 or float64, 0 if ignored; a bool mask of the targets that count; and the targets, 0 if ignored. All of the same
        shape.

    Raises:
        NotReadableError: For a single sample without a batch dimension.
    """
    if log_probabilities.ndim < 2:
        raise NotReadableError(_ONE_BY_ONE)
    counted = target != ignore_index
    target = target.masked_fill(~counted, 0)
    return -in_full(log_probabilities.gather(1, target.unsqueeze(1)).squeeze(1)) * counted, counted, target


def node_token_losses(node: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Applies :func:`token_losses` to the tensors saved by a cross-entropy node."""
    ignored = (node._saved_ignore_index + 2**63) % 2**64 - 2**63  # torch exposes it as an unsigned integer
    return token_losses(node._saved_self, node._saved_target, ignored)


def _nll(node: Any) -> _Elements:
    losses, counted, target = node_token_losses(node)
    weight = node._saved_weight
    return _Elements(losses if weight is None else losses * weight[target], counted, node._saved_total_weight)


def is_cross_entropy(node: Any) -> bool:
    """Whether a node is the reduction of a cross-entropy over class indices."""
    return _READERS.get(node.name()) is _nll


def weighing(target: Tensor, weights: Tensor) -> Callable[..., tuple[Tensor | None, ...]]:
    """A hook that multiplies the gradients of the targets' log-probabilities, the only ones that are not zero."""

    def weigh(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...]:
        gradient, *others = gradients
        if gradient is None:
            return gradients
        weighted = (gradient.gather(1, target) * weights.unsqueeze(1)).to(gradient.dtype)
        # nobody else holds this gradient, which the node made for the next one, so it may be modified in place
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


NORMALISATIONS = ('weighted', 'averaged', 'summed')  # what the mean of a loss may be over, see ReadFromGraph


class Term(NamedTuple):
    """One mean over elements in a loss."""

    node: Any
    elements: _Elements
    coefficient: Tensor  # factor of the mean in the loss, a scalar; per element if the node has no reduction
    reduction: str


class GraphReading(NamedTuple):
    """The terms found in the graph of one loss."""

    terms: list[Term]
    read: list[Edge]  # the outputs that the terms read
    rows: Rows
    reads_parameters: bool
    watched: bool  # whether recorded reductions were needed in addition to the graph


def _is_reader(node: Any) -> bool:
    return node.name() in _READERS


def is_apart(entry: Tensor, outputs: Any) -> bool:
    """Whether a loss does not depend on the outputs."""
    return not entry.requires_grad or not walk([edge_of(entry)], positions_of(outputs)).arrivals


def read_graph(entry: Tensor, outputs: Any, seen: Mapping[Any, Reduced] | None = None) -> GraphReading | None:
    """The terms of a loss; ``None`` if its graph shows none.

    Args:
        entry: The loss, a scalar with its graph.
        outputs: The model's outputs.
        seen: Means and sums that were recorded while it was computed; the last ones before the loss become the terms. Without them, the
            terms are torch's losses whose nodes save their inputs.

    Raises:
        NotReadableError: If the outputs enter the loss in a way that is not understood.
    """
    if not entry.requires_grad:
        return None
    root, positions = edge_of(entry), positions_of(outputs)
    reduced = (
        {}
        if seen is None
        else {node: made for node, made in seen.items() if not _is_reader(node) and walk(inputs_of(node), positions).arrivals}
    )

    def halts(node: Any) -> bool:
        return node in reduced or _is_reader(node)

    readers = [node for node in walk([root], positions, halts).nodes if halts(node)]
    if not readers:
        return None
    inputs = {inputs_of(node)[0]: node for node in readers if node not in reduced}
    # label smoothing also sums the log-probabilities over the classes
    others = walk([root], {*positions, *inputs}, halts).arrivals
    sums = [(node, inputs[edge]) for node, edge in others if edge in inputs and _sums_classes(node)]
    understood = {node for node, _ in sums}
    behind = walk([edge for node in readers for edge in inputs_of(node)], positions)
    read = list(dict.fromkeys(edge for _, edge in behind.arrivals))
    if any(node not in understood and (edge in inputs or edge in read) for node, edge in others):
        raise NotReadableError('a further term in it reads the outputs')
    if not read:
        raise NotReadableError('it does not come from the outputs that the model returns')
    rows = Rows(behind.nodes, read, outputs)
    further = {positions[edge] for _, edge in others if edge in positions and edge not in read}
    if further and not further.isdisjoint(rows_positions(outputs, rows.samples)):
        raise NotReadableError('a further term in it reads another output')
    ends = {(node, 0) for node in (*readers, *understood)}
    if not all(_is_linear(node) for node in between(root, ends)):
        raise NotReadableError('it goes from the samples to their loss by more than a weighted mean')
    coefficients = pull(entry, ends)
    terms = [
        _watched_term(node, reduced[node], coefficients[node, 0])
        if node in reduced
        else Term(node, _READERS[node.name()](node), coefficients[node, 0], ('none', 'mean', 'sum')[node._saved_reduction])
        for node in readers
        if (node, 0) in coefficients
    ]
    terms += [
        Term(node, _Elements(in_full(reader._saved_self).sum(dim=1), None, 1.0), coefficients[node, 0], 'none')
        for node, reader in sums
        if (node, 0) in coefficients
    ]
    reads_parameters = any(hasattr(node, 'variable') for node in behind.nodes)
    return GraphReading(terms, read, rows, reads_parameters, bool(reduced.keys() & set(readers)))


def _watched_term(node: Any, reduced: Reduced, coefficient: Tensor) -> Term:
    elements = reduced.elements()
    if elements.ndim == 0:
        raise NotReadableError(_ONE_BY_ONE)
    divisor = {'mean': elements.numel(), 'sum': 1, 'batchmean': len(elements)}[reduced.how]
    factor = _constant_factor(elements)
    elements, coefficients = in_full(elements), (coefficient / divisor).expand(elements.shape)
    if factor is not None:  # a mask determines the elements that the mean is over
        coefficients = coefficients * factor
        elements = elements / torch.where(factor == 0, 1, factor) * (factor != 0)
    return Term(node, _Elements(elements, None, 1.0), coefficients, 'none')


def _constant_factor(product: Tensor) -> Tensor | None:
    """The constant factor of a product with something that requires a gradient; ``None`` if it is no such product."""
    node: Any = product.grad_fn
    if node is None or node.name() != 'MulBackward0':
        return None
    given = [source is not None for source, _ in node.next_functions]
    factor = node._saved_other if given[0] else node._saved_self
    return None if all(given) or factor is None or factor.ndim == 0 else factor.detach()


def _is_linear(node: Any) -> bool:
    """Whether a node is linear (a sum, mean or multiple of its inputs), so that its gradient does not depend on them."""
    name, given = re.sub(r'Backward\d*$', '', node.name()), [source is not None for source, _ in node.next_functions]
    return name in _LINEAR or (name == 'Mul' and sum(given) == 1) or (name == 'Div' and not any(given[1:]))


def _sums_classes(node: Any) -> bool:
    return node is not None and node.name() == 'SumBackward1' and tuple(node._saved_dim) == (1,) and not node._saved_keepdim


class Rows:
    """The mapping from elements to samples: in order, or by the index that the model applied to its outputs.

    Args:
        nodes: The nodes between outputs and elements.
        read: The outputs that are read.
        outputs: The model's outputs.
    """

    def __init__(self, nodes: Collection[Any], read: Sequence[Edge], outputs: Any) -> None:
        positions, tensors = positions_of(outputs), tensors_of(outputs)
        sizes = {len(tensors[positions[edge]]) for edge in read}
        if len(sizes) != 1:
            raise NotReadableError(f'the outputs that it reads have {sorted(sizes)} rows; one per sample is needed')
        (self.samples,) = sizes
        self._indexed = [node for node in nodes if node.name() == 'IndexBackward0' and node._saved_indices[0] is not None]

    def index(self, rows: int) -> Tensor | None:
        """The sample of each row of elements, int64 ``[rows]``; ``None`` if samples have consecutive rows, the same number each."""
        for node in self._indexed:
            index = node._saved_indices[0]
            index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.flatten()
            if len(index) == rows:
                return index * self.samples // node._saved_self_sym_sizes[0]
        if rows % self.samples:
            raise NotReadableError(f'it is a mean over {rows} rows of {self.samples} samples')
        return None

    def sums(self, elements: Tensor) -> Tensor:
        """Sums elements per sample, ``[B]``."""
        index = self.index(len(elements))
        if index is None:
            return elements.reshape(self.samples, -1).sum(dim=1)
        return elements.new_zeros(self.samples).index_add(0, index, elements.reshape(len(elements), -1).sum(dim=1))

    def spread(self, weights: Tensor, like: Tensor) -> Tensor:
        """Expands weights of samples ``[B]`` to weights of rows, in a shape that broadcasts with the elements."""
        index = self.index(len(like))
        spread = weights.repeat_interleave(len(like) // self.samples) if index is None else weights[index]
        return spread.view(-1, *(1 for _ in like.shape[1:]))


def of_term(term: Term, rows: Rows, normalisation: str) -> tuple[Tensor, Tensor]:
    """Losses and shares of the samples, ``[B]`` each."""
    elements, coefficient = term.elements, term.coefficient
    sums = rows.sums(elements.losses)
    if term.reduction == 'none':
        coefficient = coefficient.to(elements.losses.dtype)
        shares, weight = rows.sums(elements.losses * coefficient), rows.sums(coefficient)
        alone = shares * torch.where(weight == 0, 0, coefficient.sum() / weight)
    else:
        counts = rows.sums(torch.ones_like(elements.losses) if elements.counted is None else elements.counted.to(sums.dtype))
        shares = sums * (coefficient / elements.total if term.reduction == 'mean' else coefficient)
        alone = sums * (coefficient * (1 if term.reduction == 'mean' else counts.sum()) / counts.clamp(min=1))
    if normalisation == 'weighted':
        return alone, shares
    return shares * (rows.samples if normalisation == 'averaged' else 1), shares
