"""The memory of a process, as the kernel counts it (Linux, proc(5)). Knows nothing of what is in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: resident, proportional (shared pages divided by their users), of its own alone (not of files
    or shared), and the most that was ever resident."""

    rss: int
    pss: int
    anonymous: int
    peak_rss: int


def memory_of(pid: int) -> Memory:
    """The memory of process `pid` now; zeros where the system doesn't tell."""
    rollup = _fields(Path(f"/proc/{pid}/smaps_rollup"))
    status = _fields(Path(f"/proc/{pid}/status"))
    return Memory(
        rss=rollup.get("Rss", 0),
        pss=rollup.get("Pss", 0),
        anonymous=rollup.get("Anonymous", 0),
        peak_rss=status.get("VmHWM", 0),
    )


def _fields(path: Path) -> dict[str, int]:
    """`Name:   123 kB` lines as bytes."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    rows = [line.split() for line in lines]
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}
