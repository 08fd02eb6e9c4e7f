"""What the system says of its memory. Knows nothing of who wants it."""

from __future__ import annotations

from pathlib import Path

#: Of the available memory, what weights may take that nobody told a node to load.
WEIGHTS_SHARE = 0.7


def available_bytes() -> int:
    """Memory that can be taken without swapping, as the kernel estimates it (proc(5), MemAvailable); 0 where
    it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def room_for_weights(more: int = 0) -> int:
    """Bytes that weights may take where a node decides that itself: the rest is for KV and for the system.
    `more`: what is added to the available memory first."""
    return max(int(WEIGHTS_SHARE * (available_bytes() + more)), 0)
