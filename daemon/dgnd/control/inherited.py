"""A listening control socket that the service manager opened and passed on: sd_listen_fds(3).

Knows nothing of what is served on it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

from dgnd.errors import ConfigError
from dgnd.words import counted

_FIRST_FD: Final = 3
#: What it is called where several are passed: the name of its unit, or FileDescriptorName= there.
NAMES: Final = ("dgnd.socket", "control")


def inherited_socket(environ: MutableMapping[str, str] = os.environ) -> socket.socket | None:
    """The socket, or None where none was passed. Takes what says so out of `environ`, so that no child takes
    it for its own.

    Raises:
        ConfigError: what was passed is no listening Unix socket, or it is not clear which one is meant.
    """
    pid, count, names = (environ.pop(f"LISTEN_{key}", "") for key in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count.isdecimal() or int(count[:9]) == 0:
        return None
    fds = range(_FIRST_FD, _FIRST_FD + int(count[:9]))
    try:
        for fd in fds:
            os.set_inheritable(fd, False)
    except OSError as error:
        raise ConfigError(
            f"$LISTEN_FDS promises {counted(len(fds), 'socket')}, but descriptor {fd} can't be used: "
            f"{error.strerror or error}; unset it, or have the service manager start dgnd"
        ) from None
    named = [fd for fd, name in zip(fds, names.split(":"), strict=False) if name in NAMES]
    chosen = named if named else list(fds)
    if len(chosen) != 1:
        raise ConfigError(
            f"the service manager passed {count} sockets, {names or 'without names'}: one is needed, or one "
            f"that is named {' or '.join(NAMES)}"
        )
    try:
        sock = socket.socket(fileno=chosen[0])
    except OSError as error:
        raise ConfigError(
            f"the service manager passed as control socket what is none: {error.strerror or error}; dgnd "
            "needs a listening Unix stream socket"
        ) from None
    if (
        sock.family != socket.AF_UNIX
        or sock.type != socket.SOCK_STREAM
        or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    ):
        raise ConfigError(
            f"the service manager passed {sock!r} as control socket: dgnd needs a listening Unix stream "
            "socket, so Accept=no and ListenStream=/a/path in the socket unit"
        )
    return sock


def path_of(sock: socket.socket) -> Path:
    """Where clients find it.

    Raises:
        ConfigError: nowhere.
    """
    name = sock.getsockname()
    if not isinstance(name, str) or not name.startswith("/"):
        raise ConfigError("the control socket that the service manager passed has no path; name one there")
    return Path(name)
