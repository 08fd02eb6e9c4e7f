"""The composition of a node: every object built once, the frames sent to whom they concern, the life of each
part.

Knows how parts are wired, not what they do.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import trio

from dgn_backends.span import Span
from dgnd.background import Background
from dgnd.config.amount import parse_amount
from dgnd.config.load import LoadedConfig
from dgnd.errors import ConfigError, ShuttingDown
from dgnd.exposition.watched import Watched
from dgnd.hosting.admission import HopHost
from dgnd.hosting.server import HopServer
from dgnd.identity import Identity
from dgnd.metrics.counts import Counts
from dgnd.metrics.departures import Departures
from dgnd.models.blocksmap import BlocksMap
from dgnd.models.local import LocalModel, make_manifest, read_model
from dgnd.origin.engine import Engine, EngineSettings
from dgnd.p2p.settings import NetworkHandlers, NetworkSettings
from dgnd.parts import NodeParts
from dgnd.peers.names import Names
from dgnd.peers.offers import OfferBook, conflict_text
from dgnd.peers.postoffice import PostOffice
from dgnd.routing.bookings import Bookings
from dgnd.routing.figures import LOOK_S, Saying
from dgnd.routing.suspects import Suspects
from dgnd.service.methods import NodeService
from dgnd.sessions.driver_host import DriverHost, hop_ids
from dgnd.sessions.market import Market
from dgnd.sessions.memory_line import MemoryLine
from dgnd.sessions.navigator import Navigator
from dgnd.upkeep.chooser import Chooser
from dgnd.upkeep.drain import Drain
from dgnd.upkeep.gapfill import GapFill
from dgnd.upkeep.ledger import Ledger
from dgnd.upkeep.pausing import Pausing
from dgnd.upkeep.plan import check_auto
from dgnd.upkeep.reload import Reloader, ReloadHost
from dgnd.upkeep.replacing import Replacing
from dgnd.upkeep.standing import Standing
from dgnd.upkeep.workshop import Workshop, WorkshopHandlers
from dgnd.wire.messages import (
    Alive,
    Cancel,
    CloseHop,
    Credit,
    EndTurn,
    Failure,
    Frame,
    Hello,
    History,
    HopKey,
    HopLength,
    HopOpened,
    Manifest,
    Offers,
    OpenHop,
    Probe,
    Replay,
    StepFrame,
    TokenFrame,
)
from dgnd.wire.ticket import TicketBook

log = logging.getLogger("dgnd")

SWEEP_S = 5.0
LAST_SEEN_FILE = "addresses.json"
PAUSE_FILE = "paused.json"
#: For the last words to clients and peers when the node stops.
FAREWELL_S = 0.3
REAL = NodeParts()


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    """Who this node is."""

    identity: Identity
    name: str
    version: str


class Node:
    """One running node. Built in the constructor, alive in `run`."""

    def __init__(self, loaded: LoadedConfig, who: NodeIdentity, parts: NodeParts = REAL) -> None:
        config = loaded.config
        self.me = who.identity.peer_id
        self.models = _read_models(loaded, parts)
        blocks = BlocksMap.build(
            config, {name: model.config.n_blocks for name, model in self.models.items()}, loaded.error_at
        )
        for name, row in blocks.auto.items():
            check_auto(loaded, row, name, self.models[name].path, self.models[name].config)
        self.counts = Counts()
        self.background = Background()
        quantised = config.node.state_dir / "quantised"
        self.workshop = Workshop(self.models, quantised, self._worker_news(), self.background, parts.worker)
        for name, model in self.models.items():
            model.spans = blocks.own_spans(name)
            if model.spans:
                model.worker = self.workshop.build(model, model.section, model.spans)
        self.offers = OfferBook(self.me, who.name, f"dgn/{who.version}", self.models, trio.current_time)
        self.names = Names(self.me, who.name, config.peers, self.offers.heard)
        self.network = parts.network(
            who.identity,
            NetworkSettings(
                listen=config.node.listen,
                name=who.name,
                software=f"dgn/{who.version}",
                last_seen=config.node.state_dir / LAST_SEEN_FILE,
            ),
            NetworkHandlers(
                hello=self.offers.hello, on_frame=self._on_frame, on_up=self._on_up, on_down=self._on_down
            ),
        )
        self.offers.round_trips = self.network.round_trips
        for name, peer in config.peers.items():
            if peer.id == self.me:
                raise loaded.error_at(("peers", name, "id"), "this is this node's own id, not a peer's")
            self.network.allow(peer.id, name, peer.addrs)
        self.office = PostOffice(
            self.me,
            self._send,
            self.network.send_now,
            self._on_frame,
            self.background,
            Departures(self.counts, self.network.trip_s),
        )
        self.hops = HopServer(
            self._hop_host(),
            TicketBook(self.me),
            config.sessions.max_sessions,
            config.sessions.journal_bytes,
        )
        self.ledger = Ledger(
            parse_amount(config.limits.memory),
            config.sessions.journal_bytes,
            self.models,
            self.workshop.running,
            self.hops.journals,
            self.office,
        )
        self._keeps_ledger = parts.keeps_ledger
        self.workshop.allowance = self.ledger.allowance
        for model in self.models.values():
            if model.worker is not None:
                model.worker.allowance = self.ledger.allowance
        self.suspects = Suspects(trio.current_time)
        self.stop_requested = trio.Event()
        host = DriverHost(
            identity=who.identity,
            post=self.office.post,
            peer_name=self.names.of,
            is_up=self._is_up,
            suspect=self.suspects.add,
            pass_over=self.suspects.pass_over,
            nudge=self.network.nudge,
            patience_s=self.network.patience_s,
            hop_ids=hop_ids(),
        )
        self.engine = Engine(
            models=self.models,
            navigator=Navigator(Market(self.offers, self.names, self.suspects, Bookings(trio.current_time))),
            host=host,
            settings=EngineSettings.of(config.sessions),
            counts=self.counts,
            line=MemoryLine(config.limits.waiting, config.limits.wait_s),
        )
        leaving = self.offers.leaving = self.hops.leaving
        self.drain = Drain(
            leaving, self.hops, self.engine, self._tell_offers, self.background, config.node.drain_s
        )
        replacing = Replacing(
            self.workshop, self.hops, leaving, self._tell_offers, self.drain, self.ledger.room_for_another
        )
        self.engine.filler = GapFill(
            self.offers,
            self.workshop,
            replacing,
            self.background,
            self._offers_changed,
            self.ledger.room_for_weights,
        )
        self.chooser = Chooser(self.models, self.offers, self.names, replacing, self.ledger.room_for_weights)
        self.chooser.set_rows(blocks)
        self.reloader = Reloader(
            ReloadHost(
                models=self.models,
                names=self.names,
                offers=self.offers,
                network=self.network,
                engine=self.engine,
                hops=self.hops,
                drain=self.drain,
                replacing=replacing,
                set_blocks=self._set_blocks,
                serve=self._serve,
                tell=self._tell_offers,
                background=self.background,
                ledger=self.ledger,
            ),
            loaded,
        )
        self.pausing = Pausing(
            models=self.models,
            hops=self.hops,
            offers=self.offers,
            workshop=self.workshop,
            replacing=replacing,
            tell=self._tell_offers,
            background=self.background,
            path=config.node.state_dir / PAUSE_FILE,
        )
        self.standing = Standing(
            self.models, self.offers, self.engine, self.hops, self.drain, self.chooser, self.pausing
        )
        self.service = NodeService(
            version=who.version,
            names=self.names,
            models=self.models,
            blocks=blocks,
            offers=self.offers,
            engine=self.engine,
            hops=self.hops,
            network=self.network,
            drainer=self.drain,
            pausing=self.pausing,
            reloader=self.reloader,
            chooser=self.chooser,
            standing=self.standing,
            ledger=self.ledger,
            stop=self.stop,
        )
        self.watched = Watched(
            version=who.version,
            counts=self.counts,
            names=self.names,
            models=self.models,
            engine=self.engine,
            hops=self.hops,
            network=self.network,
            office=self.office,
            ledger=self.ledger,
            standing=self.standing,
        )

    # --- wiring

    def _worker_news(self) -> WorkshopHandlers:
        return WorkshopHandlers(
            on_frame=lambda model, frame: self.hops.on_worker_frame(model, frame),
            on_ready=self._on_worker_ready,
            on_silent=self._on_worker_silent,
            on_down=self._on_worker_down,
            on_done=lambda model, before, now: self.counts.model(model).worked(before, now),
        )

    def _hop_host(self) -> HopHost:
        return HopHost(
            me=self.me,
            now=trio.current_time,
            post=self.office.post,
            is_up=self._is_up,
            is_allowed=lambda peer: peer == self.me or self.network.is_allowed(peer),
            refuses_model=self._refuses_model,
            loaded_spans=self._loaded_spans,
            to_worker=self.workshop.post,
            nudge=self.network.nudge,
            look_after=self.workshop.look_after,
            n_blocks=lambda name: self.models[name].config.n_blocks,
            context=lambda name: self.models[name].config.max_positions,
            counts=self.counts,
        )

    def _is_up(self, peer: str) -> bool:
        return peer == self.me or self.network.is_up(peer)

    def _loaded_spans(self, name: str) -> Iterable[Span]:
        model = self.models.get(name)
        return () if model is None else (*model.loaded_spans(), *model.filled_spans())

    def _set_blocks(self, blocks: BlocksMap) -> None:
        self.service.blocks = blocks
        self.chooser.set_rows(blocks)

    def _serve(self, model: LocalModel) -> None:
        self.background.start(make_manifest, model, self._manifest_done)

    def _refuses_model(
        self, name: str, origin: str, config_digest: str, manifest_digest: str | None
    ) -> str | None:
        model = self.models.get(name)
        if model is None or model.manifest is None:
            return f"model {name} is not served here" if model is None else f"{name} is being verified here"
        manifests = self.offers.manifests
        conflict = manifests.quarrel(origin, name)
        if conflict is not None:
            return conflict_text(name, conflict, self.names.of)
        whole = manifests.whole_digest(name)
        if config_digest != model.manifest.config_digest:
            return f"model {name} has another config.json at {self.names.of(origin)} than here"
        if manifest_digest is not None and whole is not None and manifest_digest != whole:
            return f"model {name} has other weights at {self.names.of(origin)} than here"
        return None

    # --- frames

    async def _send(self, peer: str, frame: Frame, bulk: bool) -> None:
        await self.network.send(peer, frame, bulk=bulk)

    def _on_frame(self, sender: str, frame: Frame) -> None:
        """A frame from a peer, or from this node to itself, to whom it concerns."""
        message = frame.message
        match message:
            case StepFrame(key=key) | CloseHop(key=key):
                here = key in self.hops.hops or key.origin != self.me
                (self.hops if here else self.engine).on_frame(sender, frame)
            case Offers():
                self.offers.peer_says(sender, message)
                self.engine.on_offers()
            case Manifest():
                self._on_manifest(sender, message)
            case OpenHop() | History() | Cancel() | EndTurn() | Replay() | Probe():
                self.hops.on_frame(sender, frame)
            case HopOpened() | Alive() | TokenFrame() | Credit() | HopLength():
                self.engine.on_frame(sender, frame)
            case Failure(key=None):
                log.warning("%s says: %s", self.names.of(sender), message.message)
            case Failure(key=key):
                mine = key is not None and key.origin == self.me
                (self.engine if mine else self.hops).on_frame(sender, frame)
            case _:
                log.warning("%s sent %s, which no peer may", self.names.of(sender), type(message).__name__)

    def _on_manifest(self, peer: str, message: Manifest) -> None:
        self.offers.peer_manifest(peer, message)
        conflict = self.offers.manifests.conflict(message.model, (self.me, peer))
        if conflict is not None:
            log.error("%s", conflict_text(message.model, conflict, self.names.of))
        self.engine.on_offers()

    def _on_up(self, peer: str, hello: Hello) -> None:
        self.counts.peer(peer).connections += 1
        self.suspects.clear(peer)
        self.offers.peer_up(peer, hello)
        for frame in self.offers.manifest_frames():
            self.office.post(peer, frame)
        self._offers_changed()

    def _on_down(self, peer: str, why: str) -> None:
        self.counts.peer(peer).losses += 1
        self.office.forget(peer)
        self.offers.peer_down(peer)
        self.hops.on_peer_down(peer)
        self.engine.on_peer_down(peer, why)
        self.network.announce()

    def _on_worker_ready(self) -> None:
        if self._keeps_ledger:
            self.ledger.share()
        self._offers_changed()

    def _on_worker_silent(self, model: str, why: str, keys: Collection[HopKey]) -> None:
        self.hops.on_worker_silent(model, why, keys)
        self.network.announce()

    def _on_worker_down(
        self, model: str, why: str, keys: Collection[HopKey], running: Collection[HopKey]
    ) -> None:
        self.counts.model(model).worker_ends += 1
        self.hops.on_worker_down(model, why, keys, running)
        self.network.announce()

    def _offers_changed(self) -> None:
        """More is offered than before, here or elsewhere."""
        self.network.announce()
        self.engine.on_offers()

    def _tell_offers(self) -> None:
        """As `announce`, and on the way of all other frames: those that follow are read in its light."""
        hello = self.offers.hello()
        for peer in list(self.offers.heard):
            self.office.post(peer, Frame(hello.update))
        self._offers_changed()

    def _manifest_done(self) -> None:
        for model in self.models.values():
            if model.manifest is not None:
                self.offers.manifests.put(self.me, model.name, model.manifest)
        for peer in list(self.offers.heard):
            for frame in self.offers.manifest_frames():
                self.office.post(peer, frame)
        self._offers_changed()

    # --- life

    def stop(self) -> None:
        """Begins to stop: sessions are handed over first. Called again, it waits for that no longer."""
        if self.stop_requested.is_set():
            self.drain.hurry()
        self.stop_requested.set()

    async def run(self, load_after_s: float = 0.0) -> None:
        """Runs until `stop`; then hands over, says goodbye, and everything it started is gone when it
        returns. `load_after_s`: how long it waits before it loads anything."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.background.run)
            await nursery.start(self.network.run)
            if load_after_s:
                with trio.move_on_after(load_after_s):
                    await self.stop_requested.wait()
            self.pausing.begin_as_before()
            for model in self.models.values():
                self._serve(model)
                if model.worker is not None:
                    self.workshop.start(model.worker)
            self.background.start(self._sweep)
            self.background.start(self.chooser.run)
            self.background.start(self._say_figures)
            if self._keeps_ledger:
                self.background.start(self.ledger.run)
            self.standing.started = True
            await self.stop_requested.wait()
            self.drain.begin()
            await self.drain.finished()
            await self._farewell()
            nursery.cancel_scope.cancel()

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_S)
            self.hops.sweep()
            self.workshop.keep(self.hops.hops)
            self.engine.sweep()

    async def _say_figures(self) -> None:
        saying = Saying()
        while True:
            await trio.sleep(LOOK_S)
            if saying.is_due(self.offers.hello(), trio.current_time()):
                self.network.announce()

    async def _farewell(self) -> None:
        self.engine.stopping = True
        for conversation in self.engine.conversations:
            conversation.driver.fail(ShuttingDown("the daemon is stopping"))
        self.hops.close_all("the node is stopping")
        await trio.sleep(FAREWELL_S)


def _read_models(loaded: LoadedConfig, parts: NodeParts) -> dict[str, LocalModel]:
    models = {}
    cache = loaded.config.node.state_dir / "manifests"
    for name, section in loaded.config.models.items():
        try:
            models[name] = read_model(name, section, cache, parts.seal)
        except ConfigError as error:
            raise loaded.error_at(("models", name, "path"), error.message) from None
    return models
