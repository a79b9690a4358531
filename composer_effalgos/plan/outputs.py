"""Model outputs: tensors inside any structure, and one loss or several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from composer_effalgos.utils.errors import InputError


class NotReadableError(InputError):
    """Why a loss has no per-sample form."""


def leaves_of(value: Any) -> list[Any]:
    """The leaves of a structure in a fixed order, including those of objects with tensors as attributes (a ``BatchEncoding``)."""
    leaves = []
    for leaf in tree_leaves(value):
        leaves += tree_leaves(dict(vars(leaf))) if _holds_tensors(leaf) else [leaf]
    return leaves


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same structure with a function of each tensor in it.

    Args:
        function: Of one tensor.
        value: Outputs or a batch.
    """

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
    """The same tensors in containers of their own."""
    return mapped(lambda tensor: tensor, value)


def _holds_tensors(leaf: Any) -> bool:
    if isinstance(leaf, Tensor | nn.Module | type) or not hasattr(leaf, '__dict__'):
        return False
    return any(isinstance(held, Tensor) for held in tree_leaves(dict(vars(leaf))))


def tensors_of(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a model's outputs, in a fixed order; single numbers (a loss) are none of them."""
    return [leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0]


def detached(outputs: Any) -> Any:
    """The same outputs cut off from their graph, each tensor a leaf of a new one."""
    return mapped(lambda tensor: tensor.detach().requires_grad_(tensor.is_floating_point()), outputs)


def rows_of(value: Any, rows: Tensor | Sequence[int], size: int) -> Any:
    """The same structure with some samples alone.

    Args:
        value: Outputs or a batch; tensors that have not ``size`` rows stay whole, and so do lists within it without one item a sample.
        rows: Which samples, int64 ``[k]``.
        size: How many there are.
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
    """The losses that Composer's trainer sums up: one, those of a sequence, those of a mapping or its ``total`` alone."""
    if isinstance(own, Mapping):
        own = [own['total']] if 'total' in own else list(own.values())
    entries = list(own) if isinstance(own, Sequence) else [own]
    if not entries or not all(isinstance(entry, Tensor) for entry in entries):
        raise NotReadableError(f'it must return a tensor, or a mapping or sequence of tensors, got {type(own).__name__}')
    return entries


def with_added(own: Any, amounts: Sequence[Tensor]) -> Any:
    """What the model returned, with amounts added to its first losses.

    Args:
        own: What ``model.loss`` returned; it is left as it is.
        amounts: One number for each of :func:`entries_of`, or for the first.
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
    """The number that is trained on, without its graph; float32 or float64."""
    return torch.stack([in_full(entry.detach()).mean() for entry in entries_of(own)]).sum()


def in_full(tensor: Tensor) -> Tensor:
    """Float32 where it is half as wide."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def is_rounded(tensor: Tensor) -> bool:
    """Whether numbers are kept to 8 or 11 bits, here or in what they were computed from."""
    return tensor.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(tensor.device.type)


def is_near(ours: Tensor, theirs: Tensor, like: Tensor) -> bool:
    """Whether two losses are equal but for rounding.

    Args:
        ours: One number.
        theirs: One number.
        like: A tensor of the precision that they were computed in.
    """
    return bool((ours - theirs).abs() <= (1e-2 if is_rounded(like) else 2e-5) * theirs.abs() + 1e-9)
