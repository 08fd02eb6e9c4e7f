"""Who owns a socket or a directory: a lock that ends with its process, however that ends. Never a pid file.

The file stays when the lock is given back (removing it would let two processes lock two files of one name);
the pid in it is only there to be told to whoever comes second.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from dgnd.errors import AlreadyRunning, ConfigError


class LockFile:
    """An exclusive flock on a file, held until `release` or the end of the process."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def acquire(cls, path: Path, what: str) -> LockFile:
        """Takes the lock without waiting. `what` is what it guards, for the message.

        Raises:
            AlreadyRunning: another process has it; data["pid"] where known.
            ConfigError: the file can't be made.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{path}: can't create the lock file: {error.strerror}; "
                "dgnd has to be able to write into its directory"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = _living(os.pread(fd, 32, 0))
            os.close(fd)
            who = f"another dgnd (pid {pid})" if pid else "another dgnd"
            data = {"pid": pid} if pid else {}
            message = f"{who} already uses {what}; stop it first, or give this one a place of its own"
            raise AlreadyRunning(message, path=str(path), **data) from None
        with contextlib.suppress(OSError):  # a full disk: the lock holds, only whose it is stays unsaid
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return cls(path, fd)

    def release(self) -> None:
        """Gives the lock back. Idempotent."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, 0)
        os.close(self._fd)
        self._fd = -1


def _living(content: bytes) -> int | None:
    """The pid in a lock file, unless it is what a dead owner left before the new one has written its own."""
    text = content.strip()
    if not text.isdigit():
        return None
    pid = int(text)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return pid or None
