"""The search for routes whose answers are exact, and in words who keeps an answer from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dgn_backends.span import format_units
from dgnd.errors import Inexact
from dgnd.models.local import LocalModel
from dgnd.routing.exactness import Line, Way, difference, kinds, same_kind
from dgnd.routing.search import Hop, Offer, find_route, missing_units, predicted_ms
from dgnd.sessions.driver import SessionDriver
from dgnd.sessions.market import Market


def find_exact(market: Market, driver: SessionDriver, model: LocalModel) -> tuple[Hop, ...]:
    """The best route whose answer is exact. Raises what `Market.find` raises, and Inexact, which names who
    could serve what is missing, but not so."""
    market.find(driver, model, None)
    asked, offers = market.asked(driver, model), market.offered(driver, model, None)
    ways = {offer: market.offers.way(model, offer.peer, offer.span) for offer in offers}
    for sets in kinds(way for way in ways.values() if way is not None):
        routes = []
        for together in sets:
            usable = [offer for offer in offers if ways[offer] in together]
            if not missing_units(usable, model.config.n_blocks):
                route = find_route(asked, usable)
                routes.append((predicted_ms(asked, usable, route) or 0.0, route))
        if routes:
            return min(routes, key=lambda found: found[0])[1]
    raise Inexact(_no_exact_route(market, model, offers, ways))


def _no_exact_route(
    market: Market, model: LocalModel, offers: Sequence[Offer], ways: Mapping[Offer, Way | None]
) -> str:
    """Who would have to compute as this node does, or, where it does nothing, as most of the others."""

    def served(way: Way) -> set[int]:
        return {unit for o in offers for unit in o.span.units() if same_kind(ways[o], way)}

    mine = {ways[offer] for offer in offers if offer.peer == market.offers.me}
    known = sorted({way for way in ways.values() if way is not None}, key=repr)
    most = max(known, key=lambda way: (way in mine, len(served(way))), default=None)
    others = "nodes do not say how they compute"
    if most is not None:
        lacking = frozenset(range(model.config.n_blocks + 2)) - served(most)
        others = _others(market, model, lacking, dict.fromkeys(lacking, most))
    return (
        f"no exact route for model {model.name}: {others}; "
        "ask without --exact, or give all nodes the same quant and dtype"
    )


def inexact_only(market: Market, model: LocalModel, exactly: Line | None) -> str:
    """Who serves what nobody serves `exactly` so, and why that does not count; empty if nobody does."""
    return "" if exactly is None else _others(market, model, market.missing_units(model, exactly), exactly)


def _others(market: Market, model: LocalModel, lacking: Collection[int], wanted: Line) -> str:
    said = []
    for offer in market.usable(model, None):
        units = sorted(set(offer.span.units()) & set(lacking))
        way = market.offers.way(model, offer.peer, offer.span)
        should = wanted.get(units[0]) if units else None
        if way is not None and should is not None and way != should:
            blocks = format_units(units, model.config.n_blocks)
            said.append(f"{market.names.of(offer.peer)} has {blocks} with {difference(way, should)}")
    return "; ".join(dict.fromkeys(said))
