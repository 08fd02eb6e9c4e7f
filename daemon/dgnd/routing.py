"""From what nodes offer to a route: the hops, in order, that cover embed, every block and head exactly once.

Pure: values in, values out. Knows nothing of connections beyond who says to be connected with whom.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dgn_backends.span import Span, format_units, span_of_units
from dgnd.errors import BlocksMissing


@dataclass(frozen=True, slots=True)
class Offer:
    """A span that `peer` computes for us now."""

    peer: str
    span: Span


@dataclass(frozen=True, slots=True)
class Hop:
    """A contiguous part of the model computed by `peer`."""

    peer: str
    span: Span


@dataclass(frozen=True, slots=True)
class Edge:
    """From hop k to hop k+1: direct, or relayed by the origin because the two ends don't know each other."""

    relayed: bool


def missing_units(offers: Sequence[Offer], n_blocks: int) -> frozenset[int]:
    """The units of a model that nobody offers."""
    covered = {unit for offer in offers for unit in offer.span.units()}
    return frozenset(range(n_blocks + 2)) - covered


def find_route(model: str, offers: Sequence[Offer], n_blocks: int, me: str) -> tuple[Hop, ...]:
    """The route with the fewest hops; between equals this node comes first, then the smaller peer id.

    Taking, at each unit not yet covered, the offer that reaches furthest gives the fewest hops (interval
    covering). Raises BlocksMissing, naming what nobody serves.
    """
    missing = missing_units(offers, n_blocks)
    if missing:
        text = format_units(missing, n_blocks)
        raise BlocksMissing(f"nobody reachable serves {text} of model {model}", missing=text, model=model)
    hops: list[Hop] = []
    unit = 0
    while unit <= n_blocks + 1:
        here = [offer for offer in offers if unit in offer.span.units()]
        best = min(here, key=lambda offer: (-offer.span.units()[-1], offer.peer != me, offer.peer))
        last = best.span.units()[-1]
        hops.append(Hop(best.peer, span_of_units(range(unit, last + 1), n_blocks)))
        unit = last + 1
    return tuple(hops)


def edges(route: Sequence[Hop], live: Mapping[str, Collection[str]], me: str) -> tuple[Edge, ...]:
    """How each hop reaches the next: `live` says, for each peer, which peers it has a connection with.

    Both ends must say so. An edge at this node, and one between two hops of one peer, is always direct.
    """
    return tuple(
        Edge(
            relayed=a.peer != b.peer
            and me not in (a.peer, b.peer)
            and not (b.peer in live.get(a.peer, ()) and a.peer in live.get(b.peer, ()))
        )
        for a, b in itertools.pairwise(route)
    )
