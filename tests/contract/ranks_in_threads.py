"""Ranks as threads of one process, for tests of what they do together."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from composer_effalgos.plan.ranks import Ranks


class ThreadRanks(Ranks):
    """A rank among threads: what is handed in lies in a list that all see."""

    def __init__(self, rank: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self._table, self._barrier = rank, len(table), table, barrier

    def _all(self, value: Any) -> list[Any]:
        self._table[self.rank] = value
        self._barrier.wait()
        found = list(self._table)
        self._barrier.wait()
        return found

    def total(self, values: Tensor) -> Tensor:
        assert values.dtype in (torch.int64, torch.float64)
        return torch.stack(self._all(values)).sum(dim=0)

    def swap(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        assert sum(counts) == len(values)
        return torch.cat([parts[self.rank] for parts in self._all(values.split(list(counts)))])

    def gather(self, values: Tensor) -> list[Tensor] | None:
        found = self._all(values)
        assert len({value.shape for value in found}) == 1
        return found if self.rank == 0 else None


def on_ranks(world_size: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """What a function of a rank gives on each of so many."""
    barrier, table = threading.Barrier(world_size), [None] * world_size

    def run(rank: int) -> Any:
        try:
            return function(ThreadRanks(rank, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(run, rank) for rank in range(world_size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]
