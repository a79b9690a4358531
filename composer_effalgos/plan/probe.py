"""Checks per-sample losses against the model's own loss, by their gradients at the model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from composer_effalgos.plan.graph import pull
from composer_effalgos.plan.outputs import entries_of, is_rounded, positions_of, rows_positions, tensors_of, total_of

_COMPARED = 2**20  # elements of a gradient to compare, but at least two samples

Gradients = dict[int, Tensor]
"""Gradients by the position of the output in :func:`tensors_of`."""


class Probe(NamedTuple):
    """Per-sample losses to be checked."""

    shares: Tensor  # float [B]: contribution of each sample to the loss, with the graph
    slopes: Callable[[Tensor], Gradients]  # maps a scalar computed from the shares to its gradients at the outputs
    reads_parameters: bool  # whether the shares depend on parameters other than through the outputs


class Comparison(NamedTuple):
    """Result of a check."""

    read: list[int]  # positions of the outputs that the per-sample losses read; empty if no gradient can be compared
    difference: str | None = None  # how the losses differ from the model's own loss
    plain: bool = False  # whether the gradients are equal without rescaling


def compare_gradients(probe: Probe, own: Any, outputs: Any, *, by_direction: bool) -> Comparison | None:
    """Compares the gradients of per-sample losses at the outputs with those of the model's own loss.

    Checks that the loss of each sample depends only on its own rows of the outputs, and has the gradient of the own loss there. Then
    multiplying the rows of sample i in the own loss's gradient by ``w_i`` gives the gradient of the sum of sample losses weighted with
    ``w``, whatever the mean is taken over. Terms of the loss that do not read these outputs do not enter the comparison.

    Args:
        probe: The per-sample losses.
        own: Result of ``model.loss``.
        outputs: The model's outputs.
        by_direction: Whether each sample's gradient may be any multiple of the own loss's. Otherwise the gradients must be equal, or all
            the same multiple, the one that makes the shares add up to the own loss.

    Returns:
        The result; ``None`` if all gradients are zero, which is inconclusive.

    Raises:
        OpaqueGraphError: If the graph between outputs and loss cannot be followed.
    """
    tensors, factors = tensors_of(outputs), _uneven(probe.shares)
    scale = 1024.0 if any(tensor.dtype == torch.float16 for tensor in tensors) else 1.0  # the gradients of a mean would underflow
    even = _excerpts(probe.slopes(scale * probe.shares.sum()))
    # at all outputs, or the gradient at one that is left out would flow on to others
    stops = positions_of(outputs)
    compared = {*even, *rows_positions(outputs, len(probe.shares))}
    theirs: Gradients = {}
    for entry in entries_of(own):
        if not entry.requires_grad:
            continue
        # Do not bind a whole gradient to a name: it may be as large as the logits and must not outlive its excerpt.
        for position, gradient in _excerpts(
            {stops[edge]: whole for edge, whole in pull(entry, stops, scale).items() if stops[edge] in compared}
        ).items():
            theirs[position] = theirs[position] + gradient if position in theirs else gradient
    if any(len(tensors[position]) != len(probe.shares) for position in even):
        return Comparison([], f'read outputs that do not have {len(probe.shares)} rows, one per sample')
    if not theirs:
        return Comparison([])
    if any(theirs.pop(position).any() for position in theirs.keys() - even.keys()):
        return Comparison([], 'do not depend on all outputs on which the loss depends')
    uneven = _excerpts(probe.slopes(scale * (factors * probe.shares).sum()))
    even_rows, uneven_rows, their_rows = (_joined(found, even) for found in (even, uneven, theirs))
    if not even_rows.any() and not their_rows.any():
        return None
    # Once everything is learned, gradients are mostly rounding error. A factor of 3 rounds differently (a power of two would not), which
    # reveals its size.
    thrice = _joined(_excerpts(probe.slopes(3 * scale * probe.shares.sum())), even)
    noise = 10 * (thrice / 3 - even_rows).norm(dim=1).max()
    tolerance = 2e-2 if any(is_rounded(tensors[position]) for position in even) else 1e-4
    if not _alike(even_rows * factors[: len(even_rows), None].to(even_rows), uneven_rows, tolerance, noise):
        return Comparison([], 'depend on the outputs of other samples too')
    plain = _alike(even_rows, their_rows, tolerance, noise)
    if by_direction:
        squares = even_rows.square().sum(dim=1, keepdim=True).clamp(min=torch.finfo(even_rows.dtype).tiny)
        multiple = ((even_rows * their_rows).sum(dim=1, keepdim=True) / squares).clamp(min=0)
    else:
        multiple = (total_of(own) / probe.shares.detach().sum()).to(even_rows)
    if not plain and not _alike(even_rows * multiple, their_rows, tolerance, noise):
        return Comparison([], 'have another gradient at the outputs than the loss itself')
    return Comparison(sorted(even.keys() & stops.values()), plain=plain)


def _uneven(shares: Tensor) -> Tensor:
    """Factors between 0.5 and 1.5, all different (golden-ratio sequence), ``[B]``."""
    return 0.5 + torch.frac(torch.arange(1, len(shares) + 1, device=shares.device, dtype=shares.dtype) * ((math.sqrt(5) - 1) / 2))


def _excerpts(gradients: Gradients) -> Gradients:
    """A part of each gradient, float ``[k, m]``: all of it if it is small, otherwise some elements of the first samples."""
    found = {}
    for position, gradient in gradients.items():
        rows = max(2, min(len(gradient), _COMPARED // max(1, gradient[0].numel())))
        excerpt = gradient[:rows]
        step = math.ceil(excerpt.numel() / _COMPARED)
        excerpt = excerpt[:, ::step] if excerpt.ndim == 3 else excerpt[..., ::step]
        found[position] = excerpt.reshape(len(excerpt), -1).float().clone()
    return found


def _joined(found: Gradients, like: Gradients) -> Tensor:
    """The excerpts of all outputs, concatenated to ``[k, m]``."""
    rows = min(len(excerpt) for excerpt in like.values())
    return torch.cat([found.get(position, torch.zeros_like(excerpt))[:rows] for position, excerpt in sorted(like.items())], dim=1)


def _alike(ours: Tensor, theirs: Tensor, tolerance: float, noise: Tensor) -> bool:
    lengths = theirs.norm(dim=1)
    return bool(((ours - theirs).norm(dim=1) <= tolerance * (lengths + 0.01 * lengths.max()) + noise).all())
