"""How much memory something took, whatever ran in this process before. Knows nothing of what is measured."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType

#: mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE_BYTES = 1 << 17


class MemoryMeter:
    """The most memory that this process held since the meter was entered, beyond what it held then, by the
    system's own count (Linux with glibc)."""

    def __init__(self) -> None:
        self._held: list[int] = []
        self._before = 0

    def __enter__(self) -> MemoryMeter:
        # What is large comes from the system and goes back to it at once, whatever ran in this process
        # before: by itself the allocator learns from what is freed, and then keeps it among what is in use.
        _libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        _libc.mallopt(_M_TRIM_THRESHOLD, _LARGE_BYTES)
        # Memory that was freed but kept by the allocator would hide what is taken next.
        _libc.malloc_trim(0)
        self._held = _take_large_holes()
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status_bytes("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for address in self._held:
            _libc.free(address)

    @staticmethod
    def is_usable() -> bool:
        """Whether this system counts memory in the way needed."""
        return Path("/proc/self/clear_refs").exists() and hasattr(_libc, "mallinfo2")

    def peak(self) -> int:
        """Bytes."""
        return _status_bytes("VmHWM") - self._before


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of mallinfo(3)."""

    _fields_ = (
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),  # how many blocks are mappings of their own
        ("hblkhd", ctypes.c_size_t),
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),
        ("fordblks", ctypes.c_size_t),  # bytes that are free in the heap
        ("keepcost", ctypes.c_size_t),
    )


_libc = ctypes.CDLL(None)
if hasattr(_libc, "mallinfo2"):  # glibc 2.33
    _libc.mallinfo2.restype = _MallInfo
    _libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    _libc.free.restype, _libc.free.argtypes = None, [ctypes.c_void_p]


def _take_large_holes() -> list[int]:
    """Addresses of blocks, none of them touched, that fill what is free in the middle of the heap: what is
    large would be put there, each time in another hole, and would stay there when it is freed. So one
    process after another would seem to take more, by what had run in it before."""
    taken: list[int] = []
    before = _libc.mallinfo2()
    for _ in range(before.fordblks // _LARGE_BYTES + 1):
        address = _libc.malloc(_LARGE_BYTES)
        if address is None:
            break
        taken.append(address)
        if _libc.mallinfo2().hblks > before.hblks:  # a mapping of its own: no hole is left
            break
    return taken


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")
