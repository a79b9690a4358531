"""What the planner asks each epoch: which of the candidates are trained on, with which weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from composer.core import State
from torch import Tensor


class Choice(NamedTuple):
    """What a selector keeps.

    Attributes:
        positions: Positions among the candidates, int64 ``[k]``, ascending.
        weights: Loss weights aligned with ``positions``, float32 ``[k]``; ``None`` for ones.
    """

    positions: Tensor
    weights: Tensor | None


@dataclass
class EpochMetrics:
    """What the selectors measured of the current epoch; part of the checkpoint.

    Attributes:
        pruned_fraction: Fraction of the candidates that the fine selector left out.
        selection_seconds: Time that the coarse selector took.
    """

    pruned_fraction: float = 0.0
    selection_seconds: float = 0.0


class Selector:
    """Chooses samples for an epoch. The planner asks the coarse selector first, then the fine one among what is left; weights multiply.

    A run has at most one of each stage: a second one would decide on the epochs of the first, with weights that correct for nothing.
    """

    stage: ClassVar[Literal['coarse', 'fine']]

    @property
    def sample_scores(self) -> Tensor | None:
        """The score of each sample, float32 ``[N]`` on the CPU, for reports; ``None`` where the selector keeps none."""
        return None

    def new_data(self, *, first: bool) -> None:
        """Called when ``fit`` brings another data set, and once for the first.

        Args:
            first: Whether it is the run's first data set, which a loaded checkpoint describes.
        """

    def begin(self, state: State) -> None:
        """Called at the start of every ``fit``, when the loader and the planned length of the run are known."""

    def candidates(self, epoch: int) -> Tensor | None:
        """The samples that are left to finer selectors in the middle of an epoch, int64 ``[n]`` ascending; ``None`` for all."""
        return None

    def choose(self, candidates: Tensor | None, epoch: int) -> Choice | None:
        """Chooses at the start of an epoch; called on every rank, with the same result.

        Args:
            candidates: Sample indices to choose from, int64 ``[n]``, ascending; ``None`` for all samples.
            epoch: Number of the epoch.

        Returns:
            What to keep; ``None`` to keep everything with weight 1.
        """
        raise NotImplementedError
