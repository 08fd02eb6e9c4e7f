"""A flood of log lines of one kind becomes a few and a count. Knows nothing of what is logged or where to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

MOST: Final = 100  #: lines of one kind that are let through
WINDOW_S: Final = 10.0  #: in so long


class Flood(logging.Filter):
    """For one handler. Of one kind are lines that the same place in the code logs: what peers send changes
    their words, not how many kinds there are, so what is kept here is bounded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[tuple[str, int], tuple[float, int]] = {}  # when each began, lines since then

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it goes on. The first line of the next window says how many were left out before it."""
        kind, now = (record.pathname, record.lineno), self._clock()
        begun, lines = self._windows.get(kind, (now, 0))
        if now - begun >= WINDOW_S:
            if lines > MOST:
                left_out = f"{record.getMessage()} (and {lines - MOST} lines like this were left out before)"
                record.msg, record.args = left_out, ()
            begun, lines = now, 0
        self._windows[kind] = begun, lines + 1
        return lines < MOST
