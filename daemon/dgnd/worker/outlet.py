"""What a worker says to its daemon: frames in order, and never a wait for the daemon to read.

Whoever has something to say writes it, as far as the socket takes it at once; a thread that is asleep
otherwise writes the rest. So an answer costs no wakeup, and a daemon that stands still holds up no batch.
Knows nothing of what frames mean.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Sequence

from dgnd.wire.codec import encode
from dgnd.wire.messages import Frame

_ONE_WRITE_BYTES = 1 << 18  #: more than this is not copied to be written at once

Piece = bytes | memoryview


class Outlet:
    """The sending side of `sock`, for all threads. The process ends when the daemon has hung up."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._rest: deque[Piece] = deque()  # the first of them is being written by the thread
        self._changed = threading.Condition()  # guards _rest and _closed
        self._closed = False
        self._thread = threading.Thread(target=self._write_rest, name="writer", daemon=True)
        self._thread.start()

    def send(self, frames: Sequence[Frame]) -> None:
        """Sends frames together, so that what is asked next comes back together."""
        pieces = [piece for frame in frames for piece in encode(frame, limits=None)]  # dgnd looks
        if sum(map(len, pieces)) <= _ONE_WRITE_BYTES:
            pieces = [b"".join(pieces)]
        with self._changed:
            rest = pieces if self._rest else self._write_now(pieces)
            if rest:
                self._rest.extend(rest)
                self._changed.notify()

    def close(self, patience_s: float) -> None:
        """Lets the last words out, for so long."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(patience_s)

    def _write_now(self, pieces: list[Piece]) -> list[Piece]:
        """Writes what the socket takes; returns what it does not."""
        for index, piece in enumerate(pieces):
            try:
                sent = self._sock.send(piece, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                os._exit(0)
            if sent < len(piece):
                return [memoryview(piece)[sent:], *pieces[index + 1 :]]
        return []

    def _write_rest(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rest or self._closed)
                if not self._rest:
                    return
                piece = self._rest[0]
            try:
                self._sock.sendall(piece)
            except OSError:
                os._exit(0)
            with self._changed:
                self._rest.popleft()
