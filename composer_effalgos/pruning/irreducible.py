"""Irreducible losses for the rule ``rho``."""

from __future__ import annotations

from typing import Any

import torch
from composer.models import ComposerModel
from composer.utils import get_device
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from composer_effalgos.plan import PerSampleLoss, WeightedLoss, per_sample_mean
from composer_effalgos.plan.order import check_collate
from composer_effalgos.utils.errors import InputError


def irreducible_losses(
    model: ComposerModel, dataloader: DataLoader[Any], *, per_sample_loss: PerSampleLoss | None = None, device: str | None = None
) -> Tensor:
    """The loss of every training sample under a model that was trained on other data.

    First train a small model on held-out data. Then pass its losses to the rule: ``Pruning({'name': 'rho', 'irreducible': losses})``, or
    save them with ``numpy.save`` for a recipe.

    Args:
        model: The trained small model.
        dataloader: The training dataset in its own order: ``shuffle=False``, without augmentation.
        per_sample_loss: ``(outputs, batch) -> [B, ...]``; ``None`` to derive it from the model's own loss.
        device: ``'cpu'`` or ``'gpu'``; ``None`` for a GPU if available.

    Returns:
        Float32 ``[N]``, on the CPU.

    Raises:
        InputError: If the loader shuffles, drops samples or reorders them within a batch, or if the loss has no per-sample form.
    """
    if not isinstance(dataloader.sampler, SequentialSampler):
        raise InputError(f'dataloader: expected the samples in their own order (shuffle=False), got {type(dataloader.sampler).__name__}')
    loss = WeightedLoss(model, per_sample_loss, user='irreducible_losses')
    on = get_device(device)
    model = on.module_to_device(model).eval()
    data: Any = dataloader.dataset
    few = range(min(len(data), 8))
    check_collate(dataloader.collate_fn, [data[index] for index in few], len(few), 0)
    losses = []
    for batch in dataloader:
        batch = on.batch_to_device(batch)
        # no torch.no_grad(): per-sample losses may have to be read from the graph
        losses.append(per_sample_mean(loss.per_sample(model(batch), batch)).detach().float().cpu())
    found = torch.cat(losses)
    if len(found) != len(dataloader.dataset):  # type: ignore[arg-type]
        raise InputError(f'dataloader: expected all {len(dataloader.dataset)} samples, got {len(found)}; leave drop_last out')  # type: ignore[arg-type]
    return found
