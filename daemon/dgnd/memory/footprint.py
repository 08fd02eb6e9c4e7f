"""What this process takes of its machine. Knows nothing of what it is for."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import trio

_PROC = Path("/proc/self")


@dataclass(frozen=True, slots=True)
class Footprint:
    """As it is now. What the system does not say is 0."""

    resident_bytes: int
    fds: int
    threads: int
    tasks: int  #: of trio


def footprint() -> Footprint:
    """Of this process; called within trio."""
    try:
        resident = int((_PROC / "statm").read_text().split()[1]) * resource.getpagesize()
        fds = len(os.listdir(_PROC / "fd")) - 1  # noqa: PTH208 - names alone; one of them is of this listing
        threads = len(os.listdir(_PROC / "task"))  # noqa: PTH208
    except OSError:
        resident = fds = threads = 0
    return Footprint(resident, fds, threads, trio.lowlevel.current_statistics().tasks_living)
