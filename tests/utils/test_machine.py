import json
import subprocess
import sys

MIB = 2**20

CHILD = """
import json, psutil, torch
from composer_effalgos.utils.machine import peak_resident_bytes
resident = psutil.Process().memory_info
before = peak_resident_bytes()
tensor = torch.ones(2**26)
held = resident().rss
del tensor
print(json.dumps([before, held, resident().rss, peak_resident_bytes()]))
"""


def test_the_peak_is_this_processes_own_and_stays_when_memory_is_given_back():
    """Linux hands the peak of the resident set on to a program that a large process starts, here one of 2 GiB."""
    parent = f'import subprocess, sys; data = bytearray(b"1") * 2**31; subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)'
    said = subprocess.run([sys.executable, '-c', parent], check=True, stdout=subprocess.PIPE, text=True).stdout
    before, held, after, peak = json.loads(said)
    assert before < 2048 * MIB
    assert held - 4 * MIB <= peak <= held + 64 * MIB
    assert after < peak - 200 * MIB
