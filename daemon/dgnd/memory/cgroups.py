"""The memory limits that control groups set above this process, version 1 and 2 (cgroups(7)).

A limit counts at every level: of nested groups the tightest one does. Page cache of files is left out of what
a group uses, since the kernel takes that back before it kills anything. Knows nothing of who asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

#: A limit as large as this is none: version 1 has no other word for it.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One group with a limit, in bytes."""

    name: str  #: its path in its hierarchy
    limit: int
    used: int  #: what can't be taken back

    @property
    def free(self) -> int:
        """Bytes until the limit."""
        return max(self.limit - self.used, 0)


def memory_groups(proc: Path = Path("/proc/self")) -> list[MemoryGroup]:
    """Those above the process of `proc` that have a limit, in no order; none where the system has no
    control groups or does not say."""
    try:
        mounts = _mounts((proc / "mountinfo").read_text())
        lines = (proc / "cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for version, root, mount in mounts:
            mine = number == "0" and not controllers if version == 2 else "memory" in controllers.split(",")
            if mine:
                found += list(_above(version, root, mount, path))
    return found


def _mounts(mountinfo: str) -> list[tuple[int, str, Path]]:
    """Version, root and mount point of each hierarchy that may limit memory; see proc_pid_mountinfo(5)."""
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        is_first = kinds[0] == "cgroup" and "memory" in kinds[2].split(",")
        if is_first or kinds[0] == "cgroup2":
            found.append((1 if is_first else 2, _unescaped(fields[3]), Path(_unescaped(fields[4]))))
    return found


def _unescaped(text: str) -> str:
    return text.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")


def _above(version: int, root: str, mount: Path, path: str) -> Iterator[MemoryGroup]:
    """The groups with limits from `path` up to what is mounted, of which nothing more can be seen."""
    try:
        parts = PurePosixPath(path).relative_to(root).parts
    except ValueError:  # another namespace's view: at least what is mounted counts
        parts = ()
    if ".." in parts:
        parts = ()
    for depth in range(len(parts), -1, -1):
        directory = mount.joinpath(*parts[:depth])
        group = _read(version, directory, "/" + "/".join(parts[:depth]))
        if group is not None:
            yield group


def _read(version: int, directory: Path, name: str) -> MemoryGroup | None:
    """The group in `directory`, if it has a limit."""
    try:
        if version == 1:
            limit = int((directory / "memory.limit_in_bytes").read_text())
        else:
            limit = min(_limit_v2(directory / file) for file in ("memory.max", "memory.high"))
        if limit >= _NO_LIMIT:
            return None
        return MemoryGroup(name, limit, _used(version, directory))
    except (OSError, ValueError):
        return None


def _limit_v2(path: Path) -> int:
    text = path.read_text().strip()
    return _NO_LIMIT if text == "max" else int(text)


def _used(version: int, directory: Path) -> int:
    stat = {
        key: int(value)
        for key, _, value in (
            line.partition(" ") for line in (directory / "memory.stat").read_text().splitlines()
        )
    }
    if version == 1:
        usage = int((directory / "memory.usage_in_bytes").read_text())
        return max(usage - stat.get("total_cache", 0) + stat.get("total_shmem", 0), 0)
    usage = int((directory / "memory.current").read_text())
    taken_back = stat.get("file", 0) - stat.get("shmem", 0) + stat.get("slab_reclaimable", 0)
    return max(usage - taken_back, 0)
