"""RHO: keeps samples whose loss can still be reduced."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from composer_effalgos.plan import SampleRows
from composer_effalgos.pruning.rules.rule import Epoch, Kept, PruningRule, Step, highest, num_kept
from composer_effalgos.utils.errors import InputError


@dataclass
class RhoRule(PruningRule):
    """Keeps the samples with the highest reducible loss: the last loss minus the irreducible loss.

    The irreducible loss of a sample is its loss under a small model trained on held-out data, see
    :func:`~composer_effalgos.pruning.irreducible.irreducible_losses`. An epoch-wise form of Mindermann et al., "Prioritized Training on
    Points that are Learnable, Worth Learning, and Not Yet Learnt", ICML 2022, arXiv 2206.07137, which selects within a large batch.

    Args:
        irreducible: One number per training sample, ``[N]``; or a file that contains them: ``.npy``, or ``.parquet`` or ``.safetensors``
            with one column.
    """

    irreducible: Tensor | str | Path = field(default='', repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.irreducible, str | Path):
            if not str(self.irreducible):
                raise InputError('rule.irreducible: missing; expected a tensor [N], or a .npy, .parquet or .safetensors file')
            losses = read_numbers(Path(self.irreducible))
        else:
            losses = torch.as_tensor(self.irreducible)
        if losses.ndim != 1 or not losses.dtype.is_floating_point or not bool(torch.isfinite(losses).all()):
            raise InputError(f'rule.irreducible: expected finite numbers [N], got {losses.dtype} {tuple(losses.shape)}, or some not finite')
        self._losses = losses.float()

    def new_data(self, num_samples: int) -> None:
        if len(self._losses) != num_samples:
            raise InputError(f'rule.irreducible: expected one number for each of {num_samples} training samples, got {len(self._losses)}')

    def score(self, step: Step) -> Tensor:
        self._losses = self._losses.to(step.losses.device)  # once
        return step.losses - self._losses[step.samples]

    def keep(self, table: SampleRows, epoch: Epoch) -> Kept:
        return highest(table.scores, num_kept(len(table), epoch.prune_ratio)), None


def read_numbers(path: Path) -> Tensor:
    """Reads one number per sample from a file.

    Raises:
        InputError: If the file cannot be read or has another format.
    """
    try:
        if path.suffix == '.npy':
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == '.parquet':
            import pyarrow.parquet as pq

            (column,) = pq.read_table(path).columns
            return torch.from_numpy(np.array(column))  # copy, because Arrow's memory is read-only
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file

            (values,) = load_file(path).values()
            return values
    except Exception as error:  # damaged files can raise anything
        raise InputError(
            f'rule.irreducible: {path}: cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})'
        ) from error
    raise InputError(f'rule.irreducible: expected a .npy, .parquet or .safetensors file, got {path}')
