"""Nodes of one simulation: real `dgnd.node.Node`s over a simulated network and workers; killed, frozen,
started again."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import trio

from dgn_backends.manifest import Manifest, make_manifest
from dgn_backends.testing_models import make_tiny_llama
from dgnd.config.load import LoadedConfig
from dgnd.config.schema import AUTO, BlocksRow, Config, ModelSection, NodeConfig, PeerSection, SessionsConfig
from dgnd.control import api
from dgnd.identity import SEED_BYTES, Identity
from dgnd.node import SWEEP_S, Node, NodeIdentity
from dgnd.parts import NodeParts
from dgnd.sessions.session import RouteHop
from dgnd.text.assets import TextAssets

from .net import Death, Internet, SimNetwork
from .worker import SimWorker

N_BLOCKS, CONTEXT = 4, 512
EVERYTHING = f"embed,0-{N_BLOCKS - 1},head"
MODEL = "m"
#: A node or a worker that is killed comes back after so many seconds.
BACK_S = (0.5, 4.0)
_READY_S = 120.0


def tiny_model(directory: Path) -> Path:
    """The model of all simulations: f32, random."""
    return make_tiny_llama(
        directory, n_blocks=N_BLOCKS, hidden_size=16, intermediate_size=24, max_positions=CONTEXT, seed=3
    )


@cache
def manifest_of(model: Path) -> Manifest:
    """Made once: the files don't change."""
    return make_manifest(model)


@cache
def text_of(model: Path) -> TextAssets:
    """Read once, for all nodes."""
    return TextAssets.load(model, "auto", (2,))


def read_once(model: Path) -> None:
    """Reads what is read only once."""
    manifest_of(model)
    text_of(model)


class Log:
    """What happened, in order, as one digest; with `keep` also in words."""

    def __init__(self, keep: bool = False) -> None:
        self.lines: list[str] = []
        self._keep = keep
        self._digest = hashlib.blake2b(digest_size=16)
        self._names: dict[str, str] = {}

    def name(self, peer: str, name: str) -> None:
        """How a peer is called in the log."""
        self._names[peer] = name

    def note(self, *what: object) -> None:
        """One event."""
        line = f"{trio.current_time():.9f}"
        for part in what:
            raw = part if isinstance(part, bytes) else str(part).encode()
            short = raw if len(raw) < 120 else hashlib.blake2b(raw, digest_size=8).hexdigest().encode()
            line += (
                f" {self._names.get(str(part), short.hex() if isinstance(part, bytes) else short.decode())}"
            )
        self._digest.update(line.encode() + b"\n")
        if self._keep:
            self.lines.append(line)

    @property
    def digest(self) -> str:
        """Of all events so far."""
        return self._digest.hexdigest()


class SimSeal:
    """The seal of files that never change."""

    def __init__(self, path: Path, cache: Path) -> None:
        self._path = path

    async def make(self) -> Manifest:
        await trio.sleep(0.01)
        return manifest_of(self._path)

    def holds(self) -> bool:
        return True

    async def check(self) -> None:
        await trio.lowlevel.checkpoint()


@dataclass
class SimNode:
    """One node and its process, which comes and goes."""

    name: str
    identity: Identity
    config: LoadedConfig
    node: Node | None = None
    workers: list[SimWorker] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def me(self) -> str:
        """Its peer id."""
        return self.identity.peer_id

    @property
    def ready(self) -> bool:
        """Whether it serves all that it is configured for."""
        return self.node is not None and all(worker.ready for worker in self.workers)


class SimCluster:
    """See the module. `spans`: of each node, by name; "" for none. `apart`: pairs of nodes that don't know
    each other. `choosers`: nodes that choose their blocks themselves, with the bytes of weights that they
    may."""

    def __init__(
        self,
        model: Path,
        spans: Mapping[str, str],
        rng: random.Random,
        log: Log,
        nursery: trio.Nursery,
        apart: Sequence[frozenset[str]] = (),
        sessions: SessionsConfig | None = None,
        choosers: Mapping[str, int] | None = None,
    ) -> None:
        self.rng, self.log, self.nursery = rng, log, nursery
        self.net = Internet(rng, log.note, nursery)
        identities = {name: Identity(rng.randbytes(SEED_BYTES)) for name in spans}
        auto = {
            name: (BlocksRow(model=MODEL, peer="self", span=AUTO, max_bytes=most),)
            for name, most in (choosers or {}).items()
        }
        self.nodes = {}
        for name, identity in identities.items():
            log.name(identity.peer_id, name)
            peers = [other for other in spans if other != name and frozenset((name, other)) not in apart]
            known = [other for other in spans if other == name or other in peers]
            config = Config(
                node=NodeConfig(name=name, state_dir=Path("/nowhere"), listen=()),
                sessions=sessions or SessionsConfig(),
                models={MODEL: ModelSection(path=model, backend="reference", kv_bytes=1 << 26)},
                peers={other: PeerSection(id=identities[other].peer_id) for other in peers},
                blocks=tuple(
                    BlocksRow(model=MODEL, peer="self" if other == name else other, span=spans[other])
                    for other in known
                    if spans[other]
                )
                + auto.get(name, ()),
            )
            self.nodes[name] = SimNode(name, identity, LoadedConfig(config, Path("/nowhere/dgn.toml")))
        self._model = model

    # --- life

    def start(self, name: str) -> None:
        """Starts the node's process."""
        this = self.nodes[name]
        this.workers, this.scope = [], trio.CancelScope()
        self.log.note("start", name)

        def network(identity: Identity, settings: object, handlers: Any) -> SimNetwork:
            return SimNetwork(self.net, identity.peer_id, handlers)

        def worker(request: Any, handlers: Any, seal: object) -> SimWorker:
            this.workers.append(SimWorker(request, handlers, self.rng, self.log.note))
            return this.workers[-1]

        parts = NodeParts(
            network=cast(Any, network), worker=cast(Any, worker), seal=cast(Any, SimSeal), keeps_ledger=False
        )
        node = this.node = Node(this.config, NodeIdentity(this.identity, name, "0"), parts)
        node.models[MODEL]._text = text_of(self._model)
        self.nursery.start_soon(self._live, node, this.scope)

    async def _live(self, node: Node, scope: trio.CancelScope) -> None:
        with scope:
            await node.run()

    def kill(self, name: str, death: Death, back_s: float | None = None) -> None:
        """kill -9 of dgnd, whose workers end with it; it is started again after `back_s`."""
        this = self.nodes[name]
        assert this.node is not None
        self.log.note("kill", name, death)
        self.net.kill(this.me, death)
        this.scope.cancel()
        this.node = None
        self._later(back_s, lambda: self.start(name))

    def kill_worker(self, name: str) -> None:
        """kill -9 of its worker, which dgnd starts again."""
        self.log.note("kill worker", name)
        for worker in self.nodes[name].workers:
            worker.kill()

    def freeze(self, name: str, what: str, for_s: float) -> None:
        """SIGSTOP of "node" or "worker", and SIGCONT."""
        this = self.nodes[name]
        self.log.note("freeze", name, what, for_s)
        before = this.node

        def turn(frozen: bool) -> None:
            if this.node is before:
                for worker in this.workers:
                    worker.freeze(frozen)
                if what == "node":
                    self.net.freeze(this.me, frozen)

        turn(True)
        self._later(for_s, lambda: turn(False))

    def cut(self, a: str, b: str, for_s: float) -> None:
        """The link between two nodes is dead for a while."""
        self.log.note("cut", a, b, for_s)
        ids = self.nodes[a].me, self.nodes[b].me
        self.net.cut(*ids, True)
        self._later(for_s, lambda: self.net.cut(*ids, False))

    def node(self, name: str) -> Node:
        """A node that runs."""
        node = self.nodes[name].node
        assert node is not None
        return node

    def drain(self, name: str) -> None:
        """It is told to leave, and stays until it is killed."""
        self.log.note("drain", name)
        self.node(name).drain.begin()

    def _later(self, after_s: float | None, what: Callable[[], None]) -> None:
        async def wait() -> None:
            await trio.sleep(self.rng.uniform(*BACK_S) if after_s is None else after_s)
            what()

        self.nursery.start_soon(wait)

    async def all_ready(self) -> None:
        """Waits until everybody serves and knows everybody."""
        with trio.fail_after(_READY_S):
            while not all(self._complete(node) for node in self.nodes.values()):  # noqa: ASYNC110 - many causes
                await trio.sleep(0.1)

    def _complete(self, this: SimNode) -> bool:
        if this.node is None or not this.ready:
            return False
        model = this.node.models[MODEL]
        known = [node for node in self.nodes.values() if node.name in {this.name, *this.config.config.peers}]
        serving = {node.me for node in known if node.workers}
        offers = this.node.offers
        return model.manifest is not None and serving == {offer.peer for offer in offers.offers(model)}

    async def left_over(self) -> list[str]:
        """What nodes still hold when all sessions are forgotten; nothing, if all is well."""
        for this in self.nodes.values():
            if this.node is not None:
                this.node.engine.clear(None)
        await trio.sleep(2 * SWEEP_S)
        found = []
        for name, this in self.nodes.items():
            if this.node is not None:
                node = this.node
                held = {
                    "hops": len(node.hops.hops),
                    "journal bytes": node.hops.journals.bytes,
                    "hops in workers": sum(len(node.workshop.hops_of(worker)) for worker in this.workers),
                    "sequences and KV of workers": sum(worker.left_over for worker in this.workers),
                    "sessions": len(node.engine.conversations),
                }
                found += [f"{name} still has {count} {what}" for what, count in held.items() if count]
        return found

    # --- answers

    def route(self, origin: str) -> tuple[RouteHop, ...]:
        """Of the answer that is being given now."""
        node = self.nodes[origin].node
        assert node is not None
        busy = [item for item in node.engine.conversations if item.busy]
        return busy[0].driver.session.route if busy else ()

    def name_of(self, peer: str) -> str:
        """A node's name by its peer id."""
        return next(name for name, node in self.nodes.items() if node.me == peer)

    async def ask(
        self,
        origin: str,
        params: api.GenerateParams,
        on_tokens: Callable[[int], None] = lambda _: None,
        cancelled: trio.Event | None = None,
    ) -> api.GenerateResult:
        """One answer; `on_tokens` is told how many have come. Raises what the engine raises."""
        node = self.nodes[origin].node
        assert node is not None
        came = 0

        async def delta(_: str, ids: list[int], _told: list[api.TokenLogprobs]) -> None:
            nonlocal came
            await trio.lowlevel.checkpoint()
            came += len(ids)
            if ids:
                on_tokens(came)

        return await node.engine.generate(params, delta, trio.Event() if cancelled is None else cancelled)
