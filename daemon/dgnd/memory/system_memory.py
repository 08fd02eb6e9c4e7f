"""What the system says of its memory, and of what this process may have of it. Knows nothing of who wants
it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from dgnd.memory.cgroups import MemoryGroup, memory_groups

_FRESH_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Allowed:
    """The most that this process and its children can have, and what says so, for people."""

    total: int
    by: str


def available_bytes() -> int:
    """Memory that can be taken without swapping, as the kernel estimates it (proc(5), MemAvailable), and
    within the limit of every control group; 0 where nothing is said. As it was `_FRESH_S` ago at most: every
    offer asks for it, and a dozen files say it."""
    return _available(_moment())


def _moment() -> int:
    return int(time.monotonic() / _FRESH_S)


@lru_cache(maxsize=1)
def _available(moment: int) -> int:
    return min(_meminfo("MemAvailable"), *(group.free for group in _groups(moment)), _meminfo("MemTotal"))


@lru_cache(maxsize=1)
def _groups(_moment: int) -> list[MemoryGroup]:
    return memory_groups()


def allowed() -> Allowed:
    """As the machine and the control groups had it, just as fresh; a total of 0 where nothing is said."""
    total = _meminfo("MemTotal")
    tightest = min(_groups(_moment()), key=lambda group: group.limit, default=None)
    if tightest is not None and (tightest.limit < total or not total):
        return Allowed(tightest.limit, f"control group {tightest.name}")
    return Allowed(total, "this machine")


def private_bytes(pid: int | str = "self") -> int:
    """What a process has to itself, mapped files left out (proc(5), RssAnon and RssShmem); 0 where it is gone
    or the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def _meminfo(name: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
