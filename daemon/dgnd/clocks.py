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

    def token(self) -> None:
        """A token came."""
        self.last = trio.current_time()
        self.first = self.first or self.last

    def timings(self) -> api.Timings:
        """As reported."""
        if not self.first:
            return api.Timings(prefill_s=0.0, decode_s=0.0, ttft_s=0.0)
        return api.Timings(
            prefill_s=self.first - self.prefill,
            decode_s=self.last - self.first,
            ttft_s=self.first - self.received,
        )
