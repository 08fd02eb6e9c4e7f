"""When things of one request happened. Knows nothing of what they are."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from dgnd.control import api


@dataclass(slots=True)
class Clocks:
    """When things of one request happened, in trio's time."""

    received: float
    prefill: float = 0.0
    first: float = 0.0
    last: float = 0.0

    def token(self) -> float:
        """A token came; returns how long after the request, or the token before, in seconds."""
        before, self.last = self.last or self.received, trio.current_time()
        self.first = self.first or self.last
        return self.last - before

    def timings(self) -> api.Timings:
        """As reported."""
        if not self.first:
            return api.Timings(prefill_s=0.0, decode_s=0.0, ttft_s=0.0)
        return api.Timings(
            prefill_s=self.first - self.prefill,
            decode_s=self.last - self.first,
            ttft_s=self.first - self.received,
        )
