"""The hops of a route that has lost some: those that are left stay, the gaps between them are filled from
what is offered. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from dgn_backends.span import format_units
from dgnd.errors import BlocksMissing
from dgnd.routing.search import Asked, Hop, Offer, find_part, missing_units
from dgnd.sessions.session import RouteHop


def mended_line(
    asked: Asked, alive: Sequence[RouteHop], offers: Sequence[Offer]
) -> tuple[Hop | RouteHop, ...]:
    """`alive`, in order, and between them the best new hops. Raises BlocksMissing."""
    held = [Offer(hop.peer, hop.span) for hop in alive]
    missing = missing_units([*held, *offers], asked.n_blocks)
    if missing:
        text = format_units(missing, asked.n_blocks)
        raise BlocksMissing(
            f"nobody reachable serves {text} of model {asked.model}", missing=text, model=asked.model
        )
    line: list[Hop | RouteHop] = []
    unit, before = 0, asked.links.me
    for hop in alive:
        first, last = hop.span.units()[0], hop.span.units()[-1]
        if unit < first:
            line += find_part(asked, offers, range(unit, first), ends=(before, hop.peer))
        line.append(hop)
        unit, before = last + 1, hop.peer
    if unit < asked.n_blocks + 2:
        line += find_part(asked, offers, range(unit, asked.n_blocks + 2), ends=(before, asked.links.me))
    return tuple(line)
