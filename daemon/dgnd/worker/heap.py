"""The C library's heap of this process. Knows nothing of what is in it."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Gives back what was freed but is still held by the C library for its next use (glibc; elsewhere nothing
    happens): what loading needs for a while is far more than running needs."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
