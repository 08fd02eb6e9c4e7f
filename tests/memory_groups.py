"""Control groups that limit memory, for tests: made, looked into, removed. Version 1 and 2; needs root."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Group:
    """One group."""

    path: Path
    version: int

    @property
    def before(self) -> tuple[str, ...]:
        """What a command begins with so that it runs in the group."""
        return ("/bin/sh", "-c", 'echo $$ >"$0/cgroup.procs" && exec "$@"', str(self.path))

    @property
    def oom_kills(self) -> int:
        """How many processes of it the kernel has killed for lack of memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        lines = (self.path / name).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))

    @property
    def used(self) -> int:
        """Bytes, page cache included."""
        name = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        return int((self.path / name).read_text())


@contextmanager
def memory_group(name: str, limit: int) -> Iterator[Group]:
    """A group of its own, with `limit` bytes. Skips the test, by name, where none can be made."""
    version, root = (1, _V1) if (_V1 / "memory.limit_in_bytes").exists() else (2, _V2)
    path = root / f"dgn-test-{os.getpid()}-{name}"
    try:
        path.mkdir()
        limits = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes") if version == 1 else ("memory.max",)
        for file in limits:
            if (path / file).exists() or file in ("memory.limit_in_bytes", "memory.max"):
                (path / file).write_text(str(limit))
    except OSError as error:
        if path.is_dir():
            path.rmdir()
        pytest.skip(f"no control group with a limit of memory can be made ({error}); it takes root")
    try:
        yield Group(path, version)
    finally:
        deadline = time.monotonic() + 30
        while (path / "cgroup.procs").read_text().strip() and time.monotonic() < deadline:
            time.sleep(0.05)
        path.rmdir()
