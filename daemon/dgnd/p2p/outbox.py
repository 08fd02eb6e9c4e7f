"""Small messages that wait to be sent, bounded, none of them said twice. No tasks, no streams."""

from __future__ import annotations

from collections import deque

import trio

from dgnd.errors import ProtocolError
from dgnd.wire.messages import Offers, PeerMessage, Ping, Pong

#: Answers that may wait for a peer that asks but does not read.
QUEUED = 256
_REPLACE = (Offers, Ping, Pong)


class Outbox:
    """In order of arrival; new Offers, Pings and Pongs replace those that wait."""

    def __init__(self) -> None:
        self._waiting: deque[PeerMessage] = deque()
        self._filled = trio.Event()

    def put(self, message: PeerMessage) -> None:
        """Takes a message. Raises ProtocolError when too many wait."""
        if isinstance(message, _REPLACE):
            self._waiting = deque(old for old in self._waiting if type(old) is not type(message))
        elif message in self._waiting:
            return
        if len(self._waiting) >= QUEUED:
            raise ProtocolError(f"{QUEUED} answers wait: it asks but does not read")
        self._waiting.append(message)
        self._filled.set()

    async def take(self) -> PeerMessage:
        """The message that waits longest; waits for one. For one task."""
        while not self._waiting:
            self._filled = trio.Event()
            await self._filled.wait()
        return self._waiting.popleft()
