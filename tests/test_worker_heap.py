"""A worker's heap after loading: what was freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Blocks too small for mappings of their own, the last of which stays: so the heap can't shrink by itself.
TRIES = """
import ctypes
from dgnd.memory.system_memory import private_bytes
from dgnd.worker.heap import trim

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
blocks = [libc.malloc(100_000) for _ in range(600)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:
    libc.free(block)
held = private_bytes()
trim()
print(held - private_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_what_was_freed_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", TRIES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50_000_000
