"""Notices that loading has stopped. Knows nothing of what is loaded.

Loading may take its time, and says how far it is only now and then: what counts is whether anything moves.
Time in which the whole process stands still does not count, as in `watchdog`.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from types import TracebackType

#: Without progress, computing or reading for so long, loading hangs.
PATIENCE_S = 120.0
#: One that computes or reads may go on without progress for so many times as long: 20 minutes.
_BUSY_FACTOR = 10
_TICK_S = 1.0
#: The share of a processor below which nothing is computed: answers to pings take a little.
_IDLE_SHARE = 0.05


class LoadWatch:
    """A context manager around the loading; `on_hang` runs on a thread of its own, at most once."""

    def __init__(self, on_hang: Callable[[], None]) -> None:
        self._on_hang = on_hang
        self._signs = 0
        self._over = threading.Event()

    def sign(self) -> None:
        """There was progress."""
        self._signs += 1

    def __enter__(self) -> LoadWatch:
        threading.Thread(target=self._watch, name="load-watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        signs, done, waited_s = self._signs, _work_done(), 0.0
        while waited_s < PATIENCE_S:
            if self._over.wait(_TICK_S):
                return
            before, done = done, _work_done()
            idle = done[0] - before[0] < _IDLE_SHARE * _TICK_S and done[1] == before[1]
            waited_s += _TICK_S if idle else _TICK_S / _BUSY_FACTOR
            if signs != self._signs:
                signs, waited_s = self._signs, 0.0
        if not self._over.is_set():
            self._on_hang()


def _work_done() -> tuple[float, int]:
    """Seconds of processor time, and reads from disks, of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.process_time(), usage.ru_majflt + usage.ru_inblock
