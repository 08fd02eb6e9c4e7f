"""Which files a process has mapped, and which of them were cut or written to since.

A process that reads what a mapped file no longer has is ended by SIGBUS, which says nothing of the file; this
does. Knows nothing of workers, or of what the files hold.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

_GONE = " (deleted)"


@dataclass(frozen=True, slots=True)
class _State:
    """What tells that the bytes of a file are those of before."""

    device: int
    inode: int
    size: int
    modified_ns: int


class MappedFiles:
    """The files that one process mapped, as they were when they were first seen."""

    def __init__(self) -> None:
        self._seen: dict[Path, _State] = {}

    def look(self, pid: int) -> None:
        """Remembers what the process has mapped now, as far as this system shows it (Linux: proc(5))."""
        try:
            maps = Path(f"/proc/{pid}/maps").read_bytes()
        except OSError:
            return
        for line in set(maps.splitlines()):
            path = _path_of(line)
            if path is not None and path not in self._seen and (state := _state(path)) is not None:
                self._seen[path] = state

    def changed(self) -> tuple[Path, str] | None:
        """The first file that is not as it was, and what happened to it; one that lost bytes before others.

        A file that was replaced, or is gone, is passed over: whoever mapped it keeps the old one."""
        found: list[tuple[int, Path, str]] = []
        for path, before in self._seen.items():
            now = _state(path)
            if now is None or (now.device, now.inode) != (before.device, before.inode):
                continue
            if now.size < before.size:
                found.append((0, path, f"was cut from {before.size:,} to {now.size:,} bytes"))
            elif now != before:
                found.append((1, path, "was written to"))
        return min(found)[1:] if found else None


def _path_of(line: bytes) -> Path | None:
    """The file of a line of /proc/PID/maps: range, permissions, offset, device, inode, path."""
    parts = line.split(maxsplit=5)
    if len(parts) < 6 or parts[4] == b"0" or not parts[5].startswith(b"/"):
        return None
    text = parts[5].decode(errors="surrogateescape").replace("\\012", "\n")
    return None if text.endswith(_GONE) else Path(text)


def _state(path: Path) -> _State | None:
    try:
        found = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return _State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
