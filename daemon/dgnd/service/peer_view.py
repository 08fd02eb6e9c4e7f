"""Peers, and strangers that were refused, as the operator sees them. Only words; decides nothing."""

from __future__ import annotations

from dgnd.control import api
from dgnd.p2p.settings import PeerState, RefusalRecord
from dgnd.peers.names import Names
from dgnd.peers.offers import OfferBook
from dgnd.service.speed_view import figures, trips_of


def peer_info(peer: PeerState, offers: OfferBook, names: Names) -> api.PeerInfo:
    """A peer, what it offers and how long the way to it is."""
    hello = offers.heard.get(peer.id)
    offered = [
        api.PeerOffer(
            model=offer.model,
            spans=",".join(span.span for span in offer.spans),
            numerics="; ".join(dict.fromkeys(span.numerics for span in offer.spans)),
            figures=figures(offers.said(peer.id, offer.model)),
        )
        for offer in (hello.offers if hello is not None else ())
        if offer.spans
    ]
    return api.PeerInfo(
        id=peer.id,
        name=names.of(peer.id),
        state=peer.state,
        addrs=list(peer.addrs),
        rtt_ms=peer.rtt_ms,
        offers=offered,
        detail=peer.detail,
        trips=trips_of(peer.id, offers, names),
    )


def refusal(item: RefusalRecord) -> api.Refusal:
    """A connection that was refused, with the lines that would let the peer in."""
    paste = f'[peers.NAME]\nid = "{item.id}"'
    return api.Refusal(id=item.id, addr=item.addr, when=item.when, reason=item.reason, paste=paste)
