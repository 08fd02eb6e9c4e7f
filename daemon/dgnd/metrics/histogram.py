"""How often values lay within which bounds, as plain numbers: to count one takes well under a microsecond.

Knows nothing of names, labels or Prometheus.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

#: Upper bounds in seconds, of all times.
TIMES = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
)  # fmt: skip
#: Of steps that are computed together.
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Histogram:
    """Counts of values up to each bound, and beyond the last; only ever grows."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float] = TIMES) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """`value` came, so many `times`."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def merge(self, total: float, counts: Sequence[int]) -> None:
        """As many values as another one of the same bounds counted, whose sum is `total`."""
        self._total += total
        for index, count in enumerate(counts[: len(self._counts)]):
            self._counts[index] += count

    def copy(self) -> Histogram:
        """One that counts apart from now on."""
        other = Histogram(self._bounds)
        other.merge(self._total, self._counts)
        return other

    @property
    def total(self) -> float:
        """The sum of all values."""
        return self._total

    @property
    def counts(self) -> tuple[int, ...]:
        """Of each bound alone, and of what is beyond the last."""
        return tuple(self._counts)

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """Each bound as text, with how many values are not above it."""
        so_far = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            so_far += count
            yield str(bound), so_far
