"""What a worker hears from its daemon: frames as they come, read by whichever thread is free to.

The compute thread reads while it has nothing to compute, so that a step wakes one thread and not two. While
it is away, another thread stands in for it: it looks now and then whether one absence lasts, and reads until
it ends. So a ping or a cancel is heard within about two ticks also while a batch runs. Knows nothing of what
frames mean.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable

from dgnd.wire.decoder import WORKER, FrameDecoder
from dgnd.wire.messages import Frame

_READ_BYTES = 1 << 18
#: How often the thread that stands in looks whether it is needed.
TICK_S = 0.02
#: After so many ticks without a batch it sleeps until there is one: an idle worker takes no CPU time.
_RESTS = 50


class Inlet:
    """The receiving side of `sock`; every frame goes to `take`, in order, by one thread at a time. The
    process ends when the daemon has hung up."""

    def __init__(self, sock: socket.socket, take: Callable[[Frame], None]) -> None:
        self._sock = sock
        self._take = take
        self._turn = threading.Lock()  # guards all of the reading
        self._decoder = FrameDecoder(None, WORKER)  # what its own dgnd sends was checked there
        self._buffer = memoryview(bytearray(_READ_BYTES))
        self._absences = 0  # odd while the compute thread is away
        self._asleep = False  # the thread that stands in
        self._called = threading.Event()
        threading.Thread(target=self._stand_in, name="reader", daemon=True).start()

    # --- for the compute thread

    def read_until(self, done: Callable[[], object]) -> None:
        """Takes what comes until `done`, which only frames change: nobody else takes one meanwhile."""
        with self._turn:
            while not done():
                if self._receive(0) == _READ_BYTES:
                    self._read_rest()

    def read_within(self, seconds: float) -> bool:
        """Takes what comes within `seconds`, which count in whole milliseconds; False when nothing did."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if not poll.poll(round(1000 * seconds + 0.25)):
            return False
        with self._turn:
            self._receive(socket.MSG_DONTWAIT)
        return True

    def read_all(self) -> None:
        """Takes all that has come."""
        with self._turn:
            self._read_rest()

    def _read_rest(self) -> None:
        while self._receive(socket.MSG_DONTWAIT) == _READ_BYTES:
            pass

    def leave(self) -> None:
        """Until `come_back` the thread that calls this reads nothing."""
        self._absences += 1
        if self._asleep:
            self._called.set()

    def come_back(self) -> None:
        """It reads again."""
        self._absences += 1

    # --- both

    def _receive(self, flags: int) -> int:
        """One read, and what it completes; the number of bytes, 0 where there were none."""
        try:
            size = self._sock.recv_into(self._buffer, _READ_BYTES, flags)
        except BlockingIOError:
            return 0
        except OSError:
            size = 0
        if not size:
            os._exit(0)  # the daemon is gone: nothing to clean up that the kernel doesn't
        self._decoder.receive_data(self._buffer[:size])
        while (frame := self._decoder.next_frame()) is not None:
            self._take(frame)
        return size

    # --- the thread that stands in

    def _stand_in(self) -> None:
        rests = 0
        while True:
            seen = self._absences
            time.sleep(TICK_S)
            if self._absences != seen:
                rests = 0
            elif seen % 2:
                while self._absences == seen:
                    self.read_within(TICK_S)
            else:
                rests += 1
                if rests >= _RESTS:
                    self._sleep(seen)

    def _sleep(self, seen: int) -> None:
        """Until the compute thread leaves again; a leave at the same moment is not missed, as it comes
        either before the look at `_absences` or after `_asleep`."""
        self._called.clear()
        self._asleep = True
        if self._absences == seen:
            self._called.wait()
        self._asleep = False
