"""Peers that did not answer in time: passed over for a while, where others can serve. Knows no reasons."""

from __future__ import annotations

from collections.abc import Callable

#: How long a peer is passed over after it was silent; it may come back sooner, by answering.
SUSPECT_S = 15.0


class Suspects:
    """As one node sees its peers. `now`: monotonic seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._until: dict[str, float] = {}  # by peer, of which there are few

    def add(self, peer: str) -> None:
        """It did not answer."""
        self._until[peer] = self._now() + SUSPECT_S

    def clear(self, peer: str) -> None:
        """It answered."""
        self._until.pop(peer, None)

    def __contains__(self, peer: object) -> bool:
        return isinstance(peer, str) and self._until.get(peer, 0.0) > self._now()
