"""Resource usage of this process, and versions of the software."""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import resource
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import psutil
import torch
from composer import State


def cpu_seconds() -> float:
    """CPU time used so far by this process and its children, including those that have exited, in seconds."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has exited in the meantime
            times = child.cpu_times()
            total += times.user + times.system
    return total


def peak_memory_bytes(state: State) -> int:
    """Peak memory of this process: of CUDA tensors on a GPU, otherwise the resident set."""
    return torch.cuda.max_memory_allocated() if state.device.name == 'gpu' else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Peak resident memory of this process."""
    status = Path('/proc/self/status')
    if status.exists():  # Linux's ru_maxrss starts from the peak of the process that started this one
        found = re.search(r'^VmHWM:\s*(\d+) kB$', status.read_text(encoding='ascii', errors='replace'), re.MULTILINE)
        if found is not None:
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024  # Linux counts in KiB


def versions(packages: Iterable[str] = ('composer-effalgos', 'mosaicml', 'torch', 'torchvision', 'cords')) -> dict[str, str]:
    """The versions of Python and of the installed ones among some packages, by name, with underscores for hyphens."""
    found = {name.replace('-', '_'): _version(name) for name in packages}
    return {'python': platform.python_version()} | {name: version for name, version in found.items() if version is not None}


@functools.cache  # a look takes milliseconds, and summaries are written several times an epoch
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
