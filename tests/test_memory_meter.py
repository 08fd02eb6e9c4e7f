"""What the memory checks measure with: the same is found in a process whose heap is full of holes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dgn_backends.testing_memory_meter import MemoryMeter

#: Blocks of many sizes in the heap, every second one freed; then 20 times 4 MB of arrays of one size, another
#: one each time.
TRIES = """
import ctypes, random, sys
from dgn_backends.testing_memory_meter import MemoryMeter

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallopt(-3, 1 << 30)
blocks = [libc.malloc(random.Random(i).randrange(1 << 17, 1 << 22)) for i in range(int(sys.argv[1]))]
for block in blocks[::2]:
    libc.free(block)

def use(size):
    held = [libc.malloc(size) for _ in range((4 << 20) // size)]
    for block in held:
        ctypes.memset(block, 1, size)
    for block in held:
        libc.free(block)

with MemoryMeter() as meter:
    for size in range(200_000, 4_000_000, 200_000):
        use(size)
    print(meter.peak())
"""


@pytest.mark.skipif(
    not MemoryMeter.is_usable(), reason="this system does not count a process's memory as needed"
)
@pytest.mark.parametrize("blocks", [0, 400])
def test_holes_in_the_heap_are_not_counted(blocks: int) -> None:
    command = [sys.executable, "-c", TRIES, str(blocks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 3_500_000 < int(done.stdout) < 5_500_000
