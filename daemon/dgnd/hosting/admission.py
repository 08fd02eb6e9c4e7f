"""Whether an origin may open a hop here: its ticket, its model, the span it asks for, its share of the room.

Refuses with a typed error and changes nothing but the ticket book. Knows nothing of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from dgn_backends.span import Span, SpanSyntaxError, parse_spans
from dgnd.errors import LimitError, NoRoomNow, NotReady, ProtocolError, TicketRefused
from dgnd.metrics.counts import Counts
from dgnd.wire.limits import check_fields
from dgnd.wire.messages import Frame, HopKey, OpenHop, Ticket
from dgnd.wire.ticket import TicketBook
from dgnd.words import counted


class Post(Protocol):
    """Sends a frame to a peer, or to this node itself, without waiting."""

    def __call__(self, peer: str, frame: Frame, left: Callable[[], None] | None = None, /) -> bool:
        """False where too much waits for that peer, and the frame is lost. Else `left` is called when it has
        left this node, or was lost with its connection; maybe at once."""


@dataclass(slots=True)
class HopHost:
    """What the hop server needs of the node around it. None of these may block."""

    me: str
    now: Callable[[], float]
    post: Post
    is_up: Callable[[str], bool]  #: a peer that frames can reach now; this node itself always
    is_allowed: Callable[[str], bool]  #: a peer of the configuration, or this node itself
    #: (model, origin, config digest, manifest digest) -> why that origin's model is not ours, or None
    refuses_model: Callable[[str, str, str, str | None], str | None]
    loaded_spans: Callable[[str], Iterable[Span]]  #: of a model, those that compute now
    to_worker: Callable[[str, Frame], bool]  #: False when the model's worker is not there
    nudge: Callable[[str], None]  #: an answer waits for a peer: it is gone if it gives no sign of life
    look_after: Callable[[str], None]  #: an answer waits for a model's worker: the same of that
    n_blocks: Callable[[str], int]
    context: Callable[[str], int]  #: of a model, the positions that it can hold
    counts: Counts = field(default_factory=Counts)


class Admission:
    """One node's checks. `max_sessions`: of each origin, so that others never take this node's own room."""

    def __init__(self, host: HopHost, tickets: TicketBook, max_sessions: int) -> None:
        self._host = host
        self._tickets = tickets
        self.max_sessions = max_sessions

    def again(self, sender: str, message: OpenHop) -> Ticket | None:
        """The ticket, if it was admitted before. Raises TicketRefused for what is none."""
        return self._tickets.again(message, sender)

    def check(self, sender: str, message: OpenHop, open_hops: Collection[HopKey]) -> tuple[Ticket, Span]:
        """The ticket and its span, if the hop may be opened beside `open_hops`.

        Raises TicketRefused, NotReady for blocks that are not loaded (now), LimitError or NoRoomNow with both
        numbers.
        """
        host = self._host
        ticket = self._tickets.admit(message, sender, host.is_allowed, host.now(), open_hops)
        why = host.refuses_model(
            ticket.model, ticket.key.origin, ticket.config_digest, ticket.manifest_digest
        )
        if why is not None:
            raise TicketRefused(why)
        span = self._span_of(ticket)
        self._check_room(ticket, open_hops)
        return ticket, span

    def _check_room(self, ticket: Ticket, open_hops: Iterable[HopKey]) -> None:
        origin, session, context = ticket.key.origin, ticket.key.session, self._host.context(ticket.model)
        if ticket.max_positions > context:
            raise LimitError(
                f"a ticket for {ticket.max_positions} positions; the context of {ticket.model} is {context}"
            )
        others = {key.session for key in open_hops if key.origin == origin} - {session}
        if len(others) >= self.max_sessions:
            raise NoRoomNow(
                f"open here of this origin: {counted(len(others), 'session')}, of {self.max_sessions} at most"
            )

    def _span_of(self, ticket: Ticket) -> Span:
        loaded = list(self._host.loaded_spans(ticket.model))
        try:
            spans = parse_spans(ticket.span, self._host.n_blocks(ticket.model))
        except SpanSyntaxError as error:
            raise TicketRefused(str(error)) from error
        if len(spans) == 1 and any(span.contains(spans[0]) for span in loaded):
            return spans[0]
        have = ", ".join(str(span) for span in loaded) or "nothing"
        raise NotReady(f"{ticket.span} of {ticket.model} is not loaded here; loaded: {have}")


def claimed_key(message: OpenHop) -> HopKey | None:
    """The hop that a refused ticket speaks of, so that its sender can tell which; grants nothing."""
    try:
        key = msgspec.msgpack.decode(message.ticket, type=Ticket).key
        check_fields(key, "key")
        return key
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ProtocolError):
        return None
