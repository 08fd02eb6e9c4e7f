"""What the hops of a session said and nobody has taken yet, or why they can't be used any more.

Knows nothing of what messages mean, nor of who sent them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from dgnd.errors import DgnError
from dgnd.sessions.patience import Patience
from dgnd.wire.messages import Failure, PeerMessage

#: Messages that may wait; credits keep an honest hop far below.
MAX_WAITING = 1024


class Inbox:
    """Messages in order, to one reader. Once `broken` it only tells why, until it is opened anew."""

    def __init__(self) -> None:
        self.broken: DgnError | None = None
        self.open()

    def open(self) -> None:
        """What came so far no longer counts."""
        self.broken = None
        self._send, self._receive = trio.open_memory_channel[PeerMessage](math.inf)

    def put(self, message: PeerMessage) -> bool:
        """Takes a message; False, and it is lost, where too many wait."""
        if self._send.statistics().current_buffer_used >= MAX_WAITING:
            return False
        if self.broken is None:
            self._send.send_nowait(message)
        return True

    def fail(self, error: DgnError) -> None:
        """Whoever waits is told; only the first error counts."""
        if self.broken is None:
            self.broken = error
            self._send.send_nowait(Failure(kind=error.kind, message=error.message))  # wakes the reader

    async def next(self, patience: Patience, look: Callable[[], None]) -> PeerMessage | None:
        """The next message, None when `patience` is over; raises `broken`. `look` is called now and then."""
        while not patience.is_over:
            message, began = None, trio.current_time()
            with trio.move_on_after(patience.slice_s) as slept:
                message = await self._receive.receive()
                if self.broken is not None:
                    raise self.broken
            waited = patience.slice_s if slept.cancelled_caught else trio.current_time() - began
            if patience.spend(min(waited, patience.slice_s)):
                look()
            if message is not None:
                return message
        return None
