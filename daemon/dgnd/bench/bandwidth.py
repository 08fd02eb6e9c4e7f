"""How fast this machine reads memory: threads that each read their part of a buffer larger than any cache.

A decode step reads all weights once, so bandwidth over their bytes is a ceiling of its speed. Knows nothing
of models.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BUFFER_BYTES = 256 << 20


class ReadBandwidth:
    """The buffer and its threads, kept to measure again: bandwidth changes by the second on shared machines.

    NumPy's maximum of bytes is a plain read at the speed of memory on x86 and ARM, without the interpreter
    lock; sums were up to a third slower.
    """

    def __init__(self, threads: int, size: int = BUFFER_BYTES) -> None:
        self._parts = np.array_split(np.ones(size, dtype=np.uint8), threads)  # written: really allocated
        self._size = size
        self._pool = ThreadPoolExecutor(threads)
        self.samples: list[float] = []  #: bytes a second, in the order measured

    def measure(self, passes: int = 6) -> None:
        """Adds `passes` samples, after one pass that wakes the threads."""
        for index in range(passes + 1):
            began = time.perf_counter()
            list(self._pool.map(np.max, self._parts))
            if index:
                self.samples.append(self._size / (time.perf_counter() - began))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()
