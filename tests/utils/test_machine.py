import subprocess
import sys

import psutil
import torch

from composer_effalgos.utils.machine import peak_resident_bytes

MIB = 2**20


def test_the_peak_stays_when_memory_is_given_back():
    before = peak_resident_bytes()
    tensor = torch.ones(2 * before // 4)  # twice as much as ever before
    held = psutil.Process().memory_info().rss
    del tensor
    assert held - 4 * MIB <= peak_resident_bytes() <= held + 64 * MIB
    assert psutil.Process().memory_info().rss < peak_resident_bytes() - before


def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    """Linux hands the peak of the resident set on to a program that a large process starts."""
    small = 'from composer_effalgos.utils.machine import peak_resident_bytes; print(peak_resident_bytes())'
    large = f'import subprocess, sys; data = bytearray(b"1") * 2**31; subprocess.run([sys.executable, "-c", {small!r}], check=True)'
    said = subprocess.run([sys.executable, '-c', large], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert 0 < int(said) < 2**31
