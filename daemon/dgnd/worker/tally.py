"""What a worker counts: how long steps waited for their turn and how long they were computed, and in what
batches.

Totals since it began; the daemon asks for them now and then. Knows nothing of threads or backends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dgnd.metrics.histogram import SIZES, Histogram
from dgnd.wire.messages import Cancel, CloseHop, Frame, HopKey, Spread, StepFrame, WorkDone
from dgnd.worker.joined import step_of


class Tally:
    """One worker's. Steps of one hop are taken in the order in which they came."""

    def __init__(self) -> None:
        self._came: dict[HopKey, deque[float]] = {}  # when those that wait did
        self._decode_steps = self._prompt_positions = 0
        self._batch = Histogram(SIZES)
        self._queue, self._compute = Histogram(), Histogram()

    def put(self, frame: Frame, now: float) -> None:
        """A frame came, at `now` in seconds; some make steps of their hop go that wait."""
        message = frame.message
        if isinstance(message, StepFrame):
            self._came.setdefault(message.key, deque()).append(now)
        elif isinstance(message, Cancel | CloseHop):
            self._came.pop(message.key, None)

    def taken(self, batch: Sequence[Frame], now: float) -> None:
        """What is computed next."""
        if not isinstance(batch[0].message, StepFrame):
            return
        for frame in batch:
            key = step_of(frame).key
            came = self._came.get(key)
            if came:
                self._queue.add(now - came.popleft())
                if not came:
                    del self._came[key]

    def computed(self, batch: Sequence[Frame], took_s: float) -> None:
        """It was computed."""
        if not isinstance(batch[0].message, StepFrame):
            return
        for frame in batch:
            step = step_of(frame)
            if step.count == 1:
                self._decode_steps += 1
            else:
                self._prompt_positions += step.count
        self._batch.add(len(batch))
        self._compute.add(took_s, len(batch))

    def said(self) -> WorkDone:
        """The totals."""
        return WorkDone(
            decode_steps=self._decode_steps,
            prompt_positions=self._prompt_positions,
            batch=_spread(self._batch),
            queue=_spread(self._queue),
            compute=_spread(self._compute),
        )


def _spread(histogram: Histogram) -> Spread:
    return Spread(total=histogram.total, counts=histogram.counts)
