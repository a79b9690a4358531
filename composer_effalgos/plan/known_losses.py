"""Common loss formulas, tried if there is no autograd graph to read (a compiled model)."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from composer_effalgos.plan.outputs import tensors_of
from composer_effalgos.plan.per_sample import per_sample_mean


def formulas(outputs: Any, batch: Any) -> list[Callable[[], tuple[Tensor, Tensor]]]:
    """The formulas that fit the shapes of outputs and labels.

    Returns:
        Functions that return per-sample losses and shares, float ``[B]`` each; an empty list if no output fits the labels.
    """
    labels = None
    if isinstance(batch, Mapping | UserDict):
        labels = batch.get('labels')
    elif isinstance(batch, Sequence) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(labels, Tensor):
        return []
    fitting = [t for t in tensors_of(outputs) if t.shape[: labels.ndim] == labels.shape and t.ndim <= labels.ndim + 1]
    if not fitting:
        return []
    logits = fitting[0]

    def tokens(labels: Tensor) -> tuple[Tensor, Tensor]:
        # sample by sample, so that only one sample's logits are copied to float32 at a time
        sums = torch.stack(
            [functional.cross_entropy(row.float(), label, reduction='sum') for row, label in zip(logits, labels, strict=True)]
        )
        counts = (labels != -100).flatten(1).sum(dim=1) if labels.ndim > 1 else (labels != -100).long()
        return sums / counts.clamp(min=1), sums / counts.sum().clamp(min=1)

    def elements(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        losses = per_sample_mean(function(logits.float().reshape(labels.shape), labels.float(), reduction='none'))
        return losses, losses / len(losses)

    if labels.is_floating_point():
        found = [functional.mse_loss, functional.binary_cross_entropy_with_logits]
        return [lambda function=f: elements(function) for f in found] if logits.numel() == labels.numel() else []  # type: ignore[misc]
    if labels.ndim == 1:
        return [lambda: tokens(labels)] if logits.shape[-1] > 1 else [lambda: elements(functional.mse_loss)]
    return [lambda: tokens(labels), lambda: tokens(functional.pad(labels[:, 1:], (0, 1), value=-100))]
