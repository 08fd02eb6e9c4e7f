"""Figures as shown: what routes are chosen by, of this node and of its peers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from dgnd.control import api
from dgnd.models.local import LocalModel
from dgnd.peers.names import Names
from dgnd.peers.offers import OfferBook
from dgnd.wire.messages import SpanOffer


def figures(offered: Iterable[SpanOffer]) -> list[api.Figures]:
    """Of each span."""
    return [
        api.Figures(
            span=item.span,
            step_ms=item.step_ms,
            prefill_ms=item.prefill_ms,
            queue=item.queue,
            free_kv=item.free_kv_positions,
        )
        for item in offered
    ]


def node_figures(
    models: Mapping[str, LocalModel], offers: OfferBook, names: Names
) -> Iterator[api.NodeFigures]:
    """Of everybody whose offers can be used, by model."""
    trips = offers.round_trips()
    for model in models.values():
        for peer in dict.fromkeys(offer.peer for offer in offers.offers(model)):
            trip = trips.get(peer)
            yield api.NodeFigures(
                model=model.name,
                peer=peer,
                name=names.of(peer),
                trip_ms=None if trip is None else round(trip, 3),
                figures=figures(offers.said(peer, model.name)),
            )


def trips_of(peer: str, offers: OfferBook, names: Names) -> dict[str, float]:
    """The round trips that a peer measured, in ms, to others that are connected here."""
    said = offers.links().said.get(peer, {})
    return {names.of(other): said[other] for other in [offers.me, *offers.heard] if other in said}
