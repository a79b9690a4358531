"""Whether the losses of samples are the same in a part of the batch: what a mask or a mean over the batch makes of them is not theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from composer_effalgos.plan.graph import Edge, edge_of, walk
from composer_effalgos.plan.outputs import NotReadableError, detached, entries_of, is_rounded, leaves_of, rows_of, tensors_of
from composer_effalgos.utils.errors import InputError

_MOST = 8  # samples in the part


def part_of(losses: Tensor) -> Tensor | None:
    """The samples with the smallest losses and the one with the largest, which a mask over them would treat otherwise.

    Args:
        losses: Float ``[B]``.

    Returns:
        int64 ``[k]``, ascending; ``None`` where there is no part.
    """
    if len(losses) < 2:
        return None
    order = losses.detach().argsort()
    low = order[: min(_MOST - 1, len(losses) // 2)]
    return (torch.cat([low, order[-1:]]) if len(losses) > 2 else low).sort().values


def alike(ours: Tensor, theirs: Tensor, like: Tensor) -> bool:
    """Whether the losses of some samples are the same; true where one is not finite, which shows nothing.

    Args:
        ours: Float ``[k]``.
        theirs: Float ``[k]``.
        like: A tensor of the precision that they were computed in.
    """
    if ours.shape != theirs.shape:
        return False
    if not bool(torch.isfinite(ours).all() & torch.isfinite(theirs).all()):
        return True
    tolerance = 3e-2 if is_rounded(like) else 1e-3
    return bool(((ours - theirs).abs() <= tolerance * (theirs.abs() + theirs.abs().mean()) + 1e-7).all())


def take_part(outputs: Any, batch: Any, rows: Tensor, size: int) -> tuple[Any, Any]:
    """Some samples' outputs, cut off from their graph, and their batch.

    Args:
        outputs: The model's outputs.
        batch: The batch.
        rows: The samples, int64 ``[k]``.
        size: How many there are.
    """
    with torch.no_grad():
        return detached(rows_of(outputs, rows, size)), rows_of(batch, rows, size)


def evaluated(function: Callable[[Any, Any], Any], outputs: Any, batch: Any) -> Any:
    """A loss of a part of the batch, with its graph.

    Args:
        function: Of outputs and batch.
        outputs: Those of the part.
        batch: The part.

    Raises:
        NotReadableError: Where the function fails.
    """
    try:
        with torch.enable_grad():
            return function(outputs, batch)
    except InputError:
        raise
    except Exception as error:  # whatever a loss of the user's raises
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise NotReadableError(
            f'it fails on a part of the batch, cut along the first dimension of outputs and batch ({reason}), so that its samples cannot '
            'be told apart'
        ) from error


def computed_before(own: Any, outputs: Any) -> bool:
    """Whether a loss was computed in the forward pass: it is among the outputs, or its graph does not begin at them.

    Args:
        own: What ``model.loss`` returned.
        outputs: The model's outputs, or a part of them.
    """
    numbers = _edges(leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor) and leaf.ndim == 0)
    rows = _edges(tensors_of(outputs))
    starts = [edge_of(entry) for entry in entries_of(own) if entry.requires_grad]
    found = [edge for _, edge in walk(starts, numbers | rows).arrivals]
    return any(edge in numbers for edge in found) or not found


def _edges(tensors: Any) -> set[Edge]:
    return {edge_of(tensor) for tensor in tensors if tensor.requires_grad}
