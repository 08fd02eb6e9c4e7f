"""Notices that one call has lasted too long. Knows nothing of what is called.

Time in which the whole process stands still (a stopped machine, SIGSTOP) does not count: seconds are counted
only as they are lived.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

_TICK_S = 1.0


class Watchdog:
    """A context manager around each call; `on_hang` runs on a thread of its own, once."""

    def __init__(self, patience_s: float, on_hang: Callable[[], None]) -> None:
        self._patience_s = patience_s
        self._on_hang = on_hang
        self._call = 0  # odd while one is under way
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def __enter__(self) -> None:
        self._call += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call += 1

    def _watch(self) -> None:
        seen, lived_s = 0, 0.0
        while lived_s < self._patience_s:
            time.sleep(_TICK_S)
            call = self._call
            lived_s = lived_s + _TICK_S if call == seen and call % 2 else 0.0
            seen = call
        self._on_hang()
