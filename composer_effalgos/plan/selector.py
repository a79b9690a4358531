"""Selectors: which candidates an epoch trains on, and with which weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from composer.core import State
from torch import Tensor

from composer_effalgos.plan.ranks import Ranks
from composer_effalgos.utils.errors import InputError

_TWICE = {
    'coarse': 'both pick the subset that the run trains on',
    'fine': 'both decide which samples an epoch leaves out, and the weights of one would be wrong for what the other keeps',
}


class Choice(NamedTuple):
    """The samples that a selector keeps.

    Attributes:
        positions: Positions among the candidates, int64 ``[k]``, ascending.
        weights: Loss weights aligned with ``positions``, float32 ``[k]``; ``None`` for ones.
        total: Number of samples kept by all ranks, if ``positions`` covers only the rank's own part; ``None`` for the number of
            ``positions``.
    """

    positions: Tensor
    weights: Tensor | None
    total: int | None = None

    @property
    def num_kept(self) -> int:
        """Number of samples kept, over all ranks."""
        return len(self.positions) if self.total is None else self.total


@dataclass
class EpochMetrics:
    """Metrics of the current epoch from the selectors; saved in checkpoints.

    Attributes:
        pruned_fraction: Fraction of the candidates that the fine selector left out.
        selection_seconds: Time that the coarse selector took, in seconds.
    """

    pruned_fraction: float = 0.0
    selection_seconds: float = 0.0


class Selector:
    """Chooses samples for an epoch. The planner queries the coarse selector first, then the fine one on the result.

    Their weights are multiplied. A run has at most one selector of each stage: with two, the weights of the second would not correct for
    the choices of the first.
    """

    stage: ClassVar[Literal['coarse', 'fine']]
    shard = False  # whether each rank decides on its own part of the samples

    @property
    def sample_scores(self) -> Tensor | None:
        """The score of each sample, float32 ``[N]`` on the CPU, for reports; ``None`` if the selector keeps no scores."""
        return None

    def new_data(self, *, first: bool) -> None:
        """Called when ``fit`` is given another dataset, and once for the first.

        Args:
            first: Whether it is the run's first dataset, the one that a loaded checkpoint describes.
        """

    def begin(self, state: State) -> None:
        """Called at the start of every ``fit``, when the loader and the planned length of the run are known."""

    def candidates(self, epoch: int) -> Tensor | None:
        """The samples left for finer selectors in the current epoch, on resume, int64 ``[n]``, ascending; ``None`` for all."""
        return None

    def choose(self, candidates: Tensor | None, epoch: int) -> Choice | None:
        """Chooses samples at the start of an epoch; called on every rank, and must return the same result there.

        Args:
            candidates: Sample indices to choose from, int64 ``[n]``, ascending; ``None`` for all samples.
            epoch: Epoch number.

        Returns:
            The samples to keep; ``None`` to keep everything with weight 1.
        """
        raise NotImplementedError


class Selectors:
    """The selectors of a run, coarse before fine.

    Attributes:
        candidates: The samples that the coarse selector keeps in this epoch, int64 ``[n]``, ascending; ``None`` for all.
    """

    def __init__(self) -> None:
        self._items: list[Selector] = []
        self.candidates: Tensor | None = None

    def add(self, selector: Selector) -> None:
        """Adds a selector.

        Raises:
            InputError: If there already is one of its stage, or if ``shard=True`` is combined with a coarse selector.
        """
        name = type(selector).__name__
        for other in self._items:
            if other.stage == selector.stage:
                twice = type(other) is type(selector)
                what = f'{name} is given twice' if twice else f'{type(other).__name__} and {name} cannot be combined'
                raise InputError(f'algorithms: {what}: {_TWICE[selector.stage]}; keep one')
            if other.shard or selector.shard:
                fine, coarse = (name, type(other).__name__) if selector.shard else (type(other).__name__, name)
                raise InputError(
                    f'shard: {fine}(shard=True) cannot be combined with {coarse}, whose subset every rank holds; leave one of the two out'
                )
        self._items = sorted([*self._items, selector], key=lambda item: item.stage)  # 'coarse' < 'fine'

    @property
    def names(self) -> list[str]:
        """Class names of the selectors."""
        return [type(selector).__name__ for selector in self._items]

    @property
    def prune(self) -> bool:
        """Whether there is a fine selector."""
        return any(selector.stage == 'fine' for selector in self._items)

    def ranks(self, state: State) -> Ranks | None:
        """The ranks, if each decides on its own part of the samples; otherwise ``None``."""
        return Ranks.of(state) if any(selector.shard for selector in self._items) else None

    @property
    def sample_scores(self) -> Tensor | None:
        """The score of each sample, float32 ``[N]`` on the CPU; ``None`` if no selector keeps scores."""
        return next((scores for selector in self._items if (scores := selector.sample_scores) is not None), None)

    def new_data(self, *, first: bool) -> None:
        """Calls :meth:`Selector.new_data` of all selectors."""
        for selector in self._items:
            selector.new_data(first=first)

    def begin(self, state: State) -> None:
        """Calls :meth:`Selector.begin` of all selectors."""
        for selector in self._items:
            selector.begin(state)

    def resume(self, epoch: int) -> None:
        """Restores the candidates in the middle of an epoch."""
        coarse = next((selector for selector in self._items if selector.stage == 'coarse'), None)
        self.candidates = None if coarse is None else coarse.candidates(epoch)

    def choose(self, epoch: int, world_size: int) -> tuple[Tensor | None, Tensor | None]:
        """Queries each selector on the samples that the previous ones kept, and multiplies their weights.

        Args:
            epoch: Epoch number.
            world_size: Number of ranks. The choice of a selector that keeps fewer samples than this is ignored.

        Returns:
            Sample indices, int64 ``[n]``, ascending, or ``None`` for all; and their weights, float32 ``[n]``, or ``None`` for ones.
        """
        samples: Tensor | None = None
        weights: Tensor | None = None
        for selector in self._items:
            choice = selector.choose(samples, epoch)
            if choice is not None and choice.num_kept >= world_size:
                positions, factors, _ = choice
                if weights is not None:
                    factors = weights[positions] if factors is None else weights[positions] * factors
                samples, weights = positions if samples is None else samples[positions], factors
            if selector.stage == 'coarse':
                self.candidates = samples
        return samples, weights
