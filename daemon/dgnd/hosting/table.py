"""The open hops of a node, by key, with what they journalled. Knows nothing of frames but the one that ends a
hop in its worker.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from dgn_backends.span import Span
from dgnd.hosting.admission import HopHost
from dgnd.hosting.hop import Hop
from dgnd.hosting.journal import JournalBook
from dgnd.wire.messages import CloseHop, Frame, HopKey, Ticket

log = logging.getLogger("dgnd.hops")


@dataclass(slots=True)
class HopTable:
    """All hops, and how one ends."""

    host: HopHost
    journals: JournalBook
    hops: dict[HopKey, Hop] = field(default_factory=dict)

    def make_way(self, ticket: Ticket, span: Span) -> None:
        """What the session had in the same place before is given up."""
        for key, hop in list(self.hops.items()):
            if (key.origin, key.session) == (ticket.key.origin, ticket.key.session) and (
                hop.ticket.model != ticket.model or set(hop.span.units()) & set(span.units())
            ):
                self.forget(hop)

    def forget(self, hop: Hop) -> None:
        """Ends a hop here and in its worker."""
        self.drop(hop)
        self.host.to_worker(hop.ticket.model, Frame(CloseHop(key=hop.ticket.key)))

    def drop(self, hop: Hop) -> None:
        """Ends a hop whose worker has no part of it any more."""
        key = hop.ticket.key
        if self.hops.pop(key, None) is not None:
            about = hop.about
            log.info(
                "generation %s: hop %d closed at %d",
                about["generation"],
                key.hop,
                hop.fence.length,
                extra=about,
            )
        self.journals.drop(hop.ticket.key)
