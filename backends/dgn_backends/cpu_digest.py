"""Which kind of CPU this is, in eight digits: part of what shapes rounding. Knows nothing of backends."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path


def cpu_digest() -> str:
    """Eight digits that stand for the CPU's model, caches and instruction sets: libraries choose kernels by
    them."""
    described = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    kept = [
        line for line in lines if line.split("\t")[0] in ("model name", "flags", "cache size", "Features")
    ]
    return hashlib.blake2s("\n".join([described, *kept]).encode(), digest_size=4).hexdigest()
