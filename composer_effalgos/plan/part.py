"""Tests whether per-sample losses are the same in a part of the batch.

If they are not, a mask or a mean over the batch makes the loss of a sample depend on the other samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from composer_effalgos.plan.graph import edge_of, walk
from composer_effalgos.plan.outputs import NotReadableError, detached, entries_of, is_rounded, leaves_of, positions_of, rows_of
from composer_effalgos.utils.errors import InputError

_MOST = 8  # maximum number of samples in the part


def part_of(losses: Tensor) -> Tensor | None:
    """Selects the samples with the smallest losses and the one with the largest: a mask by loss would treat them differently.

    Args:
        losses: Float ``[B]``.

    Returns:
        int64 ``[k]``, ascending; ``None`` for a batch of fewer than two samples.
    """
    if len(losses) < 2:
        return None
    order = losses.detach().argsort()
    low = order[: min(_MOST - 1, len(losses) // 2)]
    return (torch.cat([low, order[-1:]]) if len(losses) > 2 else low).sort().values


def alike(ours: Tensor, theirs: Tensor, like: Tensor) -> bool:
    """Whether two sets of losses are equal up to rounding; true if any is not finite, since that is inconclusive.

    Args:
        ours: Float ``[k]``.
        theirs: Float ``[k]``.
        like: A tensor in the precision in which the losses were computed.
    """
    if ours.shape != theirs.shape:
        return False
    if not bool(torch.isfinite(ours).all() & torch.isfinite(theirs).all()):
        return True
    tolerance = 3e-2 if is_rounded(like) else 1e-3
    return bool(((ours - theirs).abs() <= tolerance * (theirs.abs() + theirs.abs().mean()) + 1e-7).all())


def take_part(outputs: Any, batch: Any, rows: Tensor, size: int) -> tuple[Any, Any]:
    """The outputs of some samples, detached from their graph, and the batch with these samples.

    Args:
        outputs: The model's outputs.
        batch: The batch.
        rows: The samples, int64 ``[k]``.
        size: Number of samples in the batch.
    """
    with torch.no_grad():
        return detached(rows_of(outputs, rows, size)), rows_of(batch, rows, size)


def evaluated(function: Callable[[Any, Any], Any], outputs: Any, batch: Any) -> Any:
    """Evaluates a loss on a part of the batch, with its graph.

    Args:
        function: Function of outputs and batch.
        outputs: Outputs of the part.
        batch: The part.

    Raises:
        NotReadableError: If the function fails.
    """
    try:
        with torch.enable_grad():
            return function(outputs, batch)
    except InputError:
        raise
    except Exception as error:  # a user's loss may raise anything
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise NotReadableError(
            f'it fails on a part of the batch, cut along the first dimension of outputs and batch ({reason}), so its samples cannot '
            'be separated'
        ) from error


def computed_before(own: Any, outputs: Any) -> bool:
    """Whether a loss was computed in the forward pass: it is among the outputs, or its graph does not start at them."""
    numbers = {edge_of(leaf) for leaf in leaves_of(outputs) if isinstance(leaf, Tensor) and leaf.ndim == 0 and leaf.requires_grad}
    starts = [edge_of(entry) for entry in entries_of(own) if entry.requires_grad]
    found = [edge for _, edge in walk(starts, {*numbers, *positions_of(outputs)}).arrivals]
    return any(edge in numbers for edge in found) or not found
