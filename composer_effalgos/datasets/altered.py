"""Label noise and class imbalance for training sets."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def long_tail(targets: Tensor, num_classes: int, imbalance: float, seed: int) -> Tensor:
    """Choose samples so that class sizes decay exponentially, as in CIFAR-10-LT (Cui et al. 2019, arXiv 1901.05555).

    Class ``c`` of ``C`` keeps ``floor(N / C * imbalance ** (-c / (C - 1)))`` random samples, or all of them if it has fewer.

    Args:
        targets: int64 ``[N]``.
        num_classes: ``C``.
        imbalance: Size of the first class divided by the size of the last, at least 1.
        seed: With the same seed, a higher imbalance keeps a subset of the samples of a lower one.

    Returns:
        int64 indices in ascending order.
    """
    order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(len(targets)))
    kept = []
    for number in range(num_classes):
        share = imbalance ** (-number / max(num_classes - 1, 1))
        wanted = math.floor(round(len(targets) / num_classes * share, 6))  # round first: float error must not cost a sample
        kept.append(order[targets[order] == number][:wanted])
    return torch.cat(kept).sort().values


def noisy_labels(targets: Tensor, num_classes: int, share: float, seed: int) -> Tensor:
    """Symmetric label noise: replace exactly ``round(share * N)`` labels with another class, drawn uniformly.

    Args:
        targets: int64 ``[N]``.
        num_classes: At least 2.
        share: Fraction of labels to replace, in [0, 1].
        seed: Random seed.

    Returns:
        int64 ``[N]``.
    """
    rng = np.random.default_rng([seed, 1])
    wrong = torch.from_numpy(rng.permutation(len(targets))[: round(share * len(targets))])
    found = targets.clone()
    found[wrong] = (targets[wrong] + torch.from_numpy(rng.integers(1, num_classes, len(wrong)))) % num_classes
    return found
