"""From what nodes offer to a route: the hops, in order, that cover embed, every block and head exactly
once, in the least time for a token as far as figures tell.

A shortest path: a state is how far the model is computed and where the result is; a step is a hop, which
costs what its blocks take there, what waits before it, and the way to it. Routes that differ by less than
`TIE` are equal, and sessions spread over them by the speed of the replicas. Pure: values in, values out.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol

from dgn_backends.span import Span, format_units, span_of_units, spans_of_units
from dgnd.errors import BlocksMissing
from dgnd.routing.links import Links

#: What a hop costs beside its blocks and its links, in ms for a token.
HOP_MS = 0.5
#: What each session beside costs a new one, in step times: steps computed together take little longer.
BESIDE = 0.25
#: Who was not measured yet counts as the fastest that has the same blocks; for one session of so many, as one
#: so many times as fast. So it is tried, and nobody relies on it.
CURIOUS, CURIOUS_TIMES = 8, 4.0
#: Routes that take at most as much longer than the best one are as good as it.
TIE = 0.05
#: A running session moves for a route that saves as large a share of its time for a token, and as many ms ...
MOVE_SHARE, MOVE_MS = 0.3, 1.0
#: ... and only if an answer of as many tokens wins back what computing the session again takes.
MOVE_TOKENS = 128
_DIGEST_MAX = 1 << 64


@dataclass(frozen=True, slots=True)
class Offer:
    """A span that `peer` computes for us now. What it has not measured is None."""

    peer: str
    span: Span
    step_ms: float | None = None  #: one decode step of one session through the whole span
    prefill_ms: float | None = None  #: one position of a prompt through it
    queue: float = 0.0  #: sessions whose steps are computed or wait there, on average
    free_kv: int | None = None  #: positions that a new session finds room for


@dataclass(frozen=True, slots=True)
class Hop:
    """A contiguous part of the model computed by `peer`."""

    peer: str
    span: Span


@dataclass(frozen=True, slots=True)
class Edge:
    """From hop k to hop k+1: direct, or relayed by the origin because the two ends don't know each other."""

    relayed: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """What a route is for. `weights`: how long each unit takes beside the others, [n_blocks + 2]; empty: all
    units alike."""

    model: str
    n_blocks: int
    links: Links
    session: str = ""  #: spreads sessions over equal routes
    positions: int = 0  #: how long the session may get, for room in KV caches
    weights: Sequence[float] = ()

    def weight(self, units: range) -> float:
        """How long the units take, in no particular measure; never 0 for any."""
        return sum(self.weights[unit] for unit in units) if self.weights else float(len(units))


def missing_units(offers: Sequence[Offer], n_blocks: int) -> frozenset[int]:
    """The units of a model that nobody offers."""
    covered = {unit for offer in offers for unit in offer.span.units()}
    return frozenset(range(n_blocks + 2)) - covered


def find_route(asked: Asked, offers: Sequence[Offer]) -> tuple[Hop, ...]:
    """A route through the whole model that takes at most `TIE` longer than the best, with no more hops.

    The order of `offers` does not matter. Peers that lack room for the session get only what nobody else
    offers. Raises BlocksMissing, naming what nobody serves.
    """
    return find_part(asked, offers, range(asked.n_blocks + 2))


def find_part(
    asked: Asked,
    offers: Sequence[Offer],
    units: range,
    ends: tuple[str, str] | None = None,
) -> tuple[Hop, ...]:
    """As `find_route`, for the contiguous `units` alone. `ends`: the peers before and after them, this node
    where not given; hops that lie next to each other at one peer stay two."""
    pieces = _pieces(asked, offers, units)
    missing = set(units).difference(*(piece.units for piece in pieces))
    if missing:
        text = format_units(missing, asked.n_blocks)
        raise BlocksMissing(
            f"nobody reachable serves {text} of model {asked.model}", missing=text, model=asked.model
        )
    return _Search(asked, pieces, ends or (asked.links.me, asked.links.me)).route()


def predicted_ms(asked: Asked, offers: Sequence[Offer], route: Sequence[Hop]) -> float | None:
    """How long a token takes over `route`, in ms, beside other routes: what nobody measured counts as when
    routes are found. None where a hop is not offered any more."""
    costs = [_cheapest(asked, offers, hop) for hop in route]
    if None in costs:
        return None
    peers = [asked.links.me, *(hop.peer for hop in route), asked.links.me]
    trips = sum(asked.links.one_way_ms(a, b) for a, b in itertools.pairwise(peers))
    return trips + sum(entry + took for entry, took in filter(None, costs))


def worth_moving(
    asked: Asked, offers: Sequence[Offer], old: Sequence[Hop], new: Sequence[Hop], positions: int
) -> bool:
    """Whether a session that holds so many positions, between two answers, should leave `old` for `new`,
    whose hops from the first new one on compute all of them again; never for a hop that was not measured.
    Also where `old` is not offered any more."""
    before, after = predicted_ms(asked, offers, old), predicted_ms(asked, offers, new)
    if before is None or after is None:
        return before is None
    measured = [offer for offer in offers if offer.step_ms is not None]
    changed = [hop for hop in new if hop not in old]
    if not changed or any(_cheapest(asked, measured, hop) is None for hop in changed):
        return False
    saved = before - after
    prompts = [replace(o, step_ms=o.step_ms if o.prefill_ms is None else o.prefill_ms) for o in offers]
    costs = [_cheapest(asked, prompts, hop) for hop in new[new.index(changed[0]) :]]
    again = positions * sum(took for _, took in filter(None, costs))
    return saved > MOVE_MS and saved > MOVE_SHARE * before and saved * MOVE_TOKENS > again


def _cheapest(asked: Asked, offers: Sequence[Offer], hop: Hop) -> tuple[float, float] | None:
    """What a hop costs before its blocks, and for them."""
    units = hop.span.units()
    pieces = _pieces(asked, offers, range(asked.n_blocks + 2), roomy=False)
    fitting = [p for p in pieces if p.peer == hop.peer and set(units) <= set(p.units)]
    return min(((p.entry_ms, p.rate * asked.weight(units)) for p in fitting), key=sum, default=None)


class Placed(Protocol):
    """Whatever is on a peer."""

    @property
    def peer(self) -> str:
        """Its id."""


def edges(route: Sequence[Placed], live: Mapping[str, Collection[str]], me: str) -> tuple[Edge, ...]:
    """How each hop reaches the next: `live` says, for each peer, which peers it has a connection with."""
    links = Links(me, live=live)
    return tuple(Edge(relayed=not links.direct(a.peer, b.peer)) for a, b in itertools.pairwise(route))


# --- the search


@dataclass(frozen=True, slots=True, order=True)
class _Piece:
    """The contiguous part of an offer that may be used."""

    units: tuple[int, ...]
    peer: str
    rate: float  #: ms for a token and a weight of 1
    entry_ms: float  #: for each hop, whatever its blocks


def _pieces(asked: Asked, offers: Sequence[Offer], wanted: range, *, roomy: bool = True) -> list[_Piece]:
    """The offers cut to the wanted units, with figures for all; sorted. With `roomy`, offers without room for
    the session are cut to what no other has."""
    with_room = {unit for offer in offers if _has_room(offer, asked) for unit in offer.span.units()}
    pieces = set()
    for offer in offers:
        rate, weight = _rate(asked, offer, offers), asked.weight(offer.span.units())
        units = set(offer.span.units()) & set(wanted)
        if roomy and not _has_room(offer, asked):
            units -= with_room
        for span in spans_of_units(units, asked.n_blocks):
            entry = HOP_MS + BESIDE * offer.queue * rate * weight
            pieces.add(_Piece(tuple(span.units()), offer.peer, rate, entry))
    return sorted(pieces)


def _rate(asked: Asked, offer: Offer, offers: Sequence[Offer]) -> float:
    """ms for a token and a weight of 1, as measured or supposed."""
    if offer.step_ms is not None:
        return offer.step_ms / asked.weight(offer.span.units())
    units = set(offer.span.units())
    rates = [(o.step_ms / asked.weight(o.span.units()), o) for o in offers if o.step_ms is not None]
    alike = [rate for rate, other in rates if units & set(other.span.units())]
    supposed = min(alike) if alike else statistics.median([rate for rate, _ in rates] or [0.0])
    curious = asked.session and _draw("curious", asked.session, offer.peer) * CURIOUS < 1
    return supposed / CURIOUS_TIMES if curious else supposed


def _draw(*what: str) -> float:
    """A number above 0 and below 1 that is the same each time."""
    digest = blake2b("\0".join(what).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") + 0.5) / _DIGEST_MAX


def _has_room(offer: Offer, asked: Asked) -> bool:
    return offer.free_kv is None or offer.free_kv >= asked.positions


@dataclass(frozen=True, slots=True, order=True)
class _Cost:
    ms: float
    hops: int

    def plus(self, ms: float, hops: int = 0) -> _Cost:
        """Rounded, so that equal routes cost the same in whatever order they are added up."""
        return _Cost(round(self.ms + ms, 6), self.hops + hops)


class _Search:
    """Backwards over the segments between the ends of pieces: nowhere else can changing peers win
    anything."""

    def __init__(self, asked: Asked, pieces: Sequence[_Piece], ends: tuple[str, str]) -> None:
        self._asked = asked
        self._pieces = pieces
        self._begin, self._end = ends
        cuts = sorted({cut for p in pieces for cut in (p.units[0], p.units[-1] + 1)})
        self._segments = [range(a, b) for a, b in itertools.pairwise(cuts)]
        self._here = [[p for p in pieces if units[0] in p.units] for units in self._segments]
        #: (segment, piece) -> from there to the end, with a hop of that piece begun already
        self._within: dict[tuple[int, _Piece], _Cost] = {}
        #: (segment, peer) -> from there to the end, with the result of what is before at that peer
        self._onward: dict[tuple[int, str], _Cost] = {}
        self._fill()

    def _fill(self) -> None:
        last = len(self._segments)
        for piece in self._pieces:
            self._onward[last, piece.peer] = _Cost(self._link(piece.peer, self._end), 0)
        for index in range(last - 1, -1, -1):
            for piece in self._here[index]:
                stop = self._onward[index + 1, piece.peer]
                go_on = self._within.get((index + 1, piece), stop)
                self._within[index, piece] = min(stop, go_on).plus(self._took(index, piece))
            senders = {piece.peer for piece in self._here[index - 1]} if index else {self._begin}
            for peer in senders:
                self._onward[index, peer] = min(cost for _, cost in self._choices(index, peer))

    def _choices(self, index: int, at: str) -> Iterator[tuple[_Piece, _Cost]]:
        """The pieces that a hop may begin in, and what is to come if it does."""
        for piece in self._here[index]:
            ms = self._link(at, piece.peer) + piece.entry_ms
            yield piece, self._within[index, piece].plus(ms, hops=1)

    def _took(self, index: int, piece: _Piece) -> float:
        return piece.rate * self._asked.weight(self._segments[index])

    def _link(self, a: str, b: str) -> float:
        return self._asked.links.one_way_ms(a, b)

    def route(self) -> tuple[Hop, ...]:
        """Of the routes that are as good as the best one, the session's."""
        best = self._onward[0, self._begin]
        left = _Cost(best.ms * (1 + TIE) + 1e-4, best.hops)  # what may still be spent; a bit for rounding
        index, at, hops = 0, self._begin, list[Hop]()
        while index < len(self._segments):
            cheapest: dict[str, tuple[_Cost, _Piece]] = {}
            for piece, cost in self._choices(index, at):
                if cost.ms <= left.ms and cost.hops <= left.hops:
                    cheapest[piece.peer] = min((cost, piece), cheapest.get(piece.peer, (cost, piece)))
            _, piece = max(cheapest.values(), key=lambda found: self._luck(found[1]))
            stop = self._hop_end(index, piece)
            took = sum(self._took(i, piece) for i in range(index, stop))
            left = left.plus(-self._link(at, piece.peer) - piece.entry_ms - took, hops=-1)
            units = range(self._segments[index][0], self._segments[stop - 1][-1] + 1)
            hops.append(Hop(piece.peer, span_of_units(units, self._asked.n_blocks)))
            index, at = stop, piece.peer
        return tuple(hops)

    def _hop_end(self, index: int, piece: _Piece) -> int:
        """The segment after the last one of a hop that begins in `piece` at `index`."""
        stop = index + 1
        while (go_on := self._within.get((stop, piece))) and go_on <= self._onward[stop, piece.peer]:
            stop += 1
        return stop

    def _luck(self, piece: _Piece) -> tuple[float, str]:
        """Weighted rendezvous: each peer's draw for this session, so that it wins as many sessions as its
        speed is of the sum of speeds, and one that comes or goes moves no session between the others."""
        return math.log(_draw(self._asked.session, piece.peer)) * max(piece.rate, 1e-9), piece.peer
