"""What the system says of its memory. Knows nothing of who wants it."""

from __future__ import annotations

from pathlib import Path


def available_bytes() -> int:
    """Memory that can be taken without swapping, as the kernel estimates it (proc(5), MemAvailable); 0 where
    it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
