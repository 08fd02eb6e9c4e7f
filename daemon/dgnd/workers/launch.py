"""How a worker process is started: its command and its environment. Knows nothing of what it is told then."""

from __future__ import annotations

import os
from collections.abc import Mapping

from dgnd.children import module_command

#: Has glibc's malloc ask for huge pages (its manual, "Memory Allocation Tunables"): every token reads all
#: weights, and with small pages looking up addresses is a few per cent of that.
_TUNABLE = "glibc.malloc.hugetlb"
#: Turns that an idle thread of torch's pool waits before it sleeps (libgomp's manual, "GOMP_SPINCOUNT"). It
#: comes with 300,000, about a millisecond: on a machine that does something else too, threads then spin while
#: the one that they wait for has no core.
_SPINS = 1000


def worker_command(fd: int, note_fd: int, log_level: str = "INFO") -> list[str]:
    """The command of a worker that talks over the socket `fd`, keeps the `RunningNote` of `note_fd`, and ends
    with this process; what built-in backends say from `log_level` on is logged."""
    numbers = [str(number) for number in (fd, note_fd, os.getpid())]
    return module_command("dgnd.worker", *numbers, log_level)


def worker_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a worker: `base`, or this process's; what it says of the same things stays."""
    environment = dict(os.environ if base is None else base)
    tunables = environment.get("GLIBC_TUNABLES", "")
    if _TUNABLE not in tunables:
        environment["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(_SPINS))
    return environment
