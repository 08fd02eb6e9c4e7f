"""The daemon as its operator sees it: the methods of the control API over engine, offers, hops and network.

Only gathers and words; decides nothing. Knows nothing of JSON-RPC.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import trio

from dgnd.control import api
from dgnd.control.checks import check_session
from dgnd.control.service import DeltaSink, WaitSink
from dgnd.errors import BadRequest, BlocksMissing, NotFound
from dgnd.hosting.server import HopServer
from dgnd.logs.ring import LogRing
from dgnd.memory.footprint import footprint
from dgnd.models.blocksmap import BlocksMap
from dgnd.models.local import LocalModel
from dgnd.origin.engine import Engine
from dgnd.p2p.network import PeerNetwork
from dgnd.peers.names import Names
from dgnd.peers.notes import away_notes, who_should_serve
from dgnd.peers.offers import OfferBook
from dgnd.probe.prober import Prober
from dgnd.service.cache_view import cache_entries
from dgnd.service.map_view import map_rows
from dgnd.service.model_view import model_info, worker_statuses
from dgnd.service.peer_view import peer_info, refusal
from dgnd.service.session_view import relay_notes, session_statuses
from dgnd.service.speed_view import node_figures
from dgnd.upkeep.chooser import Chooser
from dgnd.upkeep.drain import Drain
from dgnd.upkeep.ledger import Ledger
from dgnd.upkeep.pausing import MOST_PAUSE_S, Pausing
from dgnd.upkeep.reload import Reloader
from dgnd.upkeep.standing import Standing


@dataclass(slots=True)
class NodeService:
    """Implements `dgnd.control.service.ControlService`."""

    version: str
    names: Names
    models: Mapping[str, LocalModel]
    blocks: BlocksMap
    offers: OfferBook
    engine: Engine
    hops: HopServer
    network: PeerNetwork
    drainer: Drain
    pausing: Pausing
    reloader: Reloader
    chooser: Chooser
    standing: Standing
    ledger: Ledger
    stop: Callable[[], None]
    prober: Prober = field(default_factory=Prober)
    log_ring: LogRing = field(default_factory=LogRing)

    @property
    def me(self) -> str:
        """This node's peer id."""
        return self.names.me

    # --- the node

    def state(self) -> api.NodeState:
        """One word for how the node is."""
        return self.standing.state()

    async def status(self) -> api.Status:
        """The node, its workers, sessions, and what is missing."""
        return api.Status(
            version=self.version,
            pid=os.getpid(),
            peer_id=self.me,
            name=self.names.my_name,
            state=self.state(),
            why=self.standing.why(),
            workers=[status for model in self.models.values() for status in worker_statuses(model)],
            missing=self._missing(),
            sessions=list(session_statuses(self.names, self.engine, self.hops)),
            notes=[
                *self.reloader.notes(),
                *self.chooser.notes(),
                *(
                    f"{','.join(filling.worker.request.spans)} of {name}: loaded for answers that lost it"
                    for name, model in self.models.items()
                    for filling in model.fillings
                ),
                *self.offers.problems(self.names.of),
                *away_notes(self.network.peers(), len(self.network.refusals()), self.offers.away_peers()),
                *relay_notes(self.names, self.engine),
                *(
                    f"model {name} can't answer prompts given here: {model.text_problem}"
                    for name, model in self.models.items()
                    if model.text_problem
                ),
            ],
            process=api.ProcessStatus(**dataclasses.asdict(footprint())),
            hops=len(self.hops.hops),
            journal_bytes=self.hops.journals.bytes,
            memory=self._memory(),
            speeds=list(node_figures(self.models, self.offers, self.names)),
        )

    def _memory(self) -> api.MemoryStatus:
        found = self.ledger.account()
        return api.MemoryStatus(
            budget=found.budget,
            by=found.by,
            used=found.used,
            free=found.free,
            weights=found.weights,
            weights_mapped=found.mapped,
            kv=found.kv,
            kv_limit=found.kv_limit,
            journals=found.journals,
            queues=found.queues,
            programs=found.programs,
        )

    def _missing(self) -> dict[str, str]:
        found = {name: self.offers.missing(model) for name, model in self.models.items()}
        return {name: units for name, units in found.items() if units}

    async def logs(self, params: api.LogsParams) -> api.LogPage:
        """Of the last lines that were logged, those asked for."""
        return self.log_ring.page(params)

    async def drain(self, params: api.DrainParams) -> api.Drained:
        """Has this node's sessions handed over, or serves again."""
        if params.undo:
            self.drainer.undo()
            return api.Drained(state=self.state(), left=0, ended=0)
        self.drainer.begin()
        found = await self.drainer.finished()
        return api.Drained(state=self.state(), left=found.left, ended=found.ended)

    async def pause(self, params: api.PauseParams) -> api.Paused:
        """Computes nothing until the time is over, or `resume`."""
        if params.seconds is not None and not 0 < params.seconds <= MOST_PAUSE_S:
            raise BadRequest(f"a pause lasts up to {MOST_PAUSE_S / 86400:.0f} days, or without end")
        found = await self.pausing.pause(params.seconds)
        return api.Paused(
            state=self.state(),
            why=self.standing.why(),
            left=found.left,
            closed=found.closed,
            idle=found.idle,
        )

    async def resume(self) -> api.Resumed:
        """Ends a pause."""
        was = self.pausing.resume()
        return api.Resumed(state=self.state(), was_paused=was)

    async def reload(self) -> api.Reloaded:
        """Takes the configuration as it is now in its file."""
        return await self.reloader.reload()

    async def shutdown(self) -> api.Done:
        """Begins to stop the daemon."""
        self.stop()
        return api.Done()

    # --- models and the map

    async def models_list(self) -> list[api.ModelInfo]:
        """The configured models."""
        return [
            model_info(model, self.offers.missing(model), self.offers.manifests.whole_digest(name))
            for name, model in self.models.items()
        ]

    async def backends_list(self) -> list[api.BackendInfo]:
        """The installed backends, each looked at in a child of its own."""
        return await self.prober.look()

    async def map_show(self) -> api.MapView:
        """The BlocksMap, configured and live: one row for each model and node that either names."""
        rows = [
            row
            for model in self.models.values()
            for row in map_rows(model, self.blocks, self.offers, self.names)
        ]
        return api.MapView(rows=rows, missing=self._missing())

    # --- peers

    async def peers_list(self) -> api.PeerList:
        """Peers and the last refusals."""
        return api.PeerList(
            peers=[peer_info(peer, self.offers, self.names) for peer in self.network.peers()],
            refused=[refusal(item) for item in self.network.refusals()],
            self_addrs=self.network.listen_addrs(),
        )

    async def peers_connect(self, params: api.ConnectParams) -> api.PeerInfo:
        """Dials a multiaddress and lets that peer be used and served until the daemon ends."""
        before = {peer.id for peer in self.network.peers() if peer.state == "connected"}
        peer_id = await self.network.connect(params.addr)
        for peer in self.network.peers():
            if peer.id == peer_id:
                detail = "it was connected already; this address was not tried" if peer_id in before else ""
                return msgspec.structs.replace(
                    peer_info(peer, self.offers, self.names), detail=detail or peer.detail
                )
        raise NotFound(f"{peer_id} was connected and is gone again; see: dgnctl peers")

    async def peers_disconnect(self, params: api.PeerParams) -> api.Done:
        """Closes the connection to a peer and does not dial it again."""
        by_name = {self.names.of(peer.id): peer.id for peer in self.network.peers()}
        peer_id = by_name.get(params.peer, params.peer)
        if peer_id not in by_name.values():
            raise NotFound(f"there is no peer {params.peer!r}; see: dgnctl peers")
        await self.network.disconnect(peer_id)
        return api.Done()

    # --- generation and sessions

    async def generate(
        self,
        params: api.GenerateParams,
        on_delta: DeltaSink,
        cancelled: trio.Event,
        on_wait: WaitSink | None = None,
    ) -> api.GenerateResult:
        """One answer."""
        try:
            return await self.engine.generate(params, on_delta, cancelled, on_wait)
        except BlocksMissing as error:
            model = self.engine.model(params.model)
            missing = self._missing().get(model.name)
            if not missing:  # they have come meanwhile
                raise
            plans, peers = self.offers.plans(model), self.network.peers()
            away = self.offers.away_peers()
            who = who_should_serve(missing, model.name, self.blocks, self.names, peers, plans, away)
            if self.pausing.paused and model.spans:
                who = f"this node is {self.pausing.why} (dgnctl resume), {who}"
            raise BlocksMissing(f"{error.message}; now {who}", **error.data) from error

    async def tokenize(self, params: api.TokenizeParams) -> api.TokenizeResult:
        """Text to token ids."""
        model = self.engine.model(params.model)

        def work() -> api.TokenizeResult:
            text = model.text
            if params.raw:
                ids = text.encode_raw(params.text)
            else:
                ids = text.encode_chat([api.ChatMessage(role="user", content=params.text)])
            return api.TokenizeResult(token_ids=ids, tokens=[text.token_text(i) for i in ids])

        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    async def session_export(self, params: api.SessionParams) -> api.SessionTokens:
        """The token ids of a session."""
        return self.engine.export(params.session)

    async def session_import(self, params: api.SessionImportParams) -> api.Done:
        """Gives a session its token ids."""
        check_session(params.session)
        self.engine.import_(params)
        return api.Done()

    async def cache_list(self) -> list[api.CacheEntry]:
        """Sessions with KV on this node, own ones first."""
        return list(cache_entries(self.me, self.engine.conversations, self.hops, self.models))

    async def cache_clear(self, params: api.CacheClearParams) -> api.CacheClearResult:
        """Forgets one session, or all of this node's own that are idle."""
        cleared = self.engine.clear(params.session)
        busy = sum(item.busy for item in self.engine.conversations) if params.session is None else 0
        return api.CacheClearResult(cleared=cleared, busy=busy)
