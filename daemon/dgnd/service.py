"""The daemon as its operator sees it: the methods of the control API over engine, offers, hops and network.

Only gathers and words; decides nothing. Knows nothing of JSON-RPC.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio

from dgn_backends.span import format_spans, parse_spans
from dgnd.blocksmap import BlocksMap
from dgnd.config.schema import PeerSection
from dgnd.control import api
from dgnd.engine import DeltaSink, Engine
from dgnd.errors import NotFound
from dgnd.hops import HopServer
from dgnd.models import LocalModel
from dgnd.offers import OfferBook
from dgnd.p2p.network import PeerNetwork
from dgnd.p2p.settings import PeerState

SELF = "self"


@dataclass(slots=True)
class NodeService:
    """Implements `dgnd.control.service.ControlService`."""

    version: str
    name: str
    me: str
    models: Mapping[str, LocalModel]
    peers: Mapping[str, PeerSection]
    blocks: BlocksMap
    offers: OfferBook
    engine: Engine
    hops: HopServer
    network: PeerNetwork
    stop: Callable[[], None]
    started: bool = False

    # --- the node

    def state(self) -> api.NodeState:
        """One word for how the node is."""
        if self.engine.stopping:
            return "draining"
        if not self.started:
            return "starting"
        workers = [model.worker for model in self.models.values() if model.worker is not None]
        if any(worker.state in ("starting", "loading") for worker in workers):
            return "loading"
        if any(model.manifest is None and not model.problem for model in self.models.values()):
            return "loading"
        whole = all(not self.offers.missing(model) for model in self.models.values())
        return "ready" if whole and all(worker.ready for worker in workers) else "degraded"

    async def status(self) -> api.Status:
        """The node, its workers, sessions, and what is missing."""
        return api.Status(
            version=self.version,
            pid=os.getpid(),
            peer_id=self.me,
            name=self.name,
            state=self.state(),
            workers=[self._worker(model) for model in self.models.values() if model.worker is not None],
            missing=self._missing(),
            sessions=self._sessions(),
            notes=self.offers.problems(self.peer_name) + self._relay_notes(),
        )

    def _missing(self) -> dict[str, str]:
        found = {name: self.offers.missing(model) for name, model in self.models.items()}
        return {name: units for name, units in found.items() if units}

    def _worker(self, model: LocalModel) -> api.WorkerStatus:
        worker = model.worker
        assert worker is not None
        return api.WorkerStatus(
            model=model.name,
            spans=format_spans(model.spans),
            pid=worker.pid,
            state=worker.state,
            backend=worker.request.backend,
            weights_bytes=worker.weights_bytes,
            kv_bytes=worker.stats.kv_bytes,
            detail=worker.detail,
        )

    def _sessions(self) -> list[api.SessionStatus]:
        mine = [
            api.SessionStatus(
                id=item.driver.session.id,
                model=item.model.name,
                origin=self.me,
                position=len(item.driver.session.tokens),
                route_number=item.driver.session.route_number,
                route=self.engine.route_of(item.driver.session),
            )
            for item in self.engine.conversations
        ]
        for key, hop in self.hops.hops.items():
            if key.origin != self.me:
                here = api.RouteHop(peer=self.me, name=self.name, span=str(hop.span))
                mine.append(
                    api.SessionStatus(
                        id=key.session,
                        model=hop.ticket.model,
                        origin=key.origin,
                        position=hop.fence.length,
                        route_number=hop.ticket.route,
                        route=[here],
                    )
                )
        return mine

    def _relay_notes(self) -> list[str]:
        notes = []
        for item in self.engine.conversations:
            route = item.driver.session.route
            for hop, following in itertools.pairwise(route):
                if hop.relayed:
                    a, b = self.peer_name(hop.peer), self.peer_name(following.peer)
                    notes.append(
                        f"relayed: {a} and {b} don't know each other, so their edge goes through here"
                    )
        return list(dict.fromkeys(notes))

    def peer_name(self, peer: str) -> str:
        """What this node calls a peer: the name in its configuration, else what the peer says, else the
        id."""
        if peer == self.me:
            return self.name
        for name, section in self.peers.items():
            if section.id == peer:
                return name
        hello = self.offers.heard.get(peer)
        return hello.name if hello is not None and hello.name else peer

    async def shutdown(self) -> api.Done:
        """Begins to stop the daemon."""
        self.stop()
        return api.Done()

    # --- models and the map

    async def models_list(self) -> list[api.ModelInfo]:
        """The configured models."""
        return [
            api.ModelInfo(
                name=name,
                path=str(model.path),
                backend=model.section.backend if model.worker is None else model.worker.request.backend,
                device=model.section.device,
                dtype=model.section.dtype,
                n_blocks=model.config.n_blocks,
                context=model.config.max_positions,
                local=format_spans(model.loaded_spans()),
                missing=self.offers.missing(model),
                verified=self.offers.manifests.whole_digest(name) is not None,
                template=model.text.template_name,
            )
            for name, model in self.models.items()
        ]

    async def map_show(self) -> api.MapView:
        """The BlocksMap, configured and live: one row for each model and node that either names."""
        rows = []
        for name, model in self.models.items():
            offered: dict[str, str] = {self.me: format_spans(model.loaded_spans())}
            for peer, hello in self.offers.heard.items():
                for offer in hello.offers:
                    if offer.model == name and offer.spans:
                        offered[peer] = ",".join(span.span for span in offer.spans)
            written = {SELF: format_spans(self.blocks.own_spans(name))}
            written |= {
                peer: format_spans(self.blocks.spans(name, peer)) for peer in self.blocks.peers_of(name)
            }
            ids = {self.me: SELF} | {section.id: peer for peer, section in self.peers.items()}
            nodes = dict.fromkeys([self._node_id(node) for node in written] + list(offered))
            for node in nodes:
                span, live = written.get(ids.get(node, ""), ""), offered.get(node, "")
                if span or live:
                    rows.append(
                        api.MapRow(
                            model=name,
                            peer=node,
                            name=self.peer_name(node),
                            span=span,
                            offered=live,
                            state=self._row_state(model, node, span, live),
                        )
                    )
        return api.MapView(rows=rows, missing=self._missing())

    def _node_id(self, node: str) -> str:
        return self.me if node == SELF else self.peers[node].id

    def _row_state(self, model: LocalModel, node: str, span: str, live: str) -> str:
        if node == self.me:
            return "ready" if live else (model.worker.state if model.worker else "not loaded")
        if node not in self.offers.heard:
            return "not connected"
        if live and not self.offers.manifests.usable(node, model.name):
            return "other weights" if self.offers.manifests.get(node, model.name) else "not verified yet"
        if not live:
            return "connected, offers nothing"
        wanted = parse_spans(span, model.config.n_blocks) if span else ()
        return "ready" if format_spans(wanted) == live or not span else "differs from this map"

    # --- peers

    async def peers_list(self) -> api.PeerList:
        """Peers and the last refusals."""
        return api.PeerList(
            peers=[self._peer(peer) for peer in self.network.peers()],
            refused=[
                api.Refusal(
                    id=item.id, addr=item.addr, when=item.when, reason=item.reason, paste=_paste(item.id)
                )
                for item in self.network.refusals()
            ],
            self_addrs=self.network.listen_addrs(),
        )

    def _peer(self, peer: PeerState) -> api.PeerInfo:
        hello = self.offers.heard.get(peer.id)
        offers = [
            api.PeerOffer(
                model=offer.model,
                spans=",".join(span.span for span in offer.spans),
                numerics="; ".join(dict.fromkeys(span.numerics for span in offer.spans)),
            )
            for offer in (hello.offers if hello is not None else ())
            if offer.spans
        ]
        return api.PeerInfo(
            id=peer.id,
            name=self.peer_name(peer.id),
            state=peer.state,
            addrs=list(peer.addrs),
            rtt_ms=peer.rtt_ms,
            offers=offers,
            detail=peer.detail,
        )

    async def peers_connect(self, params: api.ConnectParams) -> api.PeerInfo:
        """Dials a multiaddress and lets that peer be used and served until the daemon ends."""
        peer_id = await self.network.connect(params.addr)
        for peer in self.network.peers():
            if peer.id == peer_id:
                return self._peer(peer)
        raise NotFound(f"{peer_id} was connected and is gone again")

    async def peers_disconnect(self, params: api.PeerParams) -> api.Done:
        """Closes the connection to a peer and does not dial it again."""
        section = self.peers.get(params.peer)
        peer_id = section.id if section is not None else params.peer
        known = {peer.id for peer in self.network.peers()}
        by_name = {self.peer_name(peer): peer for peer in known}
        peer_id = by_name.get(params.peer, peer_id)
        if peer_id not in known:
            raise NotFound(f"there is no peer {params.peer!r}; see: dgnctl peers")
        await self.network.disconnect(peer_id)
        return api.Done()

    # --- generation and sessions

    async def generate(
        self, params: api.GenerateParams, on_delta: DeltaSink, cancelled: trio.Event
    ) -> api.GenerateResult:
        """One answer."""
        return await self.engine.generate(params, on_delta, cancelled)

    async def tokenize(self, params: api.TokenizeParams) -> api.TokenizeResult:
        """Text to token ids."""
        text = self.engine.model(params.model).text
        if params.raw:
            ids = text.encode_raw(params.text)
        else:
            ids = text.encode_chat([api.ChatMessage(role="user", content=params.text)])
        return api.TokenizeResult(token_ids=ids, tokens=[text.token_text(i) for i in ids])

    async def session_export(self, params: api.SessionParams) -> api.SessionTokens:
        """The token ids of a session."""
        return self.engine.export(params.session)

    async def session_import(self, params: api.SessionImportParams) -> api.Done:
        """Gives a session its token ids."""
        self.engine.import_(params)
        return api.Done()

    async def cache_list(self) -> list[api.CacheEntry]:
        """Sessions with KV on this node, own ones first."""
        now = trio.current_time()
        entries = [
            api.CacheEntry(
                session=item.driver.session.id,
                model=item.model.name,
                origin=self.me,
                role="origin",
                positions=item.driver.session.sent,
                kv_bytes=self._kv_bytes(item.model, item.driver.session.id),
                idle_s=0.0 if item.busy else now - item.last_used,
            )
            for item in self.engine.conversations
        ]
        for key, hop in self.hops.hops.items():
            if key.origin != self.me:
                model = self.models[hop.ticket.model]
                entries.append(
                    api.CacheEntry(
                        session=key.session,
                        model=model.name,
                        origin=key.origin,
                        role="hop",
                        positions=hop.fence.length,
                        kv_bytes=self._hop_bytes(model, key.session, key.origin),
                        idle_s=max(0.0, now - (hop.deadline - hop.ticket.lease_s)),
                    )
                )
        return entries

    def _kv_bytes(self, model: LocalModel, session: str) -> int:
        return self._hop_bytes(model, session, self.me)

    def _hop_bytes(self, model: LocalModel, session: str, origin: str) -> int:
        """Bytes of KV that a session's positions take in this node's worker."""
        total = 0
        for key, hop in self.hops.hops.items():
            if (key.origin, key.session) == (origin, session):
                for loaded in model.loaded():
                    (span,) = parse_spans(loaded.span, model.config.n_blocks)
                    if span.contains(hop.span) and span.stop > span.start:
                        share = (hop.span.stop - hop.span.start) / (span.stop - span.start)
                        total += int(loaded.kv_bytes_per_position * share) * hop.fence.length
        return total

    async def cache_clear(self, params: api.CacheClearParams) -> api.CacheClearResult:
        """Forgets one session, or all of this node's own that are idle."""
        return api.CacheClearResult(cleared=self.engine.clear(params.session))


def _paste(peer_id: str) -> str:
    """The lines that would let a peer in."""
    return f'[peers.NAME]\nid = "{peer_id}"'
