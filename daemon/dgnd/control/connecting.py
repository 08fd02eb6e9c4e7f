"""A connection to the control socket, or why there is none and what to do. Knows nothing of what is said on
it."""

from __future__ import annotations

import os
import socket
import stat
import time
from pathlib import Path
from typing import Final

from dgnd.errors import BadRequest, DaemonSilent, DgnError, NoDaemon, SocketDenied, StaleSocket

CONNECT_TIMEOUT_S: Final = 5.0


def connect(path: Path) -> socket.socket:
    """A connected blocking socket.

    Raises:
        NoDaemon, StaleSocket, SocketDenied, DaemonSilent: saying what to do.
        BadRequest: the path can't be one of a socket.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(CONNECT_TIMEOUT_S)
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            sock.connect(str(path))
        except OSError as error:
            if isinstance(error, BlockingIOError) and time.monotonic() < deadline:
                time.sleep(0.02)  # many are waiting to be accepted: the kernel's queue is full for a moment
                continue
            sock.close()
            raise _why_not(path, error) from None
        sock.settimeout(None)
        return sock


def silent(path: Path) -> DaemonSilent:
    """What to raise where dgnd says nothing; an error of the same kind whatever was asked."""
    return DaemonSilent(
        f"dgnd at {path} does not answer: it is stopped, hung or overloaded; see its log, or restart it",
        path=str(path),
    )


def _why_not(path: Path, error: OSError) -> DgnError:
    if isinstance(error, PermissionError):
        return SocketDenied(
            f"{path}: this user may not use dgnd's control socket; {_cure(path)}", path=str(path)
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NoDaemon(
            f"no dgnd is running: no socket at {path}; start it with 'dgnd --config FILE'", path=str(path)
        )
    if isinstance(error, TimeoutError | BlockingIOError):
        return silent(path)
    if isinstance(error, ConnectionRefusedError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116 - it was there a moment ago
            return NoDaemon(
                f"{path} is no socket; name dgnd's socket with --socket or $DGN_SOCKET", path=str(path)
            )
        return StaleSocket(
            f"dgnd has died: {path} is there, but nothing listens; start dgnd again (it replaces the socket)",
            path=str(path),
        )
    return BadRequest(f"{path}: can't be used as dgnd's control socket: {error.strerror or error}")


def _cure(path: Path) -> str:
    """What a user who is refused can do; names the socket's group where it can be seen."""
    import grp

    try:
        group = grp.getgrgid(os.stat(path).st_gid).gr_name  # noqa: PTH116
    except (OSError, KeyError):
        return "ask for membership of its group, or run as the user that dgnd runs as"
    return (
        f"join its group with 'sudo usermod -aG {group} $USER' and log in again, or run as the user of dgnd"
    )
