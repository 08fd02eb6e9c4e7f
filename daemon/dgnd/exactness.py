"""Whether an answer is one that its nodes would give alone: all parts of the line stored and computed alike,
and none replaced on the way by one that computes otherwise. Pure values.

Numerics may differ along a line, as other processors round otherwise; what changes answers visibly is another
quantisation or dtype. A replacement has to go on with the very numbers, or its tokens may be others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Way:
    """How a node computes, as it says itself; see `dgnd.wire.messages.SpanOffer`."""

    quant: str
    dtype: str
    numerics: str
    row_invariant: bool


#: How each unit of a model is computed; None where nobody says.
Line = Mapping[int, Way | None]


class Exactness:
    """Of one answer."""

    def __init__(self) -> None:
        self.holds = True
        self._line: Line = {}

    def through(self, line: Line, *, begun: bool) -> None:
        """The answer goes on through `line`. `begun`: it has tokens, whose KV the line computes again."""
        known = [way for way in line.values() if way is not None]
        alike = len(known) == len(line) and len({(way.quant, way.dtype) for way in known}) <= 1
        if begun:
            alike = alike and line == self._line and all(way.row_invariant for way in known)
        self.holds = self.holds and alike
        self._line = line
