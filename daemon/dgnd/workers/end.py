"""The end of a worker process: brought about, and explained. Knows nothing of what it computed."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import trio

from dgnd.workers.signal_name import signal_name

#: Signals that a process brings on itself.
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSYS)


async def reap(process: subprocess.Popen[bytes], patience_s: float) -> None:
    """A worker whose socket is closed ends by itself at once; one that doesn't is killed."""
    with trio.move_on_after(patience_s):
        while process.poll() is None:  # noqa: ASYNC110 - the end of a process gives no event
            await trio.sleep(0.01)
    if process.poll() is None:
        process.kill()
    while process.poll() is None:  # noqa: ASYNC110
        await trio.sleep(0.005)


def why_it_ended(returncode: int, oom: bool, backend: str) -> str:
    """In a few words. `oom`: the kernel killed something for lack of memory then; `backend`: its name."""
    if returncode == -signal.SIGKILL and oom:
        return "killed by the kernel for lack of memory (OOM); give it fewer blocks"
    if returncode < 0:
        number = -returncode
        name = signal_name(number)
        if number == signal.SIGBUS:
            name += "; the kernel's log says whether a disk can't be read"
        return f"{backend} crashed: {name}" if number in _CRASHES else f"killed by {name}"
    return f"{backend} ended the process, with exit code {returncode}"  # who else ends it has said why


def oom_kills() -> int:
    """The kernel's count of OOM kills so far (proc(5), /proc/vmstat); 0 where it has none."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
