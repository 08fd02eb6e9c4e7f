"""Whether a process of this machine moves. Knows nothing of what it is for."""

from __future__ import annotations

from pathlib import Path


def moved_by(pid: int) -> tuple[int, int, int]:
    """Clock ticks in user and kernel mode, and major page faults, so far (proc_pid_stat(5)); zeros for a
    process that is gone. A process for which they stay the same computes nothing and reads no mapped file."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0, 0, 0
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything
    return int(fields[11]), int(fields[12]), int(fields[9])
