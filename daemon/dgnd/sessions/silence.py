"""Which hops of a session leave probes unanswered, and for how long: evidence about life, not about speed.

Time is what the session waited: none while this process itself stands still. Knows nothing of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dgnd.sessions.session import RouteHop


class Silence:
    """Of one session. `patience_s`: for how long a peer may leave a probe unanswered."""

    def __init__(self, patience_s: Callable[[str], float]) -> None:
        self._patience_s = patience_s
        self._waited: dict[int, float] = {}  # by hop that was probed: seconds since the first unanswered one

    def heard(self, hop: RouteHop) -> None:
        """Something came from the hop."""
        self._waited.pop(hop.hop, None)

    def probed(self, hops: Iterable[RouteHop]) -> None:
        """They were asked for a sign of life; what is known of others is forgotten."""
        self._waited = {hop.hop: self._waited.get(hop.hop, 0.0) for hop in hops}

    def wait(self, seconds: float) -> None:
        """So much time went by."""
        for hop in self._waited:
            self._waited[hop] += seconds

    def silent(self, hops: Iterable[RouteHop]) -> list[tuple[RouteHop, float]]:
        """Those that have not answered for too long, and for how long."""
        return [
            (hop, waited)
            for hop in hops
            if (waited := self._waited.get(hop.hop, 0.0)) >= self._patience_s(hop.peer)
        ]
