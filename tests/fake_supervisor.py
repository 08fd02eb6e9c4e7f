"""A service manager for one daemon, as far as a daemon sees of it: sd_notify, the watchdog, a socket that it
opened. Knows nothing of what the daemon does."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

_ACTIVATE = (
    "import os, sys\n"
    "fd = int(sys.argv[1])\n"
    "os.dup2(fd, 3) if fd != 3 else None\n"
    "os.set_inheritable(3, True)\n"
    "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='dgnd.socket')\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class FakeSupervisor:
    """Collects what it is told, with the time of each message."""

    def __init__(self, directory: Path, watchdog_s: float = 0.0) -> None:
        self.said: list[tuple[float, dict[str, str]]] = []
        self.environment = {"NOTIFY_SOCKET": str(directory / "notify"), "RUNTIME_DIRECTORY": str(directory)}
        if watchdog_s:
            self.environment["WATCHDOG_USEC"] = str(round(watchdog_s * 1e6))
        self._receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._receiver.bind(self.environment["NOTIFY_SOCKET"])
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()

    def __enter__(self) -> FakeSupervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.environment["NOTIFY_SOCKET"])
        self._thread.join(10)
        self._receiver.close()

    def _receive(self) -> None:
        while data := self._receiver.recv(65536):
            pairs = [line.partition("=") for line in data.decode().splitlines()]
            self.said.append((time.monotonic(), {key: value for key, _, value in pairs}))

    def all(self, key: str) -> list[str]:
        """Every value that was said of `key`."""
        return [said[key] for _, said in list(self.said) if key in said]

    def first(self, key: str) -> float | None:
        """When something was said of `key` first."""
        return next((when for when, said in list(self.said) if key in said), None)


def activated(listener: socket.socket) -> list[str]:
    """What a command begins with that is to inherit `listener` as systemd passes it."""
    return [sys.executable, "-c", _ACTIVATE, str(listener.fileno())]


def listening(path: Path) -> socket.socket:
    """As the socket unit opens it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    os.chmod(path, 0o660)  # noqa: PTH101
    listener.listen(16)
    return listener
