"""Random numbers of their own for parts of a run, beside those of the process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomStream:
    """The random numbers of Python, NumPy and PyTorch (on the CPU) while it is entered; they go on where they were left.

    Args:
        seed: Of the stream, in [0, 2**63).
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inside: tuple[Any, ...] | None = None
        self._outside: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        self._outside = _states()
        if self._inside is not None:
            _restore(self._inside)
            return
        torch.default_generator.manual_seed(self._seed)  # not torch.manual_seed, which would seed the GPUs too
        np.random.seed(self._seed % 2**32)
        random.seed(self._seed)

    def __exit__(self, *exception: object) -> None:
        self._inside = _states()
        _restore(self._outside)


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _restore(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
