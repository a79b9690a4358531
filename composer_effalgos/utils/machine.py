"""What this process took of the machine, and what runs on it."""

from __future__ import annotations

import contextlib
import platform
import resource
import sys
import time
from collections.abc import Iterable
from importlib import metadata

import psutil
import torch
from composer import State


def cpu_seconds() -> float:
    """CPU time so far of this process and its children, those that have ended included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            times = child.cpu_times()
            total += times.user + times.system
    return total


def peak_memory_bytes(state: State) -> int:
    """Peak memory of this process: what CUDA tensors took on a GPU, else the resident set."""
    if state.device.name == 'gpu':
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024  # Linux counts in KiB


def versions(packages: Iterable[str] = ('composer-effalgos', 'mosaicml', 'torch', 'torchvision', 'cords')) -> dict[str, str]:
    """The versions of Python and of those packages that are installed.

    Args:
        packages: Names of distributions.

    Returns:
        Versions by name, with underscores for hyphens.
    """
    found = {'python': platform.python_version()}
    for name in packages:
        try:
            found[name.replace('-', '_')] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
