"""What a classifier's batch and outputs say: one class per sample, and the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from composer_effalgos.utils.errors import InputError

NO_CLASS = torch.iinfo(torch.int64).min  # marks a sample with several labels or several regression targets
_LABEL_KEYS = ('labels', 'label', 'targets', 'target', 'y')


def logits_and_classes(outputs: Any, batch: Any, key: str, hint: str = '') -> tuple[Tensor, Tensor]:
    """A classifier's logits, float ``[B, C]``, and class indices, int64 ``[B]``, which may be ``NO_CLASS``.

    Args:
        outputs: The model's outputs: logits, or a mapping with a key ``logits``.
        batch: The batch.
        key: What needs a classifier, such as ``rule``; starts the message.
        hint: What to use instead; ends the message.

    Raises:
        InputError: If the model is not a classifier.
    """
    logits = outputs.get('logits') if isinstance(outputs, Mapping) else outputs
    labels = labels_of(batch)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels) or labels.is_floating_point():
        raise InputError(
            f'{key}: expected a classifier for this {key}, whose outputs are logits [B, C] and whose labels are class indices [B]'
            + (f'; {hint}' if hint else '')
        )
    return logits, labels


def labels_of(batch: Any) -> Tensor:
    """Returns one label per sample of a batch.

    Args:
        batch: ``(inputs, labels)``, or a mapping with a key ``labels``.

    Returns:
        Class indices, int64 ``[B]``: integer labels, or the argmax of soft labels ``[B, C]`` (non-negative rows that sum to 1);
        ``NO_CLASS`` for other rows, such as multi-label targets or several regression targets. Floating-point labels with one number
        per sample, as in regression, are returned as float32 ``[B]``.

    Raises:
        InputError: If there are no labels, or they have another shape.
    """
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    else:
        labels = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    if not isinstance(labels, Tensor):
        raise InputError("batch: expected (inputs, labels) or a mapping with a key 'labels', got no labels")
    labels = labels.detach()
    labels = labels.int() if labels.dtype == torch.bool else labels
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        return torch.where(_are_distributions(labels), labels.argmax(dim=1), NO_CLASS)
    if labels.ndim != 1:
        raise InputError(f'batch: expected class indices [B] or soft labels [B, C], got labels {labels.dtype} {list(labels.shape)}')
    return labels.float() if labels.is_floating_point() else labels.long()


def _are_distributions(rows: Tensor) -> Tensor:
    """Which rows are non-negative and sum to 1, up to rounding in their dtype."""
    tolerance = max(1e-3, torch.finfo(rows.dtype).eps) if rows.is_floating_point() else 0
    return (rows >= 0).all(dim=1) & ((rows.float().sum(dim=1) - 1).abs() <= tolerance)
