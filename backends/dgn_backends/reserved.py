"""Memory that is reserved as addresses and taken as it is used.

A private anonymous mapping costs nothing until a page of it is written, reads as zero until then, and gives
single pages back (`madvise`). So what grows can lie in one piece without ever being copied. Knows nothing of
what is kept in it.
"""

from __future__ import annotations

import mmap

_MAP_NORESERVE = 0x4000  # Linux; the module has it from Python 3.13 on


def reserve(size: int) -> mmap.mmap:
    """`size` > 0 bytes of addresses. Raises OSError or ValueError where the system doesn't give them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    # A huge page would be taken whole for the first bytes that are written near it.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory
