"""Tickets: what an origin signs to open a hop, and what a recipient checks before it believes one.

The signature covers a fixed prefix and the exact bytes of the ticket, so no other use of the same key can
be taken for one. The lease counts from receipt on the receiver's own monotonic clock, which is passed in:
no two clocks are compared. What the span means, and whether it is free, is for the caller. Knows nothing of
connections.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Container
from dataclasses import dataclass, field

import msgspec

from dgnd.errors import BadRequest, ProtocolError, TicketRefused
from dgnd.identity import Identity, parse_peer_id, verify
from dgnd.wire.limits import DEFAULT_LIMITS, TICKET_BYTES, Limits, check_fields
from dgnd.wire.messages import WIRES, HopKey, OpenHop, Ticket

_DOMAIN = b"dgn/1 ticket\0"
NONCE_BYTES = 16
MAX_NONCE_BYTES = 32
MIN_LEASE_S = 1.0
MAX_LEASE_S = 3600.0

_decoder = msgspec.msgpack.Decoder(Ticket)
_encoder = msgspec.msgpack.Encoder()


def new_nonce() -> bytes:
    """Fresh random bytes for one ticket."""
    return secrets.token_bytes(NONCE_BYTES)


def sign_ticket(ticket: Ticket, identity: Identity) -> OpenHop:
    """The message that opens the hop; `identity` is the origin's."""
    assert ticket.key.origin == identity.peer_id
    raw = _encoder.encode(ticket)
    return OpenHop(ticket=raw, signature=identity.sign(_DOMAIN + raw))


@dataclass(slots=True)
class _Origin:
    """What is remembered of one origin: each nonce and its lease's end, each session's highest hop id."""

    nonces: dict[bytes, float] = field(default_factory=dict)
    last_hops: dict[str, tuple[int, float]] = field(default_factory=dict)


class TicketBook:
    """Checks tickets and remembers which ones were used; bounded for each origin.

    `me`: this node's peer id.
    """

    def __init__(
        self,
        me: str,
        *,
        max_lease_s: float = MAX_LEASE_S,
        max_remembered: int = 16384,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self._me = me
        self._max_lease_s = max_lease_s
        self._max_remembered = max_remembered
        self._limits = limits
        self._origins: dict[str, _Origin] = {}

    def admit(
        self,
        open_hop: OpenHop,
        sender: str,
        allowed: Callable[[str], bool],
        now: float,
        open_hops: Container[HopKey] = (),
    ) -> Ticket:
        """The ticket, when it is good; it counts as used from then on.

        `sender`: the authenticated peer it came from. `allowed`: whether this node's own configuration has a
        peer, asked of the origin and both neighbours; this node itself always may. `now`: monotonic seconds.
        Hop ids of one session must come in rising order, but for those of `open_hops`. Raises TicketRefused
        with what is wrong; then nothing is remembered.
        """
        ticket = self._read(open_hop)
        self._check_parties(ticket, sender, allowed)
        if not verify(ticket.key.origin, _DOMAIN + open_hop.ticket, open_hop.signature):
            raise TicketRefused(f"the ticket is not signed by its origin {ticket.key.origin}")
        self._check_bounds(ticket)
        self._remember(ticket, now, ticket.key in open_hops)
        return ticket

    def again(self, open_hop: OpenHop, sender: str) -> Ticket | None:
        """The ticket, if it was admitted before and has come once more, from one of those who may send it.
        Raises TicketRefused for what is no ticket."""
        ticket = self._read(open_hop)
        if sender not in (ticket.key.origin, ticket.previous, ticket.next):
            return None
        book = self._origins.get(ticket.key.origin)
        if book is None or ticket.nonce not in book.nonces:
            return None
        good = verify(ticket.key.origin, _DOMAIN + open_hop.ticket, open_hop.signature)
        return ticket if good else None

    def forget(self, origin: str) -> None:
        """Drops what is remembered of an origin that left the configuration."""
        self._origins.pop(origin, None)

    def _read(self, open_hop: OpenHop) -> Ticket:
        if len(open_hop.ticket) > TICKET_BYTES:
            raise TicketRefused(f"a ticket of {len(open_hop.ticket)} bytes; at most {TICKET_BYTES}")
        try:
            ticket = _decoder.decode(open_hop.ticket)
            check_fields(ticket, "ticket", self._limits)
            for peer in (ticket.key.origin, ticket.recipient, ticket.previous, ticket.next):
                if parse_peer_id(peer) != peer:
                    raise TicketRefused("a peer id in the ticket has blanks around it")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TicketRefused(f"the ticket can't be read: {error}") from None
        except (ProtocolError, BadRequest) as error:
            raise TicketRefused(f"the ticket can't be used: {error}") from None
        return ticket

    def _check_parties(self, ticket: Ticket, sender: str, allowed: Callable[[str], bool]) -> None:
        origin = ticket.key.origin
        if origin != self._me and not allowed(origin):
            raise TicketRefused(
                f"this node does not serve the origin {origin}; its configuration doesn't allow it"
            )
        if ticket.recipient != self._me:
            raise TicketRefused(f"the ticket is for {ticket.recipient}, this is {self._me}")
        if sender not in (origin, ticket.previous, ticket.next):
            raise TicketRefused(
                f"{sender} is not the origin, the previous or the next peer of the ticket it sent"
            )
        for word, peer in (("previous", ticket.previous), ("next", ticket.next)):
            if peer not in (self._me, origin) and not allowed(peer):
                raise TicketRefused(f"the {word} peer {peer} is not in this node's configuration")
        if ticket.next_hop is None and ticket.next != origin:
            raise TicketRefused(f"results of the last hop go to the origin {origin}, not to {ticket.next}")

    def _check_bounds(self, ticket: Ticket) -> None:
        if not ticket.key.session or not ticket.model or not ticket.span:
            raise TicketRefused("the ticket names no session, model or span")
        if not NONCE_BYTES <= len(ticket.nonce) <= MAX_NONCE_BYTES:
            raise TicketRefused(f"a nonce of {len(ticket.nonce)} bytes; {NONCE_BYTES} to {MAX_NONCE_BYTES}")
        if not (math.isfinite(ticket.lease_s) and MIN_LEASE_S <= ticket.lease_s <= self._max_lease_s):
            raise TicketRefused(f"a lease of {ticket.lease_s:g} s; {MIN_LEASE_S:g} to {self._max_lease_s:g}")
        if ticket.wire not in WIRES:
            raise TicketRefused(f"results as {ticket.wire[:16]!r}; this node knows {' and '.join(WIRES)}")
        if ticket.max_positions < 1:
            raise TicketRefused("a ticket for 0 positions")
        if not 1 <= ticket.max_chunk <= self._limits.step_positions:
            raise TicketRefused(f"chunks of {ticket.max_chunk} positions; 1 to {self._limits.step_positions}")

    def _remember(self, ticket: Ticket, now: float, is_open: bool) -> None:
        book = self._origins.setdefault(ticket.key.origin, _Origin())
        session, hop = ticket.key.session, ticket.key.hop
        if ticket.nonce in book.nonces:
            raise TicketRefused("the ticket was used before")
        last = book.last_hops.get(session)
        if last is not None and hop <= last[0] and not is_open:
            raise TicketRefused(f"hop {hop} of session {session} is not above its last hop {last[0]}")
        self._make_room(book, now)
        until = now + ticket.lease_s
        book.nonces[ticket.nonce] = until
        highest, leased = last or (hop, until)
        book.last_hops[session] = max(hop, highest), max(until, leased)

    def _make_room(self, book: _Origin, now: float) -> None:
        """Forgets what no lease holds, but only when memory is full; a live ticket is never forgotten."""
        if max(len(book.nonces), len(book.last_hops)) < self._max_remembered:
            return
        book.nonces = {nonce: until for nonce, until in book.nonces.items() if until > now}
        book.last_hops = {name: last for name, last in book.last_hops.items() if last[1] > now}
        if max(len(book.nonces), len(book.last_hops)) >= self._max_remembered:
            raise TicketRefused(
                f"{self._max_remembered} tickets of this origin are in use; wait for a lease to end"
            )
