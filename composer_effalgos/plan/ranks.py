"""Communication between ranks that each hold a part of the samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed
from composer.core import State
from composer.utils import dist
from torch import Tensor

from composer_effalgos.utils.errors import InputError

_PIECE = 1 << 24  # rows of all ranks to gather at a time, to bound the memory


class Ranks:
    """Collective calls on CPU tensors. With one rank no communication takes place.

    Args:
        device: Device on which the process group requires its tensors.

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

        Raises:
            InputError: With FSDP's sharded checkpoints, which require state that is the same on every rank.
        """
        if state.fsdp_sharded_state_dict_enabled:
            raise InputError(
                "shard: cannot be combined with FSDP's sharded checkpoints, which need the same state on every rank; leave shard out, or "
                "set state_dict_type='full'"
            )
        return cls(state.device.tensor_to_device(torch.empty(0)).device)

    def total(self, values: Tensor) -> Tensor:
        """Sums a tensor over the ranks.

        Args:
            values: int64 or float64, of the same shape on all ranks.

        Returns:
            The sums, in the same shape.
        """
        if self.world_size == 1:
            return values
        values = values.to(self._device, copy=True)
        torch.distributed.all_reduce(values)
        return values.cpu()

    def swap(self, values: Tensor, counts: Sequence[int]) -> Tensor:
        """Sends each rank its part of a tensor (all-to-all).

        Args:
            values: ``[n]``: first the values for rank 0, then those for rank 1, and so on.
            counts: Number of values for each rank.

        Returns:
            The received values, first from rank 0, then from rank 1, and so on.
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
        """Gathers a tensor from every rank on rank 0.

        Args:
            values: Of the same shape on all ranks.

        Returns:
            The tensors of all ranks on rank 0; ``None`` on the others.
        """
        if self.world_size == 1:
            return [values]
        values = values.to(self._device)
        found = [torch.empty_like(values) for _ in range(self.world_size)] if self.rank == 0 else None
        torch.distributed.gather(values, found)
        return None if found is None else [part.cpu() for part in found]


def send(ranks: Ranks, to: Tensor, *columns: Tensor) -> list[Tensor]:
    """Sends rows to their destination ranks; a collective call.

    Args:
        ranks: The ranks.
        to: Destination rank of each row, integer ``[n]``.
        *columns: The values of each row, ``[n]`` each.

    Returns:
        The received values of each column, ``[m]``, ordered by sender and then in the sender's order.
    """
    if ranks.world_size == 1:
        return list(columns)
    counts = torch.bincount(to, minlength=ranks.world_size).tolist()
    # NumPy uses a radix sort for 16-bit integers, which is much faster
    order = torch.from_numpy(np.argsort(to.numpy().astype(np.uint16 if ranks.world_size < 2**16 else np.int64), kind='stable'))
    order = order.int() if len(order) < 2**31 else order  # int32 if possible, to save memory
    return [ranks.swap(column.index_select(0, order), counts) for column in columns]


def whole(ranks: Ranks, part: Tensor, size: int) -> Tensor | None:
    """Gathers rows that are distributed round-robin over the ranks on rank 0, in pieces; a collective call.

    Args:
        ranks: The ranks.
        part: This rank's rows, ``[..., ceil((size - rank) / W)]``.
        size: Number of rows over all ranks.

    Returns:
        On rank 0 the rows of all ranks, ``[..., size]``, of which rank ``r`` held every ``W``-th, starting with the ``r``-th; ``None`` on
        the others.
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
