"""The BlocksMap as shown: what the configuration says beside what nodes really offer now."""

from __future__ import annotations

from collections.abc import Iterator

from dgn_backends.span import format_spans
from dgnd.config.check import SELF
from dgnd.config.schema import AUTO
from dgnd.control import api
from dgnd.models.blocksmap import BlocksMap
from dgnd.models.local import LocalModel
from dgnd.peers.names import Names
from dgnd.peers.offers import OfferBook
from dgnd.service.speed_view import figures


def map_rows(model: LocalModel, blocks: BlocksMap, offers: OfferBook, names: Names) -> Iterator[api.MapRow]:
    """One row for each node that the configuration or a live offer names for `model`."""
    written = {
        names.id_of(node): format_spans(blocks.spans(model.name, node))
        for node in (SELF, *blocks.peers_of(model.name))
    }
    whys = dict.fromkeys(offers.choosers(model), "chosen by the node itself")
    if model.auto:
        written[names.me], whys[names.me] = AUTO, model.why
    offered = {names.me: format_spans(model.loaded_spans())}
    for peer, hello in offers.heard.items():
        for offer in hello.offers:
            if offer.model == model.name:
                offered[peer] = ",".join(span.span for span in offer.spans)
    for node in dict.fromkeys([*written, *offered]):
        span, live = written.get(node, ""), offered.get(node, "")
        if span or live:
            yield api.MapRow(
                model=model.name,
                peer=node,
                name=names.of(node),
                span=span,
                offered=live,
                state=_state(model, node, span, live, offers),
                why=whys.get(node, ""),
                figures=figures(offers.said(node, model.name)),
            )


def _state(model: LocalModel, node: str, span: str, live: str, offers: OfferBook) -> str:
    if node == offers.me:
        return "ready" if live else (model.worker.state if model.worker else "not loaded")
    if node not in offers.heard:
        return "not connected"
    if not live:
        return "connected, offers nothing"
    if not offers.manifests.usable(node, model.name):
        return "other weights" if offers.manifests.get(node, model.name) else "not verified yet"
    if offers.is_leaving(model, node):
        return "leaving"
    return "ready" if span in ("", live) else "differs from this map"
