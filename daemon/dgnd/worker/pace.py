"""How many positions a batch may hold, sized so that a batch takes about a target time on this machine.

Fed with how long batches took; knows nothing of clocks, of backends, or of whose steps they are.
"""

from __future__ import annotations

#: How long a batch should take: what a decode step waits at the most for somebody else's prompt.
TARGET_S = 0.5
#: Fewer positions than this use the weights that a batch reads too badly; more gain nothing.
LEAST, MOST = 32, 512
#: The share of the newest measurement in the estimate.
_WEIGHT = 0.3
#: The share of the last batch's time that the next one may wait for another hop of the last to come back, and
#: again from when one did: in a batch of its own, each would cost about as much as all of them together.
_PATIENCE = 0.05
#: The same, for all of them: they come one after the other, as each costs its origin up to GAP_S.
_ALL_PATIENCE = 0.25
GAP_S = 0.002
#: Batches smaller than this say nothing of a prompt's speed: reading the weights is most of their time.
_TELLING = 16


class Pace:
    """The running estimate; starts with `LEAST` until a batch has been measured."""

    def __init__(self, target_s: float = TARGET_S) -> None:
        self._target_s = target_s
        self._per_s = 0.0
        self._last_s = 0.0

    def observe(self, positions: int, took_s: float) -> None:
        """A batch of `positions` took `took_s` seconds."""
        self._last_s = took_s
        if positions < _TELLING or took_s <= 0:
            return
        measured = positions / took_s
        self._per_s += (measured - self._per_s) * (_WEIGHT if self._per_s else 1.0)

    @property
    def patience_s(self) -> float:
        """How long the next batch may wait for one more of the hops that the last one served."""
        return max(_PATIENCE * self._last_s, min(GAP_S, self.all_patience_s))

    @property
    def all_patience_s(self) -> float:
        """How long it may wait for all of them, as long as they keep coming."""
        return _ALL_PATIENCE * self._last_s

    @property
    def budget(self) -> int:
        """Positions for the next batch."""
        return min(max(int(self._per_s * self._target_s), LEAST), MOST)
