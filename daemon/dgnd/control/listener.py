"""The control socket's file: never there in a wrong state, replaced when its owner died, removed at the end.

A lock beside the socket decides who owns it. The socket is bound under another name, given its mode, made to
listen, and only then renamed over what a dead daemon left: nobody ever finds it closed to them, too open, or
not listening.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from dgnd.control.lock import LockFile
from dgnd.errors import ConfigError

SOCKET_MODE = 0o660
_BACKLOG = 64


@contextlib.contextmanager
def control_socket(
    path: Path, given: socket.socket | None = None, what: str = "the control socket"
) -> Iterator[socket.socket]:
    """A listening Unix socket at `path`, mode 0660, while the context lasts. `given`: the one that listens
    there already, which is somebody else's to make and to remove. `what`: how it is called.

    Raises:
        AlreadyRunning: a living daemon has it; names its pid.
        ConfigError: the path can't be used.
    """
    path = path.absolute()
    lock = LockFile.acquire(path.with_name(path.name + ".lock"), f"{what} {path}")
    try:
        if given is not None:
            with given:
                yield given
            return
        listener = _bind(path, what)
        try:
            mine = os.stat(path)  # noqa: PTH116 - both ends of the comparison below alike
            yield listener
        finally:
            listener.close()
            with contextlib.suppress(OSError):
                now = os.lstat(path)
                if (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino):
                    path.unlink()
    finally:
        lock.release()


def _bind(path: Path, what: str) -> socket.socket:
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(
                f"{path}: there is something else than a socket; remove it or name another socket"
            )
    temporary = path.with_name(f".{path.name}.new")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        temporary.unlink(missing_ok=True)  # a daemon killed between bind and rename; ours by the lock
        listener.bind(str(temporary))
        temporary.chmod(SOCKET_MODE)
        listener.listen(_BACKLOG)
        temporary.rename(path)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise ConfigError(f"{path}: can't create {what}: {reason}") from None
    return listener
