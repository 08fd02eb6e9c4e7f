"""The configuration is read again while the node runs: checked as a whole first, then brought into force.

What is quick is done at once; workers and peers that go are given time to hand over, in the background.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field

import trio

from dgnd.background import Background
from dgnd.config.changes import Changes, changes
from dgnd.config.load import LoadedConfig, load_config
from dgnd.config.schema import Config
from dgnd.control import api
from dgnd.errors import ConfigError, NotReady
from dgnd.hosting.hop import Hop
from dgnd.hosting.server import HopServer
from dgnd.models.blocksmap import BlocksMap
from dgnd.models.local import LocalModel, read_model
from dgnd.origin.engine import Engine, EngineSettings
from dgnd.origin.handover import leave_peers
from dgnd.p2p.network import PeerNetwork
from dgnd.peers.names import Names
from dgnd.peers.offers import OfferBook
from dgnd.upkeep.drain import Drain
from dgnd.upkeep.ledger import Ledger
from dgnd.upkeep.plan import make_plan
from dgnd.upkeep.replacing import Replacing, Wanted
from dgnd.waiting import wait_while

log = logging.getLogger("dgnd.reload")


@dataclass(frozen=True, slots=True)
class Checked:
    """A configuration that can be brought into force, and what that changes."""

    loaded: LoadedConfig
    found: Changes
    models: dict[str, LocalModel]  #: those that are new
    blocks: BlocksMap


@dataclass(slots=True)
class ReloadHost:
    """The parts of the node that a configuration reaches."""

    models: dict[str, LocalModel]
    names: Names
    offers: OfferBook
    network: PeerNetwork
    engine: Engine
    hops: HopServer
    drain: Drain
    replacing: Replacing
    set_blocks: Callable[[BlocksMap], None]
    serve: Callable[[LocalModel], None]  #: has a new model's digests made, so that it can be used
    tell: Callable[[], None]
    background: Background
    ledger: Ledger


@dataclass(slots=True)
class Reloader:
    """One node's. `loaded` is what is in force. What a reload began goes on, whoever asked for it."""

    host: ReloadHost
    loaded: LoadedConfig
    problem: str = ""  #: what of the last reload could not be done
    _under_way: set[str] = field(default_factory=set)

    def notes(self) -> list[str]:
        """For `status`."""
        return [*(f"reload: {what}" for what in sorted(self._under_way)), *filter(None, [self.problem])]

    async def reload(self) -> api.Reloaded:
        """Reads the file again. Raises ConfigError with its place, ModelError or BackendUnavailable, and then
        nothing has changed; NotReady while the reload before is under way."""
        if self._under_way:
            raise NotReady(f"the reload before is still under way: {'; '.join(sorted(self._under_way))}")
        self._under_way.add("checking the configuration")
        try:
            checked = await trio.to_thread.run_sync(self._check)
        finally:
            self._under_way.clear()
        self.problem = ""
        return self._apply(checked)

    # --- before anything changes

    def _check(self) -> Checked:
        loaded = load_config(self.loaded.path)
        plans = make_plan(loaded)
        absent = [f"{plan.path / file}" for plan in plans for file in plan.absent]
        if absent:
            raise ConfigError(f"{loaded.path}: this node needs files that are not here: {', '.join(absent)}")
        for name, peer in loaded.config.peers.items():
            if peer.id == self.host.names.me:
                raise loaded.error_at(("peers", name, "id"), "this is this node's own id, not a peer's")
        found = changes(self.loaded.config, loaded.config)
        models = {
            name: read_model(name, found.config.models[name], found.config.node.state_dir / "manifests")
            for name in found.models_added
        }
        counts = {
            name: (models.get(name) or self.host.models[name]).config.n_blocks for name in found.config.models
        }
        blocks = BlocksMap.build(found.config, counts, loaded.error_at)
        return Checked(loaded, found, models, blocks)

    # --- into force

    def _apply(self, checked: Checked) -> api.Reloaded:
        old, found = self.loaded.config, checked.found
        self.loaded = LoadedConfig(found.config, checked.loaded.path, checked.loaded.text)
        self._set_numbers(found.config)
        gone = {old.peers[name].id for name in found.peers_removed}
        self._set_peers(old, found.config, gone)
        host = self.host
        for name, model in checked.models.items():
            host.models[name] = model
            host.serve(model)
        host.set_blocks(checked.blocks)  # of models that are new, too
        moved = []
        for name in found.config.models:
            model, section = host.models[name], found.config.models[name]
            chosen = name in checked.blocks.auto  # what it has stays until it chooses otherwise
            spans = None if chosen else checked.blocks.own_spans(name)
            anew = name in found.worker_keys and not (chosen and model.worker is None)
            if anew or (spans is not None and spans != model.spans):
                moved.append(name)
                wanted = Wanted(section, spans)
                self._begin(f"other blocks of {name}", self._replace, model, wanted)
            elif section != model.section:
                model.new_text(section)
        for name in found.models_removed:
            self._begin(f"giving up {name}", self._remove, host.models[name])
        host.tell()
        changed = list(_words(found, moved))
        log.info("reloaded %s: %s", self.loaded.path, "; ".join(changed) or "nothing changed")
        if found.restart:
            log.warning("after a restart only: %s", ", ".join(found.restart))
        return api.Reloaded(changed=changed, restart=list(found.restart))

    def _set_numbers(self, config: Config) -> None:
        host, sessions = self.host, config.sessions
        host.engine.settings = EngineSettings.of(sessions)
        host.hops.set_limits(sessions.max_sessions)
        host.ledger.configure(config.limits, sessions)
        host.engine.line.most, host.engine.line.wait_s = config.limits.waiting, config.limits.wait_s
        host.drain.drain_s = config.node.drain_s

    def _set_peers(self, old: Config, new: Config, gone: Collection[str]) -> None:
        host = self.host
        for name, peer in new.peers.items():
            if old.peers.get(name) != peer:
                host.offers.parting.discard(peer.id)
                host.network.allow(peer.id, name, peer.addrs)
        parting = {name: peer for name, peer in old.peers.items() if peer.id in gone}
        host.names.peers = {**parting, **new.peers}
        if gone:
            self._begin(f"parting from {', '.join(parting)}", self._part, gone)

    def _begin(self, what: str, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
        async def task() -> None:
            try:
                await work(*arguments)
            finally:
                self._under_way.discard(what)

        self._under_way.add(what)
        self.host.background.start(task)

    # --- what takes its time

    async def _replace(self, model: LocalModel, wanted: Wanted) -> None:
        why = await self.host.replacing.replace(model, wanted)
        if why:
            self.problem = f"{why}; what was loaded before stays"
            log.error("%s", self.problem)

    async def _remove(self, model: LocalModel) -> None:
        host = self.host
        await host.replacing.replace(model, Wanted(model.section, ()))
        conversations = host.engine.conversations
        await wait_while(
            lambda: any(item.busy for item in conversations if item.model is model), host.drain.drain_s
        )
        conversations.forget(model)
        del host.models[model.name]
        host.tell()

    async def _part(self, peers: Collection[str]) -> None:
        host = self.host
        host.offers.parting |= set(peers)
        for conversation in host.engine.conversations:
            leave_peers(conversation, host.engine.navigator, peers)

        def theirs() -> list[Hop]:
            return [hop for hop in host.hops.foreign() if hop.ticket.key.origin in peers]

        def ours() -> bool:
            routes = [item.driver.session.route for item in host.engine.conversations]
            return any(hop.peer in peers for route in routes for hop in route)

        host.hops.ask_to_leave(theirs(), "its node parts from this one")
        await wait_while(lambda: theirs() or ours(), host.drain.drain_s)
        for peer in peers:
            host.network.disallow(peer)
        host.offers.parting -= set(peers)
        host.names.peers = self.loaded.config.peers


def _words(found: Changes, moved: Collection[str]) -> Iterable[str]:
    yield from (f"new model {name}" for name in found.models_added)
    yield from (f"model {name} is given up" for name in found.models_removed)
    yield from (f"new peer {name}" for name in found.peers_added)
    yield from (f"peer {name} is let go" for name in found.peers_removed)
    yield from (f"{name} is loaded anew" for name in moved if name not in found.models_added)
    yield from found.settings
