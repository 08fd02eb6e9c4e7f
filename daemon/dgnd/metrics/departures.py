"""How long steps and tokens take to get from this node to the next one, as far as one side can tell.

To serialise is to make bytes of a frame, encrypt them and give them to the kernel. On the wire it is for half
the round trip that was last measured there; a frame that first had to wait for the link is there from when it
was posted. Knows nothing of queues or of connections.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dgnd.metrics.counts import Counts


def _unknown(_: str) -> float | None:
    return None


@dataclass(slots=True)
class Departures:
    """Of one node. `trip_s`: the round trip to a peer in seconds, None while it is not known."""

    counts: Counts = field(default_factory=Counts)
    trip_s: Callable[[str], float | None] = _unknown

    def at_once(self, peer: str, took_s: float) -> None:
        """A frame left in `took_s`, without waiting."""
        count, trip_s = self.counts.peer(peer), self.trip_s(peer)
        count.serialise.add(took_s)
        if trip_s is not None:
            count.wire.add(trip_s / 2)

    def waited(self, peer: str, since_s: float) -> None:
        """A frame has left that was posted so long ago."""
        self.counts.peer(peer).wire.add(since_s + (self.trip_s(peer) or 0.0) / 2)
