"""Training sets made harder on purpose: wrong labels, and classes out of balance."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def long_tail(targets: Tensor, num_classes: int, imbalance: float, seed: int) -> Tensor:
    """Choose samples so that the sizes of the classes fall exponentially: CIFAR-10-LT and its like (Cui et al. 2019, arXiv 1901.05555).

    Class ``c`` of ``C`` keeps ``floor(N / C * imbalance ** (-c / (C - 1)))`` samples, chosen at random, or all where it has fewer.

    Args:
        targets: int64 ``[N]``.
        num_classes: ``C``.
        imbalance: Size of the first class over that of the last, from 1.
        seed: A higher imbalance chooses among the samples of a lower one with the same seed.

    Returns:
        int64 indices in rising order.
    """
    order = torch.from_numpy(np.random.default_rng([seed, 0]).permutation(len(targets)))
    kept = []
    for number in range(num_classes):
        share = imbalance ** (-number / max(num_classes - 1, 1))
        wanted = math.floor(round(len(targets) / num_classes * share, 6))  # not one less by rounding
        kept.append(order[targets[order] == number][:wanted])
    return torch.cat(kept).sort().values


def noisy_labels(targets: Tensor, num_classes: int, share: float, seed: int) -> Tensor:
    """Symmetric label noise: exactly ``round(share * N)`` labels become another class, each other class as likely.

    Args:
        targets: int64 ``[N]``.
        num_classes: From 2.
        share: In [0, 1].
        seed: Of the choice.

    Returns:
        int64 ``[N]``.
    """
    rng = np.random.default_rng([seed, 1])
    wrong = torch.from_numpy(rng.permutation(len(targets))[: round(share * len(targets))])
    found = targets.clone()
    found[wrong] = (targets[wrong] + torch.from_numpy(rng.integers(1, num_classes, len(wrong)))) % num_classes
    return found
