"""The interface of pruning rules: how a sample is scored, and which samples an epoch keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from composer_effalgos.plan import Choice, SampleRows, Shard
from composer_effalgos.utils.errors import InputError
from composer_effalgos.utils.text import described, shown

Kept = tuple[Tensor, Tensor | None]
"""Positions in the table, int64 ``[k]`` ascending, and their loss weights, float32 ``[k]``, or ``None`` for ones."""


class Step:
    """One training microbatch.

    Attributes:
        losses: The loss of each sample, float32 ``[B]``, detached, on the training device.
        outputs: The model's outputs.
        batch: The microbatch.
    """

    def __init__(self, losses: Tensor, outputs: Any, batch: Any, samples: Tensor) -> None:
        self.losses, self.outputs, self.batch, self._samples = losses, outputs, batch, samples

    @property
    def samples(self) -> Tensor:
        """Indices of the samples in the dataset, int64 ``[B]``, on the device of the losses."""
        return self._samples.to(self.losses.device, non_blocking=True)


@dataclass(frozen=True)
class Epoch:
    """The epoch for which a rule decides.

    Attributes:
        number: Counted from 0.
        total: Number of epochs of the run; ``None`` if its length is not in epochs.
        progress: The finished fraction of the run, in [0, 1).
        prune_ratio: The fraction to prune in this epoch.
        generator: The only source of randomness; the same on every rank, different in each epoch.
        labels: Class indices aligned with the table, int64 ``[n]``, if the rule needs them or the user passed them.
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

    def draw_seed(self) -> int:
        """Draws a seed, in [0, 2**62)."""
        return int(torch.randint(2**62, (), generator=self.generator))


class PruningRule:
    """Scores samples while they are trained on, and decides before each epoch which of them to keep.

    A rule is a pure function of the table and the epoch. ``Pruning`` handles delta, communication between ranks, checkpoints and new
    datasets. The table contains only the candidates of the epoch: with a coarse selector, positions refer to its samples.

    Attributes:
        history: Number of scores per sample that the table keeps, newest first. With 0 nothing is scored: the rule prunes from the first
            epoch on, and the model's loss needs no per-sample form.
        decay: Weight of the old score in an exponential moving average; 0 keeps only the last score.
        uses_ratio: Whether ``prune_ratio`` determines how many samples are pruned, so that 0 prunes none.
        needs_labels: Whether ``keep`` needs ``epoch.labels``.
        takes_unscored: Whether ``keep`` handles samples without a score. Otherwise it does not see them, and they are kept.
        pointwise: Whether ``keep`` decides on each row from that row and the epoch's numbers only, without ``epoch.generator`` or
            statistics of other rows. It then decides the same on any part of the table and works with ``shard=True`` unchanged.
    """

    history: int = 1
    decay: float = 0.0
    uses_ratio: bool = True
    needs_labels: bool = False
    takes_unscored: bool = False
    pointwise: bool = False

    def new_data(self, num_samples: int) -> None:
        """Called when the dataset is known, and when ``fit`` gets another one.

        Args:
            num_samples: Number of samples in the dataset, ``N``.
        """

    def score(self, step: Step) -> Tensor:
        """Scores a microbatch; must not move data to the host.

        Args:
            step: The microbatch.

        Returns:
            One number per sample, float ``[B]``; NaN and inf are stored as inf.
        """
        return step.losses

    def keep(self, table: SampleRows, epoch: Epoch) -> Kept | None:
        """Decides which samples the epoch trains on.

        Args:
            table: One row per sample, on the CPU: ``scores`` float32 ``[n]``, ``history`` float32 ``[H, n]``, ``trained`` int32 ``[n]``.
            epoch: The epoch.

        Returns:
            ``(positions, weights)``: the rows to keep, int64 ``[k]``, ascending, without duplicates (for a mask, ``mask.nonzero()[:, 0]``);
            and their loss weights, float ``[k]``, finite, or ``None`` for ones. Return ``None`` instead of the pair to keep everything.
        """
        raise NotImplementedError

    def keep_part(self, table: SampleRows, epoch: Epoch, shard: Shard) -> Kept | None:
        """Decides on this rank's part of the samples if the table is sharded; called on all ranks at once.

        A rule that is not ``pointwise`` works with ``shard=True`` if it defines this method and handles samples without a score. ``shard``
        provides statistics over all ranks, and random numbers that do not depend on the number of ranks.

        Args:
            table: The rows of this rank's samples.
            epoch: The epoch; its generator is in the same state on every rank.
            shard: This rank's part of the samples.

        Returns:
            As for :meth:`keep`, for the rows in ``table``.
        """
        return self.keep(table, epoch)

    def keep_at_end(self, table: SampleRows, epoch: Epoch) -> Kept | None:
        """Decides in the last ``1 - delta`` of the run; by default everything is kept."""
        return None


def highest(scores: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` highest scores, ascending; ties are broken by position.

    Args:
        scores: Float ``[n]``.
        count: How many.

    Returns:
        Int64 ``[count]``.
    """
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def num_kept(size: int, prune_ratio: float) -> int:
    """Number of samples that remain of ``size`` after pruning a fraction of ``prune_ratio``, at least one."""
    return max(1, round(size * (1 - prune_ratio)))


def check_kept(rule: PruningRule, answer: Any, size: int) -> Choice | None:
    """Checks the return value of a rule's ``keep`` or ``keep_at_end``.

    Args:
        rule: The rule, for the message.
        answer: The return value.
        size: Number of rows of the table that it received.

    Returns:
        The return value, with weights in float32.

    Raises:
        InputError: If it is not of the documented form.
    """
    if answer is None:
        return None
    name = f'{type(rule).__name__}.keep'
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise InputError(
            f'{name}: expected (positions, weights), an int64 tensor [k] and a float tensor [k] or None, got {described(answer)}; '
            'for a mask, return (mask.nonzero()[:, 0], None)'
        )
    positions, weights = answer
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64 or positions.ndim != 1:
        raise InputError(f'{name}: expected positions as an int64 tensor [k], got {described(positions)}; for a mask, mask.nonzero()[:, 0]')
    positions = positions.cpu()
    if len(positions) and (int(positions[0]) < 0 or int(positions[-1]) >= size or not bool((positions[1:] > positions[:-1]).all())):
        raise InputError(
            f'{name}: expected positions from 0 to {size - 1}, ascending, without duplicates, got {shown(positions.tolist())}; they are '
            'positions in the table, not sample numbers'
        )
    if weights is None:
        return Choice(positions, None)
    if not isinstance(weights, Tensor) or weights.shape != positions.shape or not bool(torch.isfinite(weights).all()):
        some = ', some not finite' if isinstance(weights, Tensor) and weights.shape == positions.shape else ''
        raise InputError(f'{name}: expected weights as {len(positions)} finite numbers or None, got {described(weights)}{some}')
    return Choice(positions, weights.cpu().float())
