"""Sessions with KV on this node, as shown: its own as origin, and hops of other origins' sessions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import trio

from dgn_backends.span import parse_spans
from dgnd.control import api
from dgnd.hosting.hop import Hop
from dgnd.hosting.server import HopServer
from dgnd.models.local import LocalModel
from dgnd.origin.conversation import ConversationBook
from dgnd.wire.messages import HopKey


def cache_entries(
    me: str, conversations: ConversationBook, hops: HopServer, models: Mapping[str, LocalModel]
) -> Iterator[api.CacheEntry]:
    """Own sessions first; then those of others, by their hops here."""
    now = trio.current_time()
    for item in conversations:
        session = item.driver.session
        mine = [hop for key, hop in hops.hops.items() if (key.origin, key.session) == (me, session.id)]
        yield api.CacheEntry(
            session=session.id,
            model=item.model.name,
            origin=me,
            role="origin",
            positions=session.sent,
            kv_bytes=sum(_kv_bytes(hop, item.model) for hop in mine),
            idle_s=0.0 if item.busy else now - item.last_used,
        )
    for key, hop in hops.hops.items():
        if key.origin != me:
            yield _of_other(key, hop, models[hop.ticket.model], now)


def _of_other(key: HopKey, hop: Hop, model: LocalModel, now: float) -> api.CacheEntry:
    return api.CacheEntry(
        session=key.session,
        model=model.name,
        origin=key.origin,
        role="hop",
        positions=hop.fence.length,
        kv_bytes=_kv_bytes(hop, model),
        idle_s=max(0.0, now - (hop.deadline - hop.ticket.lease_s)),
    )


def _kv_bytes(hop: Hop, model: LocalModel) -> int:
    """Bytes that the hop's positions take in this node's worker: its share of the loaded span's."""
    for loaded in (*model.loaded(), *model.filled()):
        (span,) = parse_spans(loaded.span, model.config.n_blocks)
        if span.contains(hop.span) and span.stop > span.start:
            share = (hop.span.stop - hop.span.start) / (span.stop - span.start)
            return int(loaded.kv_bytes_per_position * share) * hop.fence.length
    return 0
