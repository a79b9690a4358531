"""Traverses the autograd graph between a model's outputs and its loss.

``torch.autograd.grad`` runs hooks that others registered on outputs and losses (FSDP gathers its parameters in one) and may free buffers
that the real backward pass needs. The functions here call individual nodes of the graph, so they run no hooks and free nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from composer_effalgos.utils.errors import InputError

Edge = tuple[Any, int]
"""A node of the graph and the index of one of its outputs; identifies a tensor."""


class OpaqueGraphError(InputError):
    """The graph contains a Python ``autograd.Function`` (a compiled model is one), whose backward pass may run only once."""


class Walk(NamedTuple):
    """Result of :func:`walk`."""

    nodes: list[Any]  # each before the nodes that produced its inputs
    arrivals: list[tuple[Any, Edge]]  # stops that were reached, each with the node that reads it (None for a start)


def edge_of(tensor: Tensor) -> Edge:
    """The position of a tensor in the graph.

    Args:
        tensor: A tensor that requires a gradient.

    Returns:
        Its edge, which is the same for all tensors that represent the same result.
    """
    edge = get_gradient_edge(tensor)
    return _through_ddp((edge.node, edge.output_nr))


def inputs_of(node: Any) -> list[Edge]:
    """The edges that a node read, without those that need no gradient."""
    return [_through_ddp((source, number)) for source, number in node.next_functions if source is not None]


def _through_ddp(edge: Edge) -> Edge:
    """Skips the identity function that DDP puts on outputs if it looks for unused parameters."""
    node, number = edge
    while type(node).__name__ == '_DDPSinkBackward':
        node, number = node.next_functions[number]
    return node, number


def walk(starts: Iterable[Edge], stops: Collection[Edge], halt: Callable[[Any], bool] = lambda node: False) -> Walk:
    """Traverses the graph from a result towards its inputs.

    Args:
        starts: Edges to start from.
        stops: Edges at which the traversal stops.
        halt: Predicate for nodes that are listed but not traversed further.
    """
    arrivals: list[tuple[Any, Edge]] = []
    seen: set[Any] = set()
    finished: list[Any] = []
    stack: list[tuple[Any, bool]] = []

    def visit(reader: Any, edges: Iterable[Edge]) -> None:
        for edge in edges:
            if edge in stops:
                arrivals.append((reader, edge))
            elif edge[0] not in seen:
                stack.append((edge[0], False))

    visit(None, starts)
    while stack:
        node, done = stack.pop()
        if done:
            finished.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if not halt(node):
                visit(node, inputs_of(node))
    return Walk(finished[::-1], arrivals)  # reverse postorder is topological


def are_nested(edges: Collection[Edge]) -> bool:
    """Whether one of the tensors was computed from another one of them."""
    return any(walk(inputs_of(node), edges).arrivals for node, _ in edges)


def between(start: Edge, stops: Collection[Edge]) -> list[Any]:
    """The nodes on the paths from a result to given edges.

    Args:
        start: The result.
        stops: The edges; the traversal does not pass any of them.

    Returns:
        The nodes, each before the nodes that produced its inputs.
    """
    order = walk([start], stops).nodes
    leading: set[Any] = set()
    for node in reversed(order):
        if any(edge in stops or edge[0] in leading for edge in inputs_of(node)):
            leading.add(node)
    return [node for node in order if node in leading]


def pull(result: Tensor, stops: Collection[Edge], scale: float = 1.0) -> dict[Edge, Tensor]:
    """Gradients of the mean of a result.

    Args:
        result: A tensor of any shape.
        stops: The edges whose gradients are computed; gradients do not flow past them.
        scale: Multiplies the gradients.

    Returns:
        The gradients of the edges that the result depends on.

    Raises:
        OpaqueGraphError: If there is a Python ``autograd.Function`` in between.
    """
    root = edge_of(result)
    order = between(root, stops)
    needed = set(order)
    found: dict[Edge, Tensor] = {}
    pending: dict[Edge, Tensor] = {}
    (found if root in stops else pending)[root] = torch.full_like(result, scale / result.numel(), requires_grad=False)
    with torch.no_grad():
        for node in order:
            if isinstance(node, BackwardCFunction):
                raise OpaqueGraphError(f'{type(node).__name__} lies between the outputs and the loss')
            gradients = node(*(pending.pop((node, number), None) for number in range(len(node._input_metadata))))
            gradients = gradients if isinstance(gradients, tuple) else (gradients,)
            for (source, number), gradient in zip(node.next_functions, gradients, strict=True):
                if source is None or gradient is None:
                    continue
                edge = _through_ddp((source, number))
                into = found if edge in stops else pending
                if edge in stops or source in needed:
                    into[edge] = into[edge] + gradient if edge in into else gradient
            del gradients, gradient  # before the next node allocates its own
    return found
