"""Frames by address: to a peer through the network, to one's own peer id back into the daemon.

So the origin's own blocks are a hop like any other. Posting never blocks: each address has a queue and a
task; the credits of sessions bound the queues. Knows nothing of what frames mean.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from dgnd.errors import PeerGone
from dgnd.wire.messages import Frame, StepFrame

#: Sends one frame to a peer; `bulk` chooses the stream that may be slow.
Send = Callable[[str, Frame, bool], Awaitable[None]]
Deliver = Callable[[str, Frame], None]


class PostOffice:
    """Queues and the tasks that empty them, one for each address, made when first needed."""

    def __init__(self, me: str, send: Send, deliver: Deliver) -> None:
        self.me = me
        self._send = send
        self._deliver = deliver
        self._queues: dict[tuple[str, bool], trio.MemorySendChannel[Frame]] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def post(self, peer: str, frame: Frame) -> None:
        """Queues `frame` for `peer`; what can't be sent is lost with its connection, which is announced
        elsewhere."""
        address = (peer, peer != self.me and is_bulk(frame))
        if address not in self._queues:
            assert self._nursery is not None, "run the post office first"
            send, receive = trio.open_memory_channel[Frame](float("inf"))
            self._queues[address] = send
            self._nursery.start_soon(self._carry, *address, receive)
        self._queues[address].send_nowait(frame)

    async def _carry(self, peer: str, bulk: bool, frames: trio.MemoryReceiveChannel[Frame]) -> None:
        async for frame in frames:
            if peer == self.me:
                self._deliver(peer, frame)
                continue
            try:
                await self._send(peer, frame, bulk)
            except PeerGone:
                continue


def is_bulk(frame: Frame) -> bool:
    """Whether a frame is part of a long prompt, which may wait behind tokens and control."""
    message = frame.message
    return isinstance(message, StepFrame) and (message.count > 1 or message.sample is None)
