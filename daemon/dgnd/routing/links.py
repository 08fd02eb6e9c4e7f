"""How long bytes take between nodes, as far as anybody has measured it. Pure; knows nothing of connections
or of routes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

#: One way between this node and a peer whose round trip is not known yet: what it is in one house.
UNKNOWN_MS = 0.25


@dataclass(frozen=True, slots=True)
class Links:
    """The links that a route may take, seen from `me`. Round trips in ms."""

    me: str
    mine: Mapping[str, float] = field(default_factory=dict)  #: measured here, by peer
    said: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  #: what each peer measured, by peer
    live: Mapping[str, Collection[str]] = field(default_factory=dict)  #: whom each peer is connected with

    def direct(self, a: str, b: str) -> bool:
        """Whether what `a` sends gets to `b` without `me` handing it on. Both ends must say so; what is at
        this node, or stays at one peer, is always direct."""
        if a == b or self.me in (a, b):
            return True
        return b in self.live.get(a, ()) and a in self.live.get(b, ())

    def one_way_ms(self, a: str, b: str) -> float:
        """From `a` to `b`, by `me` where they have no connection or none that was measured.

        Of two measurements of one link the longer counts: nobody makes a link look good alone.
        """
        if a == b:
            return 0.0
        if self.me in (a, b):
            trip = self.mine.get(b if a == self.me else a)
            return UNKNOWN_MS if trip is None else trip / 2
        trips = [trip for x, y in ((a, b), (b, a)) if (trip := self.said.get(x, {}).get(y)) is not None]
        if trips and self.direct(a, b):
            return max(trips) / 2
        return self.one_way_ms(a, self.me) + self.one_way_ms(self.me, b)
