"""What a pruning rule is: how a sample is scored, and which samples an epoch keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from composer_effalgos.plan import SampleRows

Kept = tuple[Tensor, Tensor | None]
"""Positions in the table, int64 ``[k]`` ascending, and their loss weights, float32 ``[k]``, or ``None`` for ones."""


class Step:
    """One microbatch, as it is trained on.

    Attributes:
        losses: The loss of each sample, float32 ``[B]``, detached, on the training device.
        outputs: What the model gave.
        batch: The microbatch.
    """

    def __init__(self, losses: Tensor, outputs: Any, batch: Any, samples: Tensor) -> None:
        self.losses, self.outputs, self.batch, self._samples = losses, outputs, batch, samples

    @property
    def samples(self) -> Tensor:
        """Their indices in the dataset, int64 ``[B]``, on the device of the losses."""
        return self._samples.to(self.losses.device, non_blocking=True)


@dataclass(frozen=True)
class Epoch:
    """The epoch that is decided on.

    Attributes:
        number: Counted from 0.
        total: Epochs of the run; ``None`` where its length is not in epochs.
        progress: The share of the run that has passed, in [0, 1).
        prune_ratio: The fraction to prune now.
        generator: The only source of randomness; the same on every rank, another in each epoch.
        labels: Class indices aligned with the table, int64 ``[n]``, where the rule needs them or the user gave them.
    """

    number: int
    total: int | None
    progress: float
    prune_ratio: float
    generator: torch.Generator
    labels: Tensor | None = None

    def draw(self, size: int, count: int) -> Tensor:
        """Draws ``count`` of ``size`` positions without replacement: int64 ``[count]``, in random order."""
        return torch.randperm(size, generator=self.generator)[:count]


class PruningRule:
    """Scores samples while they are trained on, and decides before each epoch which of them to keep.

    A rule is a pure function of the table and the epoch. Delta, exchange between ranks, checkpoints and new data are not its affair, and
    the table holds an epoch's candidates only: with a coarse selector, positions are positions among its samples.

    Attributes:
        history: Scores of each sample that the table keeps, the newest first. With 0 nothing is scored: the rule prunes from the first
            epoch on, and the model's loss needs no per-sample form.
        decay: Weight of the old score, where the score is an exponential moving average; 0 keeps the last one.
        uses_ratio: Whether ``prune_ratio`` decides how many are pruned, so that 0 prunes none.
        needs_labels: Whether ``keep`` needs ``epoch.labels``.
        takes_unscored: Whether the table may hold samples without a score. Otherwise ``keep`` does not see them, and they are kept.
    """

    history: int = 1
    decay: float = 0.0
    uses_ratio: bool = True
    needs_labels: bool = False
    takes_unscored: bool = False

    def new_data(self, num_samples: int) -> None:
        """Called when the dataset is known, and when ``fit`` brings another.

        Args:
            num_samples: Its number of samples, ``N``.
        """

    def score(self, step: Step) -> Tensor:
        """Scores a microbatch, without moving anything to the host.

        Args:
            step: The microbatch.

        Returns:
            One number a sample, float ``[B]``; NaN and inf are kept as inf.
        """
        return step.losses

    def keep(self, table: SampleRows, epoch: Epoch) -> Kept | None:
        """Decides which samples the epoch trains on.

        Args:
            table: One row a sample, on the CPU: ``scores`` float32 ``[n]``, ``history`` float32 ``[H, n]``, ``trained`` int32 ``[n]``.
            epoch: The epoch.

        Returns:
            Positions and weights of the kept; ``None`` to keep everything.
        """
        raise NotImplementedError

    def keep_at_end(self, table: SampleRows, epoch: Epoch) -> Kept | None:
        """Decides in the last ``1 - delta`` of the run, where everything is kept unless a rule says otherwise."""
        return None


def highest(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest scores, ascending; of equal ones those that come first.

    Args:
        scores: Float ``[n]``.
        count: How many.

    Returns:
        Int64 ``[count]``.
    """
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def num_kept(size: int, prune_ratio: float) -> int:
    """How many of ``size`` samples a fraction of ``prune_ratio`` leaves, at least one."""
    return max(1, round(size * (1 - prune_ratio)))
