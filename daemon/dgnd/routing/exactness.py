"""Whether an answer is one that its nodes would give alone: all parts of the line stored and computed alike,
and none replaced on the way by one that computes otherwise. Pure values.

Numerics may differ along a line, as other processors round otherwise; what changes answers visibly is another
quantisation or dtype. A replacement has to go on with the very numbers, or its tokens may be others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


def alike(line: Line) -> bool:
    """Whether all parts store and compute the model in the same way."""
    known = [way for way in line.values() if way is not None]
    return len(known) == len(line) and len({(way.quant, way.dtype) for way in known}) <= 1


class Exactness:
    """Of one answer: of the tokens that it has."""

    def __init__(self) -> None:
        self.holds = True
        self.line: Line = {}  #: the line that gave the last token

    def would_hold(self, line: Line, *, pure: bool, begun: bool) -> bool:
        """Whether the answer is still exact with a token of `line`. `pure`: all KV behind it was computed
        through that line (`dgnd.routing.lineage`). `begun`: there are tokens, whose KV came from elsewhere
        first."""
        if not begun:
            return pure and alike(line)
        again = line == self.line and all(way is None or way.row_invariant for way in line.values())
        return self.holds and pure and alike(line) and again

    def through(self, line: Line, *, pure: bool, begun: bool) -> None:
        """The next token came through `line`, the first one since the hops changed."""
        self.holds = self.would_hold(line, pure=pure, begun=begun)
        self.line = line


def kinds(ways: Iterable[Way]) -> list[list[frozenset[Way]]]:
    """Which ways may be together in the line of an exact answer, the best sets first: those in which any node
    can replace any other, then those that lose exactness with a node, then those of several numerics."""
    known = frozenset(ways)
    steady = frozenset(way for way in known if way.row_invariant)
    found = [{frozenset({way}) for way in steady}, {frozenset({way}) for way in known}]
    found += [{frozenset(b for b in some if same_kind(a, b)) for a in some} for some in (steady, known)]
    return [sorted(sets, key=repr) for sets in found if sets]


def same_kind(a: Way | None, b: Way | None) -> bool:
    """Whether two parts of one line may compute so."""
    return a is not None and b is not None and (a.quant, a.dtype) == (b.quant, b.dtype)


def difference(way: Way, wanted: Way) -> str:
    """What keeps `way` from taking the place of `wanted`, in words."""
    if way.quant != wanted.quant:
        return f"quant {way.quant}, not {wanted.quant}"
    if way.dtype != wanted.dtype:
        return f"dtype {way.dtype}, not {wanted.dtype}"
    if way.numerics != wanted.numerics:
        return f"numerics {way.numerics}, not {wanted.numerics}"
    return "results that depend on what else it computes"
