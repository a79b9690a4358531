"""Batch sizes: what a policy requests, limited by the data, the ranks and ``max_batch_size``."""

from __future__ import annotations

import math
from typing import NamedTuple

from composer_effalgos.adabatch.policies import Policy
from composer_effalgos.adabatch.schedules import LARGEST_SIZE, SizePolicy
from composer_effalgos.adabatch.seesaw import Seesaw
from composer_effalgos.plan import PlannedDataLoader
from composer_effalgos.plan.progress import Progress
from composer_effalgos.utils.errors import InputError, TooFewSamplesError


class Size(NamedTuple):
    """A batch size.

    Attributes:
        samples: Samples per rank.
        asked: Growths that the policy has requested; 0 for a schedule.
        growths: Growths that the limits allow; 0 for a schedule.
        refused: The reason, if the limits allow less than was requested; otherwise empty.
    """

    samples: int = 0
    asked: int = 0
    growths: int = 0
    refused: str = ''


class Sizes:
    """Computes batch sizes per rank.

    Args:
        policy: Requests growths or sizes.
        growth_factor: Factor of the size at each growth.
        max_batch_size: Largest size per rank; ``None`` for no limit.
        over_ranks: Whether the sizes of a schedule are global.
    """

    def __init__(self, policy: Policy | SizePolicy, growth_factor: float, max_batch_size: int | None, *, over_ranks: bool) -> None:
        self._policy, self._factor, self._most, self._over_ranks = policy, growth_factor, max_batch_size, over_ranks

    def at(self, progress: Progress, loader: PlannedDataLoader, available: int | None, asked: int) -> Size:
        """The batch size at a point of the run.

        Args:
            progress: The point.
            loader: The planned loader.
            available: Number of samples over all ranks; ``None`` if unknown.
            asked: Growths requested earlier.
        """
        wanted, initial = self._policy(progress), loader.initial_batch_size
        limit, why = self._limit(loader, available)
        if isinstance(self._policy, SizePolicy):
            size = initial if wanted is None else self.per_rank(wanted, loader.world_size)
            return Size(min(size, limit), refused=_refusal(size, why, limit) if size > limit else '')
        if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 0:
            raise InputError(f'policy: expected the number of growths by now, a whole number of at least 0, got {wanted!r}')
        wanted = wanted if isinstance(self._policy, Seesaw) else max(asked, wanted)
        growths = min(wanted, math.ceil(math.log((limit + 1) / initial, self._factor)))
        while round(initial * self._factor**growths) > limit:
            growths -= 1
        size, next_size = (round(initial * self._factor**number) for number in (growths, growths + 1))
        return Size(size, wanted, growths, _refusal(next_size, why, size) if growths < wanted else '')

    def smallest(self, loader: PlannedDataLoader) -> int:
        """The smallest batch size per rank of the run, as far as it is known."""
        return min([loader.initial_batch_size, *(self.per_rank(size, loader.world_size) for size in self.known)])

    @property
    def known(self) -> list[int]:
        """All sizes that a schedule may return, as far as they are known."""
        return list(self._policy.known_sizes) if isinstance(self._policy, SizePolicy) else []

    def check_known(self, loader: PlannedDataLoader) -> None:
        """Rejects a schedule with sizes that the dataset or the ranks do not allow.

        Raises:
            InputError: If there is such a size, or no limit for Seesaw on data of unknown length.
        """
        if loader.num_samples is None and self._most is None and isinstance(self._policy, Seesaw):
            raise InputError('max_batch_size: expected one with seesaw and data of unknown length; the batch would grow without limit')
        for place, size in enumerate(self.known, 1):
            per_rank = self.per_rank(size, loader.world_size)
            if loader.num_samples is not None and per_rank * loader.world_size > loader.num_samples:
                most = loader.num_samples if self._over_ranks else loader.num_samples // loader.world_size
                raise TooFewSamplesError(
                    f'schedule: size {place}: expected at most {most}, with {loader.num_samples} samples in the dataset, got {size}'
                )

    def per_rank(self, size: int, world_size: int) -> int:
        """Converts a schedule's size to samples per rank.

        Raises:
            InputError: If a global size is not a multiple of ``world_size``.
        """
        if self._over_ranks and size % world_size:
            raise InputError(
                f'schedule: expected global sizes that {world_size} ranks can share, got {size}; give multiples of {world_size}'
            )
        return size // world_size if self._over_ranks else size

    def _limit(self, loader: PlannedDataLoader, available: int | None) -> tuple[int, str]:
        """The largest batch size per rank, and what determines it."""
        limit, why = LARGEST_SIZE, 'the largest size there is'
        if available is not None:
            limit, why = max(loader.initial_batch_size, available // loader.world_size), f'the {available} samples there are'
        if self._most is not None and self._most < limit:
            limit, why = max(loader.initial_batch_size, self._most), f'max_batch_size {self._most}'
        return limit, why


def _refusal(larger: int, why: str, size: int) -> str:
    return f'growing to {larger} samples per rank would pass {why}; the batch stays at {size}'
