"""What workers answer for the hops of a node: journalled, passed on to the next hop, told to the origin.

Knows nothing of who may open a hop or send to it.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from dgn_backends.tensor import Tensor
from dgnd.errors import DgnError, NonFiniteOutput, PeerError, PeerGone, ProtocolError
from dgnd.hosting.admission import HopHost
from dgnd.hosting.hop import Hop
from dgnd.hosting.table import HopTable
from dgnd.wire import q8
from dgnd.wire.codec import failure_of
from dgnd.wire.messages import (
    Credit,
    Failure,
    Frame,
    HopKey,
    HopLength,
    HopOpened,
    Replay,
    StepFrame,
    TokenFrame,
)


class HopResults:
    """The way of results."""

    def __init__(self, host: HopHost, table: HopTable) -> None:
        self._host = host
        self._table = table

    def on_worker_frame(self, model: str, frame: Frame) -> None:
        """An answer of this node's worker of `model`."""
        message = frame.message
        key = getattr(message, "key", None)
        hop = self._table.hops.get(key) if isinstance(key, HopKey) else None
        if hop is None:
            return
        origin = hop.ticket.key.origin
        match message:
            case StepFrame():
                self._computed(hop, message, frame.payload)
            case HopOpened(credits=credits):
                hop.opened = message
                hop.fence.grant(credits)
                if hop.cancelling is None:
                    self._host.post(origin, hop.opened_frame())
            case TokenFrame(position=position):
                hop.fence.passed_on(position)
                self._host.post(origin, frame)
            case HopLength(length=length, branch=branch):
                self._settled(hop, branch, length)
            case Failure():
                if hop.opened is None:
                    self._table.drop(hop)
                self._host.post(origin, frame)
            case _:  # Credit
                hop.fence.passed_on(getattr(message, "stop", 0))
                self._host.post(origin, frame)

    def _computed(self, hop: Hop, message: StepFrame, payload: Tensor | None) -> None:
        """Hidden states: passed on where the next hop lacks them, and kept as long as their branch is the
        hop's."""
        hop.fence.passed_on(message.stop)
        if payload is not None and hop.ticket.wire == "q8":
            payload = self._encoded(hop, message, payload)
            if payload is None:
                return
        if not hop.goes_further(message.branch):
            credit = Credit(key=message.key, branch=message.branch, route=hop.fence.route, stop=message.stop)
            self._host.post(message.key.origin, Frame(credit))
        elif message.route == hop.fence.route:
            self.forward(hop, message, payload)
        # While the next hop works on it already; to post it may have ended this hop.
        kept = message.branch == hop.fence.branch and hop.ticket.next_hop is not None
        if payload is not None and kept and self._table.hops.get(message.key) is hop:
            self._table.journals.keep(message.key, message, payload)

    def _encoded(self, hop: Hop, message: StepFrame, payload: Tensor) -> Tensor | None:
        """The results as they travel, and are journalled, so that they are the same when sent again; None
        after telling the origin that they are none."""
        try:
            return q8.encode(payload)
        except ValueError as error:
            self.tell(hop, NonFiniteOutput(f"{hop.span} of {hop.ticket.model}: {error}"), message)
            return None

    def _settled(self, hop: Hop, branch: int, length: int) -> None:
        """The worker dropped what waited, and its KV holds `length` positions."""
        if hop.cancelling == branch:
            hop.cancelling = None
            length = hop.fence.cancelled(length)
            self._table.journals.truncate(hop.ticket.key, length)
        if hop.rerouted:
            hop.rerouted = False
            self._host.post(hop.ticket.key.origin, hop.opened_frame())
        else:
            answer = HopLength(key=hop.ticket.key, branch=branch, length=length)
            self._host.post(hop.ticket.key.origin, Frame(answer))

    def forward(
        self, hop: Hop, message: StepFrame, payload: Tensor | None, left: Callable[[], None] | None = None
    ) -> bool:
        """Sends a result to the next hop; False where that can't be, and its origin is told. `left` as in
        `Post`."""
        ticket = hop.ticket
        if ticket.next_hop is None:
            error: DgnError = ProtocolError("the last hop of the ticket has no head")
        elif not self._host.is_up(ticket.next):
            error = PeerGone(f"no connection to {ticket.next}, which has the next blocks", peer=ticket.next)
        else:
            key = HopKey(ticket.key.origin, ticket.key.session, ticket.next_hop)
            onward = msgspec.structs.replace(message, key=key)
            if self._host.post(ticket.next, Frame(onward, payload), left):
                return True
            # It is sent again when the origin asks.
            error = PeerError(f"too much waits already for {ticket.next}, which has the next blocks")
        self.tell(hop, error, message)
        return False

    def tell(self, hop: Hop, error: DgnError, message: StepFrame | Replay) -> None:
        """What the origin has to know of a step's results."""
        key = hop.ticket.key
        self._host.post(key.origin, Frame(failure_of(error, key, message.branch, "step")))
