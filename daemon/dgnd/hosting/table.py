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

    def forget(self, hop: Hop, why: str = "") -> None:
        """Ends a hop here and in its worker. `why`: where its origin did not ask for it."""
        self.drop(hop, why)
        self.host.to_worker(hop.ticket.model, Frame(CloseHop(key=hop.ticket.key)))

    def drop(self, hop: Hop, why: str = "") -> None:
        """Ends a hop whose worker has no part of it any more. That an origin closed what it opened is news
        for nobody: a peer that does so in a flood would fill the log twice as fast."""
        key, about = hop.ticket.key, hop.about
        if self.hops.pop(key, None) is not None:
            log.log(
                logging.INFO if why else logging.DEBUG,
                "generation %s: hop %d closed at %d%s",
                about["generation"],
                key.hop,
                hop.fence.length,
                f": {why}" if why else "",
                extra=about,
            )
        self.journals.drop(hop.ticket.key)
