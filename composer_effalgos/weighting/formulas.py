"""Weights as pure functions of the losses."""

from __future__ import annotations

import torch
from torch import Tensor


def lin_upper(losses: Tensor, temperature: float = 0.4) -> Tensor:
    """LinUpper weights.

    The losses are scaled linearly to ``h`` in [-1, 1]. ``f = min(h + 1, 1)`` is constant on the upper half of the range. The weights are
    ``n * softmax(f / temperature)``.

    Args:
        losses: Float ``[n]``.
        temperature: ``r``, greater than 0; larger values give more uniform weights.

    Returns:
        Float ``[n]`` with mean 1. In the upper half of the range, weights are ``exp(1 / temperature)`` times that of the smallest loss.

    Source: Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", ICLR 2025, arXiv 2502.06733.
    """
    low, high = losses.min(), losses.max()
    scaled = (2 * losses - low - high) / (high - low).clamp(min=1e-6)
    return len(losses) * torch.softmax((scaled + 1).clamp(max=1) / temperature, dim=0)


def select_above_quantile(scores: Tensor, shares: Tensor, quantile: float = 0.1) -> Tensor:
    """Weights that keep the tokens at or above a quantile of the scores, so that the loss becomes the mean over the kept tokens.

    The quantile of the ``n`` counted tokens is the smallest score that at least ``quantile * n`` of them do not exceed (value at risk), so
    ``n - ceil(quantile * n) + 1`` tokens are kept, and more if several have that score.

    Args:
        scores: Float ``[n]``.
        shares: Weight of each token in the mean loss, float ``[n]``, non-negative; 0 for ignored labels.
        quantile: In [0, 1); 0 keeps all tokens.

    Returns:
        Float ``[n]``: 0 for tokens left out, and for kept tokens the constant that preserves the total share.

    Source: Bal et al., "ESLM: Risk-Averse Selective Language Modeling for Efficient Pretraining", arXiv 2505.19893.
    """
    counted = shares > 0
    # Ignored tokens sort last. Boolean indexing would drop them too, but its shape would have to be read from the device
    ascending = torch.where(counted, scores, torch.inf).sort().values
    position = (counted.sum().double() * quantile - 1e-6).ceil().clamp(min=1).long() - 1
    kept = counted & (scores >= ascending[position])
    return kept * (shares.sum() / (shares * kept).sum())
