"""Checks per-sample losses against the loss that a model returns, by their gradients at the model's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from composer_effalgos.plan.graph import edge_of, pull
from composer_effalgos.plan.outputs import entries_of, is_rounded, tensors_of, total_of

_COMPARED = 2**20  # numbers of a gradient that are looked at, beside at least two samples

Gradients = dict[int, Tensor]
"""By the position of an output, as :func:`tensors_of` has them."""


class Probe(NamedTuple):
    """Per-sample losses for a check."""

    shares: Tensor  # float [B]: what each sample adds to the loss, with the graph
    slopes: Callable[[Tensor], Gradients]  # a number computed from the shares -> its gradients at the outputs
    reads_parameters: bool  # whether the shares depend on parameters by other ways than the outputs


class Comparison(NamedTuple):
    """What a check found."""

    read: list[int]  # positions of the outputs that the per-sample losses read; empty where no gradient can be compared
    difference: str | None = None  # what is different from the model's own loss
    plain: bool = False  # whether the gradients are equal without a scale


def compare_gradients(probe: Probe, own: Any, outputs: Any, *, by_direction: bool) -> Comparison | None:
    """Whether each sample's loss depends on its own rows of the outputs alone, and has the own loss's gradient there.

    Then the own loss's gradient with the rows of sample i multiplied by ``w_i`` is that of its samples' sum weighted with ``w``, whatever
    the mean is taken over. Terms of the loss that do not read these outputs are left out of the comparison.

    Args:
        probe: The per-sample losses.
        own: What ``model.loss`` returned.
        outputs: The model's outputs.
        by_direction: Whether each sample's gradient may be any multiple of the own loss's. Otherwise they are equal, or all the multiple
            that makes the shares sum up to the own loss.

    Returns:
        What was found; ``None`` where all gradients are zero, which shows nothing.

    Raises:
        OpaqueGraphError: If the graph between outputs and loss cannot be followed.
    """
    tensors, factors = tensors_of(outputs), _uneven(probe.shares)
    scale = 1024.0 if any(tensor.dtype == torch.float16 for tensor in tensors) else 1.0  # a mean's gradients underflow
    even = _excerpts(probe.slopes(scale * probe.shares.sum()))
    stops = {edge_of(tensors[position]): position for position in even if tensors[position].requires_grad}
    theirs: Gradients = {}
    for entry in entries_of(own):
        if not entry.requires_grad:
            continue
        # no name is given to a whole gradient, which may be as large as the logits, so that none outlives its excerpt
        for position, gradient in _excerpts({stops[edge]: gradient for edge, gradient in pull(entry, stops, scale).items()}).items():
            theirs[position] = theirs[position] + gradient if position in theirs else gradient
    if any(len(tensors[position]) != len(probe.shares) for position in even):
        return Comparison([], f'read outputs that have not {len(probe.shares)} rows, one a sample')
    if not theirs:
        return Comparison([])
    uneven = _excerpts(probe.slopes(scale * (factors * probe.shares).sum()))
    even_rows, uneven_rows, their_rows = (_joined(found, even) for found in (even, uneven, theirs))
    if not even_rows.any() and not their_rows.any():
        return None
    # where all is learnt, gradients are what rounding leaves of larger numbers: a multiple that is not a power of two rounds otherwise
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
        return Comparison([], 'have another gradient at the outputs than it has')
    return Comparison(sorted(stops.values()), plain=plain)


def _uneven(shares: Tensor) -> Tensor:
    """Factors between 0.5 and 1.5, no two of them equal, ``[B]``."""
    return 0.5 + torch.frac(torch.arange(1, len(shares) + 1, device=shares.device, dtype=shares.dtype) * ((math.sqrt(5) - 1) / 2))


def _excerpts(gradients: Gradients) -> Gradients:
    """Some of each gradient, float ``[k, m]``: all where it is small, else some tokens of the first samples."""
    found = {}
    for position, gradient in gradients.items():
        rows = max(2, min(len(gradient), _COMPARED // max(1, gradient[0].numel())))
        excerpt = gradient[:rows]
        step = math.ceil(excerpt.numel() / _COMPARED)
        excerpt = excerpt[:, ::step] if excerpt.ndim == 3 else excerpt[..., ::step]
        found[position] = excerpt.reshape(len(excerpt), -1).float().clone()
    return found


def _joined(found: Gradients, like: Gradients) -> Tensor:
    """The excerpts of all outputs side by side, ``[k, m]``."""
    rows = min(len(excerpt) for excerpt in like.values())
    return torch.cat([found.get(position, torch.zeros_like(excerpt))[:rows] for position, excerpt in sorted(like.items())], dim=1)


def _alike(ours: Tensor, theirs: Tensor, tolerance: float, noise: Tensor) -> bool:
    lengths = theirs.norm(dim=1)
    return bool(((ours - theirs).norm(dim=1) <= tolerance * (lengths + 0.01 * lengths.max()) + noise).all())
