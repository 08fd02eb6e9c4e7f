"""When to say again what a node offers: figures change all the time, and peers want to hear of what matters.

Pure: values in, values out; it is told the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dgnd.wire.checks import TRIPS_MAX
from dgnd.wire.messages import Hello

#: Figures are looked at so often, so that is the most often that they are said.
LOOK_S = 2.0
#: What was said counts for so long; and is said again, though nothing changed, after so much less.
EXPIRY_S, AGAIN_S = 60.0, 25.0
#: A change matters from this ratio on, if it is also more than the least difference of its kind.
RATIO = 1.25
LEAST_MS, LEAST_SESSIONS, LEAST_POSITIONS = 0.2, 0.5, 256.0


def told_trips(trips: Mapping[str, float]) -> dict[str, float]:
    """Of the round trips to peers, in ms, those that are told others: the shortest, if there are too many."""
    nearest = sorted(trips, key=lambda peer: (trips[peer], peer))[:TRIPS_MAX]
    return {peer: round(trips[peer], 3) for peer in sorted(nearest)}


class Saying:
    """What was said last, and when."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, ...], tuple[float | None, float]] = {}
        self._at = 0.0

    def is_due(self, hello: Hello, now: float) -> bool:
        """Whether `hello` should be said again at `now`, in seconds; if so it counts as said."""
        figures = dict(_figures(hello))
        due = now - self._at >= AGAIN_S if figures else False
        if (
            due
            or figures.keys() != self._said.keys()
            or any(_differ(self._said[name][0], value, least) for name, (value, least) in figures.items())
        ):
            self._said, self._at = figures, now
            return True
        return False


def _figures(hello: Hello) -> Iterator[tuple[tuple[str, ...], tuple[float | None, float]]]:
    """All figures by what they are of, each with the least difference that matters."""
    for peer, trip in hello.trips.items():
        yield ("trip", peer), (trip, LEAST_MS)
    for offer in hello.offers:
        for span in offer.spans:
            of = (offer.model, span.span)
            yield ("step", *of), (span.step_ms, LEAST_MS)
            yield ("prefill", *of), (span.prefill_ms, LEAST_MS / 10)
            yield ("queue", *of), (span.queue, LEAST_SESSIONS)
            yield ("kv", *of), (float(span.free_kv_positions), LEAST_POSITIONS)


def _differ(a: float | None, b: float | None, least: float) -> bool:
    if a is None or b is None:
        return a is not b
    low, high = min(a, b), max(a, b)
    return high - low >= least and high >= RATIO * low
