"""The answers that this origin began just now, by where they run: what others say has them only later.

So a node counts as busy the moment that this one sends it a session, and sessions that begin together are
spread. Pure; knows no sessions but by name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

#: After so long a node's own figures have them.
SPREAD_S = 8.0


class Bookings:
    """Of one origin. `now`: monotonic seconds. As many as there are answers."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._by_session: dict[str, tuple[str, float, frozenset[str]]] = {}

    def begin(self, session: str, model: str, peers: Collection[str]) -> None:
        """An answer begins on a route through `peers`, or goes on through these."""
        self._by_session[session] = model, self._now(), frozenset(peers)

    def end(self, session: str) -> None:
        """The answer has ended."""
        self._by_session.pop(session, None)

    def beside(self, session: str, model: str, peer: str) -> float:
        """How many answers of other sessions run through a peer that its figures have not yet; less of each,
        the older it is."""
        now = self._now()
        return sum(
            max(1.0 - (now - begun) / SPREAD_S, 0.0)
            for name, (of, begun, peers) in self._by_session.items()
            if name != session and of == model and peer in peers
        )
