"""Separate random streams for parts of a run."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomStream:
    """A context with its own random states of Python, NumPy and PyTorch (on the CPU). Each entry continues the stream.

    Args:
        seed: Seed of the stream, in [0, 2**63).
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inside: tuple[Any, ...] | None = None
        self._outside: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        self._outside = random_states()
        if self._inside is not None:
            restore_random(self._inside)
            return
        torch.default_generator.manual_seed(self._seed)  # torch.manual_seed would also seed the GPUs
        np.random.seed(self._seed % 2**32)
        random.seed(self._seed)

    def __exit__(self, *exception: object) -> None:
        self._inside = random_states()
        restore_random(self._outside)


def random_states() -> tuple[Any, ...]:
    """The states of PyTorch's generator on the CPU, NumPy's and Python's."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def restore_random(states: tuple[Any, ...]) -> None:
    """Restores the states returned by :func:`random_states`."""
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def is_random_state(states: tuple[Any, ...]) -> bool:
    """Whether the random states are still those returned by :func:`random_states`."""
    now = random_states()
    numpy_alike = np.array_equal(states[1][1], now[1][1]) and states[1][2:] == now[1][2:]
    return torch.equal(states[0], now[0]) and numpy_alike and states[2] == now[2]
