"""What the ranks tell each other where each of them keeps a part of the samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed
from composer.core import State
from composer.utils import dist
from torch import Tensor

from composer_effalgos.utils.errors import InputError

_PIECE = 1 << 24  # rows of all ranks that are gathered at a time


class Ranks:
    """Collective calls on tensors of the CPU; with one rank nothing is called.

    Args:
        device: Where the process group wants its tensors.

    Attributes:
        rank: This process's global rank.
        world_size: Number of ranks.
    """

    def __init__(self, device: torch.device | str = 'cpu') -> None:
        self._device = torch.device(device)
        self.rank, self.world_size = dist.get_global_rank(), dist.get_world_size()

    @classmethod
    def of(cls, state: State) -> Ranks:
        """The ranks of a run.

        Args:
            state: The trainer's state.

        Raises:
            InputError: With FSDP's sharded checkpoints, which save what is the same on every rank.
        """
        if state.fsdp_sharded_state_dict_enabled:
            raise InputError(
                "shard: cannot be combined with FSDP's sharded checkpoints, which hold what is the same on every rank; leave shard out, or "
                "set state_dict_type='full'"
            )
        return cls(state.device.tensor_to_device(torch.empty(0)).device)

    def total(self, values: Tensor) -> Tensor:
        """Sums over the ranks.

        Args:
            values: int64 or float64, of one shape on all ranks.

        Returns:
            The sums, in the same shape.
        """
        if self.world_size == 1:
            return values
        values = values.to(self._device, copy=True)
        torch.distributed.all_reduce(values)
        return values.cpu()

    def swap(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Hands each rank its part.

        Args:
            values: ``[n]``: first what goes to rank 0, then what goes to rank 1, and so on.
            counts: How many go to each rank.

        Returns:
            What came, first from rank 0, then from rank 1, and so on.
        """
        if self.world_size == 1:
            return values
        sent, due = torch.tensor(counts, device=self._device), torch.empty(self.world_size, dtype=torch.int64, device=self._device)
        torch.distributed.all_to_all_single(due, sent)
        coming = due.tolist()
        came = torch.empty(sum(coming), dtype=values.dtype, device=self._device)
        torch.distributed.all_to_all_single(came, values.to(self._device), coming, list(counts))
        return came.cpu()

    def gather(self, values: Tensor) -> list[Tensor] | None:
        """Brings a tensor of every rank to rank 0.

        Args:
            values: Of one shape on all ranks.

        Returns:
            On rank 0 those of all ranks; ``None`` on the others.
        """
        if self.world_size == 1:
            return [values]
        values = values.to(self._device)
        found = [torch.empty_like(values) for _ in range(self.world_size)] if self.rank == 0 else None
        torch.distributed.gather(values, found)
        return None if found is None else [part.cpu() for part in found]


def send(ranks: Ranks, to: Tensor, *columns: Tensor) -> list[Tensor]:
    """Sends rows to the ranks that they are for; a collective call.

    Args:
        ranks: The ranks.
        to: Rank of each row, of whole numbers, ``[n]``.
        *columns: What is sent of each row, ``[n]``.

    Returns:
        What came of each column, ``[m]``: by sender, and in the sender's order.
    """
    if ranks.world_size == 1:
        return list(columns)
    counts = torch.bincount(to, minlength=ranks.world_size).tolist()
    # NumPy sorts integers of 16 bits by counting them
    order = torch.from_numpy(np.argsort(to.numpy().astype(np.uint16 if ranks.world_size < 2**16 else np.int64), kind='stable'))
    order = order.int() if len(order) < 2**31 else order  # half as wide where that is enough
    return [ranks.swap(column.index_select(0, order), counts) for column in columns]


def whole(ranks: Ranks, part: Tensor, size: int) -> Tensor | None:
    """Puts rows that are dealt out to the ranks in turn together on rank 0, piece by piece; a collective call.

    Args:
        ranks: The ranks.
        part: This rank's rows, ``[..., ceil((size - rank) / W)]``.
        size: Rows of all ranks.

    Returns:
        On rank 0 the rows of all ranks, ``[..., size]``, of which rank ``r`` had every ``W``-th from the ``r``-th; ``None`` on the others.
    """
    found = torch.empty((*part.shape[:-1], size), dtype=part.dtype) if ranks.rank == 0 else None
    for row in np.ndindex(part.shape[:-1]):
        most, step = -(-size // ranks.world_size), -(-_PIECE // ranks.world_size)
        for start in range(0, most, step):
            stop = min(start + step, most)
            piece = torch.zeros(stop - start, dtype=part.dtype)
            mine = part[row][start:stop]
            piece[: len(mine)] = mine
            for rank, rows in enumerate(ranks.gather(piece.view(torch.uint8)) or ()):
                assert found is not None
                place = found[row][start * ranks.world_size + rank : stop * ranks.world_size : ranks.world_size]
                place.copy_(rows.view(part.dtype)[: len(place)])
    return found
