"""Weights as pure functions of the losses."""

from __future__ import annotations

import torch
from torch import Tensor


def lin_upper(losses: Tensor, temperature: float = 0.4) -> Tensor:
    """LinUpper's weights of some samples.

    The losses are scaled to ``h`` in [-1, 1], the smallest to -1 and the largest to 1; ``f = min(h + 1, 1)`` gives the upper half of that
    range the same value, and ``softmax(f / temperature)``, multiplied by the number of samples, the weights.

    Args:
        losses: Float ``[n]``.
        temperature: ``r``, greater than 0; the larger, the more even.

    Returns:
        Float ``[n]`` with mean 1: ``exp(1 / temperature)`` times the weight of the smallest loss from the middle of the range on.

    Source: Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", ICLR 2025, arXiv 2502.06733.
    """
    low, high = losses.min(), losses.max()
    scaled = (2 * losses - low - high) / (high - low).clamp(min=1e-6)
    return len(losses) * torch.softmax((scaled + 1).clamp(max=1) / temperature, dim=0)


def select_above_quantile(scores: Tensor, shares: Tensor, quantile: float = 0.1) -> Tensor:
    """Weights that keep the tokens at and above a quantile of their scores, with the mean over the kept as the loss.

    The quantile of the ``n`` tokens that count is the smallest score that at least ``quantile * n`` of them do not exceed (value at risk),
    so ``n - ceil(quantile * n) + 1`` are kept, and more where several have that score.

    Args:
        scores: Float ``[n]``.
        shares: What each token counts in the mean that is the loss, float ``[n]``, not negative; 0 where its label is ignored.
        quantile: In [0, 1); 0 keeps all.

    Returns:
        Float ``[n]``: 0 for what is left out, and for the kept the number that makes them count as much as all did.

    Source: Bal et al., "ESLM: Risk-Averse Selective Language Modeling for Efficient Pretraining", arXiv 2505.19893.
    """
    counted = shares > 0
    # those that do not count come last; no number leaves the device
    ascending = torch.where(counted, scores, torch.inf).sort().values
    position = (counted.sum() * quantile - 1e-6).ceil().clamp(min=1).long() - 1
    kept = counted & (scores >= ascending[position])
    return kept * (shares.sum() / (shares * kept).sum())
