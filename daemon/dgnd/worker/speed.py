"""How fast a worker computes of late, and how busy it is: the figures that its node offers.

Medians of the last steps: a hiccup counts for nothing, and a machine that became slower shows it at once.
But whoever is slow is avoided, takes no more steps, and would say the same for ever. So after a rest without
steps it says the best figure that it had in the last hours, and is tried again; as long as it disappoints,
the rests grow. What is older than that is forgotten. Policy alone: it is told the time, and knows steps by
their size.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dgnd.routing.search import BESIDE

#: After so long without a step the best figure is said again; twice as long each time that it was too good.
REST_S, LONGEST_REST_S = 60.0, 3600.0
#: A figure this many times the best one disappoints.
DISAPPOINTS = 1.5
#: A best figure is forgotten after one to two times this.
BEST_S = 6 * 3600.0
#: Batches of fewer positions say nothing of a prompt's speed: reading the weights is most of their time.
TELLING = 16
#: Of the average number of hops at work.
LOAD_S = 4.0


@dataclass(frozen=True, slots=True)
class StepWork:
    """A hop's part of a batch."""

    group: int  #: those of one group are computed together
    positions: int
    weight: float  #: of the hop's units for a decode step, where a block is 1
    blocks: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What is said at one time."""

    step_ms: float | None  #: a decode step of one hop through one block
    prompt_ms: float | None  #: one position of a prompt through one block
    queue: float  #: hops whose steps are computed or wait, on average


class Figure:
    """ms for one piece of work: the median of the last `keep` measurements, once there are `least`."""

    def __init__(self, keep: int, least: int) -> None:
        self._least = least
        self._last = -math.inf
        self._rest_s = REST_S
        self._samples: deque[float] = deque(maxlen=keep)
        self._best: float | None = None  # since `_since`
        self._best_before: float | None = None
        self._since = -math.inf

    def take(self, ms: float, now: float) -> None:
        """A measurement made at `now`, in seconds."""
        if now - self._last > self._rest_s:
            self._rest_s = min(2 * self._rest_s, LONGEST_REST_S)
            self._samples.clear()
        self._samples.append(ms)
        self._last = now
        if len(self._samples) >= self._least:
            median = statistics.median(self._samples)
            self._forget(now)
            self._best = median if self._best is None else min(self._best, median)
            if median <= DISAPPOINTS * min(self._best, self._best_before or math.inf):
                self._rest_s = REST_S

    def said(self, now: float) -> float | None:
        """What to say of it at `now`; None where nothing is known."""
        if len(self._samples) >= self._least and now - self._last <= self._rest_s:
            return statistics.median(self._samples)
        self._forget(now)
        return min((best for best in (self._best, self._best_before) if best is not None), default=None)

    def _forget(self, now: float) -> None:
        if now - self._since > BEST_S:
            self._best_before = self._best if now - self._since <= 2 * BEST_S else None
            self._best, self._since = None, now


class Load:
    """How many hops have a step that is computed or waits, on average over the last seconds."""

    def __init__(self) -> None:
        self._average, self._at = 0.0, -math.inf

    def worked(self, begun: float, ended: float, hops: int) -> None:
        """From `begun` to `ended` there were `hops`, before that none."""
        before = self.said(begun)
        self._average = hops + (before - hops) * math.exp(-(ended - begun) / LOAD_S)
        self._at = ended

    def said(self, now: float) -> float:
        """The average at `now`."""
        return self._average * math.exp(-max(now - self._at, 0.0) / LOAD_S)


class Speed:
    """Of one worker, for all its spans: they run on one machine."""

    def __init__(self) -> None:
        self._load = Load()
        self._step_ms = Figure(keep=15, least=5)
        self._prompt_ms = Figure(keep=5, least=1)

    def said(self, now: float) -> Figures:
        """The figures at `now`, in seconds."""
        return Figures(self._step_ms.said(now), self._prompt_ms.said(now), self._load.said(now))

    def observe(self, works: Sequence[StepWork], begun: float, ended: float, waiting: int) -> None:
        """A batch was computed from `begun` to `ended`, in seconds, while `waiting` other hops waited."""
        took_ms = (ended - begun) * 1000
        if not works or took_ms <= 0:
            return
        self._load.worked(begun, ended, len(works) + waiting)
        positions = sum(work.positions for work in works)
        if positions == len(works):
            self._take(self._step_ms, took_ms, _alone(works), ended)
        elif positions >= TELLING:
            self._take(self._prompt_ms, took_ms, sum(work.positions * work.blocks for work in works), ended)

    def _take(self, figure: Figure, took_ms: float, amount: float, now: float) -> None:
        if amount > 0:
            figure.take(took_ms / amount, now)


def _alone(works: Iterable[StepWork]) -> float:
    """The blocks that one hop's step would have gone through in the time of this batch of decode steps: what
    steps of others beside it cost is counted by who reads the figures, with `load`."""
    groups: dict[int, list[float]] = {}
    for work in works:
        groups.setdefault(work.group, []).append(work.weight)
    return sum(statistics.fmean(group) * (1 + BESIDE * (len(group) - 1)) for group in groups.values())
