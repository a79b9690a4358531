"""Model outputs and losses: tensors in any structure, one loss or several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from composer_effalgos.plan.graph import Edge, edge_of
from composer_effalgos.utils.errors import InputError


class NotReadableError(InputError):
    """The loss has no per-sample form; the message says why."""


def leaves_of(value: Any) -> list[Any]:
    """The leaves of a structure in a fixed order, including tensors that are attributes of objects (``BatchEncoding``)."""
    leaves = []
    for leaf in tree_leaves(value):
        leaves += tree_leaves(dict(vars(leaf))) if _holds_tensors(leaf) else [leaf]
    return leaves


def num_rows(batch: Any) -> int:
    """The length of a batch's first tensor with a dimension; 0 if there is none."""
    return next((len(leaf) for leaf in leaves_of(batch) if isinstance(leaf, Tensor) and leaf.ndim), 0)


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Applies a function to each tensor in a structure (outputs or a batch) and returns the same structure."""

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if not _holds_tensors(leaf):
            return leaf
        clone = copy.copy(leaf)
        vars(clone).update(tree_map_only(Tensor, function, dict(vars(leaf))))
        return clone

    return tree_map(visit, value)


def same_structure(value: Any) -> Any:
    """Copies the containers of a structure but not its tensors."""
    return mapped(lambda tensor: tensor, value)


def _holds_tensors(leaf: Any) -> bool:
    if isinstance(leaf, Tensor | nn.Module | type) or not hasattr(leaf, '__dict__'):
        return False
    return any(isinstance(held, Tensor) for held in tree_leaves(dict(vars(leaf))))


def tensors_of(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a model's outputs, in a fixed order, without scalars (a loss)."""
    return [leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0]


def positions_of(outputs: Any) -> dict[Edge, int]:
    """Maps each output that requires a gradient to its position in :func:`tensors_of`."""
    return {edge_of(tensor): position for position, tensor in enumerate(tensors_of(outputs)) if tensor.requires_grad}


def rows_positions(outputs: Any, size: int) -> list[int]:
    """Positions in :func:`tensors_of` of the outputs with one row per sample.

    Router logits of a mixture of experts (entries of a mapping whose key contains ``router``) are left out: their loss is one of the batch.

    Args:
        outputs: The model's outputs.
        size: Number of samples in the batch.
    """
    routers: set[int] = set()
    if isinstance(outputs, Mapping):
        routers = {id(tensor) for key, value in outputs.items() if 'router' in str(key) for tensor in tensors_of(value)}
    found = enumerate(tensors_of(outputs))
    return [position for position, tensor in found if len(tensor) == size and id(tensor) not in routers]


def detached(outputs: Any) -> Any:
    """The same outputs detached from their graph; each floating-point tensor becomes a leaf that requires a gradient."""
    return mapped(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()), outputs)


def rows_of(value: Any, rows: Tensor | Sequence[int], size: int) -> Any:
    """The same structure restricted to some samples.

    Args:
        value: Outputs or a batch. Tensors with a first dimension other than ``size`` stay whole, and so do nested lists of another length.
        rows: Which samples, int64 ``[k]``.
        size: Number of samples in ``value``.
    """

    def has_rows(item: Any) -> bool:
        return isinstance(item, Tensor) and item.ndim > 0 and len(item) == size

    def is_list(item: Any) -> bool:
        return item is not value and type(item) in (list, tuple) and len(item) == size and not all(map(has_rows, item))

    def chosen(item: Any) -> Any:
        if is_list(item):
            return type(item)(item[int(index)] for index in rows)
        return mapped(lambda tensor: tensor[torch.as_tensor(rows, device=tensor.device)] if has_rows(tensor) else tensor, item)

    return tree_map(chosen, value, is_leaf=is_list)


def entries_of(own: Any) -> list[Tensor]:
    """The losses that Composer's trainer adds up: one, all in a sequence, or all in a mapping (only ``total`` if it exists)."""
    if isinstance(own, Mapping):
        own = [own['total']] if 'total' in own else list(own.values())
    entries = list(own) if isinstance(own, Sequence) else [own]
    if not entries or not all(isinstance(entry, Tensor) for entry in entries):
        raise NotReadableError(f'it must return a tensor, or a mapping or sequence of tensors, got {type(own).__name__}')
    return entries


def with_added(own: Any, amounts: Sequence[Tensor]) -> Any:
    """Adds amounts to the losses that the model returned.

    Args:
        own: Result of ``model.loss``; it is not modified.
        amounts: One number for each of :func:`entries_of`, or for the first ones.
    """
    if isinstance(own, Tensor):
        return own + amounts[0].to(own.dtype)
    keys: Any = range(len(own))
    if isinstance(own, Mapping):
        keys = ['total'] if 'total' in own else list(own)
    changed: Any = list(own) if isinstance(own, tuple) else copy.copy(own)
    for key, amount in zip(keys, amounts, strict=False):
        changed[key] = changed[key] + amount.to(changed[key].dtype)
    return tuple(changed) if isinstance(own, tuple) else changed


def total_of(own: Any) -> Tensor:
    """The scalar loss that is trained on, detached; float32 or float64."""
    return torch.stack([in_full(entry.detach()).mean() for entry in entries_of(own)]).sum()


def in_full(tensor: Tensor) -> Tensor:
    """Converts float16 and bfloat16 to float32; other dtypes are unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def is_rounded(tensor: Tensor) -> bool:
    """Whether a tensor, or what it was computed from, has half precision (8 or 11 significant bits)."""
    return tensor.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(tensor.device.type)


def is_near(ours: Tensor, theirs: Tensor, like: Tensor) -> bool:
    """Whether two losses are equal up to rounding.

    Args:
        ours: A scalar.
        theirs: A scalar.
        like: A tensor in the precision in which the losses were computed.
    """
    return bool((ours - theirs).abs() <= (1e-2 if is_rounded(like) else 2e-5) * theirs.abs() + 1e-9)
