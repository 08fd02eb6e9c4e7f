"""`python -m dgnd.probe.child NAME FD PARENT_PID`: imports one backend, asks it for its devices, and reports.

Everything that comes after the import is at the mercy of foreign code; whoever started this watches it.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path
from typing import Final

import msgspec

from dgn_backends.errors import BackendUnavailable
from dgn_backends.foreign import raised
from dgn_backends.registry import list_backends, load_backend
from dgnd.probe.report import ProbeReport, report_of
from dgnd.worker.process import die_with_parent

#: Private memory that a backend may take to be imported and to name its devices.
_MEMORY_BYTES: Final = 4 << 30


def _bound() -> None:
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _look(name: str) -> ProbeReport:
    try:
        backend = load_backend(name)
    except BackendUnavailable as error:
        entry = next((entry for entry in list_backends() if entry.name == name), None)
        return ProbeReport(reason=error.message.removeprefix(f"{entry}: ")[:4096])
    try:
        return report_of(backend.devices())
    except BaseException as error:  # noqa: BLE001 - foreign code may raise anything
        return ProbeReport(reason=f"its devices() raised {raised(error)}")


def main(argv: list[str]) -> None:
    """Reports, and ends at once: threads and exit handlers of a plugin would keep the interpreter."""
    name, fd, parent = argv[0], int(argv[1]), int(argv[2])
    die_with_parent(parent)
    _bound()
    pid, forks = os.getpid(), list[int]()
    os.register_at_fork(before=lambda: forks.append(1))
    report = _look(name)
    if os.getpid() == pid:  # else this is a copy that the plugin made
        if forks:
            report = ProbeReport(
                reason="it forks when it is imported, which a worker with its threads can't bear"
            )
        os.write(fd, msgspec.json.encode(report))
    os._exit(0)


main(sys.argv[1:])
