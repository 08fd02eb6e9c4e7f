"""Peers that are passed over for a while, where others can serve: those that did not answer in time, and
those that could not take a session, for want of room most likely. Knows nothing of what was asked of them."""

from __future__ import annotations

from collections.abc import Callable

#: How long a peer is passed over after it was silent; it may come back sooner, by answering.
SUSPECT_S = 15.0
#: How long it gets no new session of a model after it could not take one.
PASS_OVER_S = 10.0


class Suspects:
    """As one node sees its peers, and itself. `now`: monotonic seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._silent_until: dict[str, float] = {}  # by peer, of which there are few
        self._passed_over_until: dict[tuple[str, str], float] = {}  # by peer and model

    def add(self, peer: str) -> None:
        """It did not answer."""
        self._silent_until[peer] = self._now() + SUSPECT_S

    def clear(self, peer: str) -> None:
        """It answered."""
        self._silent_until.pop(peer, None)

    def pass_over(self, peer: str, model: str) -> None:
        """It could not take a session of `model`."""
        self._passed_over_until[peer, model] = self._now() + PASS_OVER_S

    def passed_over(self, peer: str, model: str) -> bool:
        """Whether it could not take one a little while ago."""
        return self._passed_over_until.get((peer, model), 0.0) > self._now()

    def __contains__(self, peer: object) -> bool:
        """Whether it did not answer a little while ago."""
        return isinstance(peer, str) and self._silent_until.get(peer, 0.0) > self._now()
