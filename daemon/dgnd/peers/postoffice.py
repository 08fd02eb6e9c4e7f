"""Frames by address: to a peer through the network, to one's own peer id back into the daemon.

So the origin's own blocks are a hop like any other. Posting never blocks: a frame that finds its connection
idle leaves at once, in the task that made it; others wait in a queue of their address, which has a task while
something waits. What waits ends with the connection. The credits of sessions keep the queues short; what
waits all the same for a peer that does not read, or behind a link that is too narrow, is bounded in number
and bytes. How long steps and tokens take to leave is counted. Knows nothing else of what frames mean.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter

import trio

from dgnd.background import Background
from dgnd.errors import PeerGone, ProtocolError
from dgnd.metrics.departures import Departures
from dgnd.wire.messages import Frame, StepFrame, TokenFrame

log = logging.getLogger("dgnd.postoffice")

#: Frames that may wait for one peer; far more than the credits of honest sessions let come together.
WAITING = 8192
#: Bytes of their tensors at most, if there is memory for so many; one frame may always wait.
WAITING_BYTES = 256 << 20
#: Messages of which it is counted how they leave.
_COUNTED = (StepFrame, TokenFrame)
#: Sends one frame to a peer; `bulk` chooses the stream that may be slow.
Send = Callable[[str, Frame, bool], Awaitable[None]]
#: The same without waiting; False, and nothing was sent, where it would have to.
SendNow = Callable[[str, Frame, bool], bool]
Deliver = Callable[[str, Frame], None]
#: Called when a frame has left, or was lost with its connection.
Left = Callable[[], None] | None
#: Between two lines about one peer that does not read, who may read a little now and then.
COMPLAIN_S = 60.0


#: A frame, who is told when it has left, and when it was posted.
_Waiting = tuple[Frame, Left, float]


@dataclass(slots=True, eq=False)
class _Queue:
    """What waits for one address."""

    inlet: trio.MemorySendChannel[_Waiting]
    outlet: trio.MemoryReceiveChannel[_Waiting]
    unsent: int = 0  #: frames in it, and the one that is being sent
    bytes: int = 0  #: of their tensors
    full: bool = False  #: it was

    def end(self) -> None:
        """Nothing more comes, and what waits is thrown away."""
        self.inlet.close()
        with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel):
            while True:
                _, left, _ = self.outlet.receive_nowait()
                if left is not None:
                    left()


class PostOffice:
    """Queues, and the tasks that empty them: one for this node itself, and one for each peer for whom
    something waits."""

    def __init__(
        self,
        me: str,
        send: Send,
        send_now: SendNow,
        deliver: Deliver,
        background: Background,
        departures: Departures | None = None,
    ) -> None:
        self.me = me
        self.most_bytes = WAITING_BYTES  #: of tensors that may wait for one peer
        self._send = send
        self._send_now = send_now
        self._deliver = deliver
        self._queues: dict[tuple[str, bool], _Queue] = {}
        self._complained: dict[str, float] = {}  # of peers that do not read, when
        self._background = background
        self._departures = departures or Departures()

    def post(self, peer: str, frame: Frame, left: Left = None, /) -> bool:
        """Sends `frame` to `peer`, behind those that wait; False where too many wait, and it is lost. What
        can't be sent is lost with its connection, which is announced elsewhere. `left` is called when it is
        no longer here, maybe at once."""
        address = (peer, peer != self.me and is_bulk(frame))
        queue = self._queues.get(address)
        if peer != self.me and (queue is None or not queue.unsent) and self._sent_now(*address, frame):
            if left is not None:
                left()
            return True
        if queue is None:
            most = math.inf if peer == self.me else WAITING
            queue = _Queue(*trio.open_memory_channel[_Waiting](most))
            self._queues[address] = queue
            self._background.start(self._carry, *address, queue)
        try:
            if peer != self.me and queue.bytes and queue.bytes + _size(frame) > self.most_bytes:
                raise trio.WouldBlock
            queue.inlet.send_nowait((frame, left, perf_counter()))
            queue.unsent += 1
            queue.bytes += _size(frame)
            return True
        except trio.WouldBlock:
            self._complain(peer, queue)
            return False

    @property
    def frames(self) -> int:
        """That wait."""
        return sum(queue.unsent for queue in self._queues.values())

    @property
    def bytes(self) -> int:
        """Of all tensors that wait."""
        return sum(queue.bytes for queue in self._queues.values())

    def _complain(self, peer: str, queue: _Queue) -> None:
        now, told = trio.current_time(), queue.full
        queue.full = True
        if not told and now >= self._complained.get(peer, -math.inf) + COMPLAIN_S:
            self._complained[peer] = now
            what = f"{queue.unsent} frames of {queue.bytes} bytes wait"
            log.warning("%s does not read: %s, further ones are dropped", peer, what)

    def _sent_now(self, peer: str, bulk: bool, frame: Frame) -> bool:
        begun = perf_counter()
        try:
            sent = self._send_now(peer, frame, bulk)
            if sent and isinstance(frame.message, _COUNTED):
                self._departures.at_once(peer, perf_counter() - begun)
            return sent
        except ProtocolError as error:  # a fault of ours must not end the daemon
            log.error("a frame for %s can't be sent: %s", peer, error.message)
            return True

    def forget(self, peer: str) -> None:
        """The connection to `peer` is over: what waits for it is lost, and its tasks end."""
        for address in ((peer, False), (peer, True)):
            if address in self._queues:
                self._queues.pop(address).end()

    async def _carry(self, peer: str, bulk: bool, queue: _Queue) -> None:
        async for frame, left, posted in queue.outlet:
            if peer == self.me:
                queue.unsent -= 1
                queue.bytes -= _size(frame)
                self._deliver(peer, frame)
            else:
                await self._carry_one(peer, bulk, queue, frame, posted)
                queue.unsent -= 1
                queue.bytes -= _size(frame)
            if left is not None:
                left()
            if peer != self.me and not queue.unsent:  # most frames leave without a task
                if self._queues.get((peer, bulk)) is queue:
                    del self._queues[peer, bulk]
                return

    async def _carry_one(self, peer: str, bulk: bool, queue: _Queue, frame: Frame, posted: float) -> None:
        try:
            await self._send(peer, frame, bulk)
            if isinstance(frame.message, _COUNTED):
                self._departures.waited(peer, perf_counter() - posted)
        except PeerGone:
            if self._queues.get((peer, bulk)) is queue:
                del self._queues[peer, bulk]
            queue.end()
        except ProtocolError as error:  # a fault of ours must not end the daemon
            log.error("a frame for %s can't be sent: %s", peer, error.message)


def _size(frame: Frame) -> int:
    return len(frame.payload.data) if frame.payload is not None else 0


def is_bulk(frame: Frame) -> bool:
    """Whether a frame is part of a long prompt, which may wait behind tokens and control."""
    message = frame.message
    return isinstance(message, StepFrame) and (message.count > 1 or message.sample is None)
