"""Writing to a socket in the task that has something to say, as far as the kernel takes it at once; what is
left waits for a task that is asleep otherwise. So what is small costs no pass of the scheduler.

Knows nothing of what is written.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Sequence

import trio

Piece = bytes | memoryview


def write_now(fd: int, data: Piece) -> int:
    """How much of `data` the non-blocking socket `fd` took. Raises OSError when the connection is over."""
    try:
        return os.write(fd, data)
    except BlockingIOError:
        return 0


class EagerWriter:
    """The sending side of `sock`, which is non-blocking; in order, and never a wait. What waits is bounded by
    whoever writes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._rest: deque[Piece] = deque()
        self._filled = trio.Event()
        self._over = False

    def write(self, pieces: Sequence[Piece]) -> None:
        """Sends `pieces`; lost where the other end is gone, which the reader finds out."""
        if self._over:
            return
        idle = not self._rest
        self._rest.extend(pieces)
        if idle:
            self._push()
            if self._rest:
                self._filled.set()

    async def run(self) -> None:
        """Writes what was left, until cancelled."""
        while True:
            await self._filled.wait()
            self._filled = trio.Event()
            while self._rest:
                await trio.lowlevel.wait_writable(self._sock)
                self._push()

    def _push(self) -> None:
        try:
            while self._rest:
                sent = write_now(self._sock.fileno(), self._rest[0])
                if sent < len(self._rest[0]):
                    self._rest[0] = memoryview(self._rest[0])[sent:]
                    return
                self._rest.popleft()
        except OSError:
            self._over = True
            self._rest.clear()
