"""Strangers and hostile listed peers against real daemons: no compute, no harm to others, bounded memory."""

from __future__ import annotations

import random
import secrets
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import trio
import trio.testing
from cluster import Cluster, Row, TestNode
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as StockNoise
from multiaddr import Multiaddr
from p2p_kit import Node, running, until
from tiny_llama import make_tiny_llama

from dgn_backends.tensor import Tensor
from dgnd.background import Background
from dgnd.control import api
from dgnd.control.client import ControlClient
from dgnd.errors import NotReady, PeerError, PeerGone
from dgnd.identity import Identity
from dgnd.p2p import negotiate
from dgnd.peers import postoffice
from dgnd.peers.postoffice import WAITING, PostOffice
from dgnd.wire import codec
from dgnd.wire.messages import (
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
    LoadSpans,
    Manifest,
    ModelOffer,
    Offers,
    OpenHop,
    OpenSequence,
    Replay,
    Sampling,
    SpanOffer,
    StepFrame,
    Ticket,
    TokenFrame,
)
from dgnd.wire.ticket import sign_ticket
from dgnd.worker.runner import SpanWorker

MAX_SESSIONS = 4
TOKENS = 100
CONTEXT = 1024
HIDDEN = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", max_positions=CONTEXT)


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """a and b share a model. Both list "mallory" and "friend", who are played by the tests; the last blocks
    of "three" are friend's."""
    with Cluster(tmp_path_factory.mktemp("hostile"), model) as cluster:
        for name in ("a", "b", "mallory", "friend"):
            cluster.add(name)
        rows = [Row("a", "embed,0-1"), Row("b", "2-3,head")]
        rows += [Row("a", "embed,0", "three"), Row("b", "1-2", "three"), Row("friend", "3,head", "three")]
        models = {name: {"path": str(model), "backend": "reference"} for name in ("m", "three")}
        limits = f"[sessions]\nmax_sessions = {MAX_SESSIONS}"
        cluster.configure("a", rows, ["b", "mallory", "friend"], models, limits)
        cluster.configure("b", rows, ["a", "mallory", "friend"], models, limits)
        cluster.start("a", "b", state="degraded")
        for name in ("a", "b"):
            node = cluster.nodes[name]
            node.wait_for(
                lambda node=node: call(node, "status").missing == {"three": "3,head"}, what="model m"
            )
        yield cluster


def call(node: TestNode, method: str) -> Any:
    with ControlClient(node.socket) as client:
        return client.call(method)


def answers(node: TestNode) -> bool:
    """Whether it does; not while connections queue up before its socket."""
    try:
        call(node, "status")
    except NotReady:
        return False
    return True


def answer(node: TestNode, tokens: int = TOKENS, model: str = "m") -> list[int]:
    with ControlClient(node.socket) as client:
        params = api.GenerateParams(prompt="once upon", raw=True, max_tokens=tokens, model=model)
        ids: list[int] = client.generate(params, lambda _: None).token_ids
        return ids


def sessions(node: TestNode) -> list[Any]:
    found: list[Any] = call(node, "status").sessions
    return found


def kv_bytes(node: TestNode) -> int:
    return sum(worker.kv_bytes for worker in call(node, "status").workers)


# --- strangers ----------------------------------------------------------------------------------------


def test_a_stranger_gets_no_compute_and_is_shown_with_the_line_to_paste(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    stranger = Node("stranger")

    async def main() -> None:
        async with running(stranger):
            with pytest.raises(PeerError, match="dgnctl connect"):
                await stranger.network.connect(a.address)
            with pytest.raises(PeerError):
                await stranger.network.send(a.peer_id, Frame(EndTurn(key=HopKey("o", "s", 1), branch=0)))
            assert stranger.ups == []
            assert stranger.frames == []

    trio.run(main)
    shown = a.ctl("peers", "--refused").stdout
    assert stranger.id in shown
    assert f'id = "{stranger.id}"' in shown
    assert all(peer.id != stranger.id for peer in call(a, "peers.list").peers)
    assert sessions(a) == []


def test_a_stock_host_of_a_stranger_does_not_even_get_a_stream(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    identity = Identity.generate()
    keys = create_new_key_pair(identity.seed)
    noise = StockNoise(keys, create_x25519_key_pair().private_key)
    refused: list[BaseException] = []

    async def main() -> None:
        host = new_host(keys, sec_opt={TProtocol(NOISE): noise})
        async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
            with trio.fail_after(60):
                try:
                    await host.connect(info_from_p2p_addr(Multiaddr(a.address)))
                    await host.new_stream(ID.from_base58(a.peer_id), [TProtocol(negotiate.CONTROL)])
                except Exception as error:  # noqa: BLE001 py-libp2p has many kinds for it
                    refused.append(error)

    trio.run(main)
    assert refused
    assert not isinstance(refused[0], trio.TooSlowError)
    assert identity.peer_id in [refusal.id for refusal in call(a, "peers.list").refused]
    assert sessions(a) == []


# --- a listed peer ------------------------------------------------------------------------------------


def played(cluster: Cluster, name: str) -> Node:
    """A node of the cluster that the test itself plays."""
    seed_file = cluster.nodes[name].directory / "state" / "identity.key"
    return Node(name, Identity.load_or_create(seed_file))


class Mallory:
    """A listed peer, connected to one daemon."""

    def __init__(self, cluster: Cluster, target: TestNode) -> None:
        self.node = played(cluster, "mallory")
        self.identity = self.node.identity
        self.target = target
        self.hop = time.time_ns()

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Mallory]:
        async with running(self.node):
            await self.node.network.connect(self.target.address)
            await until(lambda: self.manifests())
            yield self

    def manifests(self) -> list[Manifest]:
        return [f.message for _, f in self.node.frames if isinstance(f.message, Manifest)]

    def failures(self) -> list[Failure]:
        return [f.message for _, f in self.node.frames if isinstance(f.message, Failure)]

    def messages(self, kind: type[Any]) -> list[Any]:
        return [f.message for _, f in self.node.frames if isinstance(f.message, kind)]

    async def send(self, message: Any, payload: Tensor | None = None) -> None:
        await self.node.network.send(self.target.peer_id, Frame(message, payload))

    async def failure(self, message: Any, payload: Tensor | None = None) -> Failure:
        """The one failure that answers a message."""
        before = len(self.failures())
        await self.send(message, payload)
        await until(lambda: len(self.failures()) > before)
        return self.failures()[-1]

    def ticket(self, **fields: Any) -> Ticket:
        """A good one of its own; `fields` make it another."""
        self.hop += 1
        key = HopKey(
            fields.pop("origin", self.identity.peer_id),
            fields.pop("session", "mine"),
            fields.pop("hop", self.hop),
        )
        values: dict[str, Any] = {
            "key": key,
            "recipient": self.target.peer_id,
            "previous": self.identity.peer_id,
            "next": self.identity.peer_id,
            "next_hop": self.hop + 1,
            "model": "m",
            "config_digest": self.manifests()[0].config_digest,
            "manifest_digest": None,
            "span": "0-1" if self.target.name == "a" else "2-3",
            "route": 1,
            "branch": 0,
            "max_positions": CONTEXT,
            "max_chunk": 128,
            "nonce": secrets.token_bytes(16),
            "lease_s": 600.0,
        }
        return Ticket(**(values | fields))

    async def open(self, **fields: Any) -> HopKey:
        ticket = self.ticket(**fields)
        await self.send(sign_ticket(ticket, self.identity))
        await until(lambda: ticket.key in [opened.key for opened in self.messages(HopOpened)])
        return ticket.key


def hidden(count: int) -> Tensor:
    return Tensor.from_f32(np.ones((count, HIDDEN), "f4"), "f32")


def ids(*tokens: int) -> Tensor:
    return Tensor.from_numpy(np.asarray(tokens, "<i4"), "i32")


def a_step(key: HopKey, start: int = 0, count: int = 1, **fields: Any) -> StepFrame:
    values: dict[str, Any] = {"branch": 0, "route": 1, "digest_start": start, "digest_end": start + count}
    return StepFrame(key=key, start=start, count=count, **(values | fields))


def test_without_a_valid_ticket_there_is_no_hop_in_anothers_name(cluster: Cluster) -> None:
    a, b = cluster.nodes["a"], cluster.nodes["b"]
    mallory = Mallory(cluster, a)
    me = mallory.identity

    def signed_by_me(ticket: Ticket) -> OpenHop:
        raw = msgspec.msgpack.encode(ticket)
        return OpenHop(ticket=raw, signature=me.sign(b"dgn/1 ticket\0" + raw))

    async def main() -> None:
        async with mallory.connected():
            ticket = mallory.ticket
            mine = sign_ticket(ticket(), me)
            foreign = ticket(origin=b.peer_id)
            tampered = bytearray(sign_ticket(ticket(), me).ticket)
            tampered[len(tampered) // 2] ^= 1
            attempts = {
                "signed by the wrong key": (signed_by_me(foreign), "not signed by its origin"),
                "in the node's own name": (
                    signed_by_me(ticket(origin=a.peer_id)),
                    "not signed by its origin",
                ),
                "without signature": (OpenHop(ticket=mine.ticket, signature=bytes(64)), "not signed"),
                "tampered with": (OpenHop(ticket=bytes(tampered), signature=mine.signature), ""),
                "for another recipient": (sign_ticket(ticket(recipient=b.peer_id), me), "the ticket is for"),
                "a short nonce": (sign_ticket(ticket(nonce=b"1234"), me), "nonce"),
                "an endless lease": (sign_ticket(ticket(lease_s=1e9), me), "lease"),
                "to a stranger": (sign_ticket(ticket(next=Identity.generate().peer_id), me), "configuration"),
                "garbage": (OpenHop(ticket=secrets.token_bytes(300), signature=bytes(64)), ""),
                "an overlong name": (sign_ticket(ticket(session="s" * 9000), me), "9000"),
                "another model": (sign_ticket(ticket(model="x"), me), "not served"),
                "another config": (sign_ticket(ticket(config_digest="x"), me), "config.json"),
                "other weights": (sign_ticket(ticket(manifest_digest="x"), me), "other weights"),
                "foreign blocks": (sign_ticket(ticket(span="2-3,head"), me), "not loaded here"),
                "no span": (sign_ticket(ticket(span="\x1b[2J\nFAKE LINE"), me), "FAKE"),
                "beyond the context": (sign_ticket(ticket(max_positions=2**31 - 1), me), str(CONTEXT)),
            }
            for what, (message, words) in attempts.items():
                failure = await mallory.failure(message)
                assert failure.kind in ("ticket_refused", "not_ready", "limit"), what
                assert words in failure.message, what
                assert failure.message.isprintable(), what
            assert mallory.messages(HopOpened) == []
            # Its own one works, and once.
            mine = sign_ticket(ticket(), me)
            await mallory.send(mine)
            await until(lambda: mallory.messages(HopOpened))
            key = mallory.messages(HopOpened)[0].key
            await mallory.send(CloseHop(key=key))
            assert "used before" in (await mallory.failure(mine)).message

    trio.run(main)
    assert "\x1b" not in a.log
    assert not any(line.startswith("FAKE") for line in a.log.splitlines())
    a.wait_for(lambda: sessions(a) == [], 10, "end of the session")


class Friend:
    """An honest hop for the blocks "3,head" of "three", played by the test: it knows the keys of sessions."""

    def __init__(self, cluster: Cluster, model: Path) -> None:
        self.node = played(cluster, "friend")
        self.node.on_frame = self._on_frame
        request = LoadSpans(
            model="three", path=str(model), spans=("3,head",), backend="reference", device="cpu", dtype="f32"
        )
        self.worker = SpanWorker(request, lambda done, total: None)
        self.keys: list[HopKey] = []
        self.manifest: Manifest | None = None
        self.answers, self._answers = trio.open_memory_channel[tuple[str, Frame]](1000)

    def _on_frame(self, peer: str, frame: Frame) -> None:
        message = frame.message
        if isinstance(message, Manifest) and message.model == "three":
            self.manifest = message
        elif isinstance(message, EndTurn):
            raise AssertionError("sessions without a name have no turns")
        elif isinstance(message, OpenHop):
            ticket = msgspec.msgpack.decode(message.ticket, type=Ticket)
            self.keys.append(ticket.key)
            self._work(
                Frame(OpenSequence(key=ticket.key, span=ticket.span, max_positions=ticket.max_positions)),
                ticket.route,
            )
        elif isinstance(message, StepFrame | CloseHop | Cancel):
            self._work(frame)

    def _work(self, frame: Frame, route: int = 0) -> None:
        for reply in self.worker.run([frame]):
            if isinstance(reply.message, HopOpened):
                reply = Frame(msgspec.structs.replace(reply.message, route=route))
            self.answers.send_nowait((reply.message.key.origin, reply))  # type: ignore[union-attr]

    async def offer(self, nodes: list[TestNode]) -> None:
        """Connects and offers its blocks, with the manifest that it was shown."""
        for node in nodes:
            await self.node.network.connect(node.address)
        await until(lambda: self.manifest is not None)
        assert self.manifest is not None
        (loaded,) = self.worker.loaded()
        span = SpanOffer(span=loaded.span, numerics=loaded.numerics, dtype=loaded.dtype)
        offer = ModelOffer(
            model="three",
            n_blocks=4,
            config_digest=self.manifest.config_digest,
            manifest_digest=None,
            spans=(span,),
        )
        peers = tuple(node.peer_id for node in nodes)
        for node in nodes:
            await self.node.network.send(node.peer_id, Frame(self.manifest))
            await self.node.network.send(node.peer_id, Frame(Offers(offers=(offer,), peers=peers)))

    async def run(self) -> None:
        async for peer, frame in self._answers:
            await self.node.network.send(peer, frame)


def test_anothers_live_session_can_not_be_touched(cluster: Cluster, model: Path) -> None:
    """Every kind of frame with the victim's own keys, at the origin and at its hops, sent by a listed peer
    while an answer is under way; the answer is what it is alone."""
    nodes = [cluster.nodes["a"], cluster.nodes["b"]]
    friend, mallory = Friend(cluster, model), Mallory(cluster, nodes[0])
    alone, attacked = [], []
    sent = 0

    async def attack() -> None:
        nonlocal sent
        last = friend.keys[-1]  # hop ids of one route follow each other
        keys = [msgspec.structs.replace(last, hop=last.hop - before) for before in range(3)]
        for round_ in range(20):
            for key in keys:
                branch = (0, 1, 2**62)[round_ % 3]
                frames: list[tuple[Any, Tensor | None]] = [
                    (Cancel(key=key, branch=branch), None),
                    (CloseHop(key=key, reason="not yours"), None),
                    (EndTurn(key=key, branch=branch), None),
                    (History(key=key, branch=branch, start=0, answer_start=0), ids(1, 2, 3)),
                    (a_step(key, branch=branch, truncate_to=0, sample=Sampling()), ids(7)),
                    (a_step(key, branch=branch, truncate_to=0), hidden(1)),
                    (TokenFrame(key=key, branch=0, route=1, position=20 + 3 * round_, token_id=9), None),
                    (Credit(key=key, branch=branch, route=1, stop=3), None),
                    (HopLength(key=key, branch=branch, length=0), None),
                    (HopOpened(key=key, credits=1000), None),
                    (Failure(kind="worker_died", message="no", key=key, branch=branch), None),
                ]
                for message, payload in frames:
                    for node in nodes:
                        await mallory.node.network.send(node.peer_id, Frame(message, payload))
                        sent += 1
            await trio.lowlevel.checkpoint()

    async def ask(into: list[list[int]]) -> None:
        into.append(await trio.to_thread.run_sync(answer, nodes[0], 400, "three"))

    async def main() -> None:
        async with running(friend.node), mallory.connected(), trio.open_nursery() as nursery:
            nursery.start_soon(friend.run)
            await mallory.node.network.connect(nodes[1].address)
            await friend.offer(nodes)
            await until(lambda: "three" not in call(nodes[0], "status").missing)
            await ask(alone)
            opened = len(friend.keys)
            async with trio.open_nursery() as asking:
                asking.start_soon(ask, attacked)
                await until(lambda: len(friend.keys) > opened and friend.worker.kv_bytes())
                await attack()
                assert attacked == [], "the answer was over before the attack was"
            await until(lambda: mallory.failures())
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert sent == 20 * 3 * 11 * 2
    assert len(alone[0]) == 400
    assert attacked == alone
    answers = [type(frame.message) for _, frame in mallory.node.frames]
    assert not {TokenFrame, HopLength, StepFrame, HopOpened, Credit} & set(answers)
    assert {failure.kind for failure in mallory.failures()} <= {"protocol", "ticket_refused", "stale_state"}


# --- limits -------------------------------------------------------------------------------------------


def test_a_listed_peer_gets_its_share_of_sessions_and_the_owner_keeps_theirs(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    alone = answer(a)
    mallory = Mallory(cluster, a)

    async def main() -> None:
        async with mallory.connected():
            keys = [await mallory.open(session=f"s{number}") for number in range(MAX_SESSIONS)]
            for number in range(3):
                failure = await mallory.failure(
                    sign_ticket(mallory.ticket(session=f"more{number}"), mallory.identity)
                )
                assert failure.kind == "no_room_now"
                assert f"{MAX_SESSIONS} sessions" in failure.message
                assert f"of {MAX_SESSIONS} at most" in failure.message
            for key in keys:
                await mallory.send(a_step(key, 0, 128), hidden(128))
            await until(lambda: len(mallory.messages(StepFrame)) == MAX_SESSIONS)
            await until(lambda: kv_bytes(a) > 0, 20)
            assert await trio.to_thread.run_sync(answer, a) == alone
            # A session that opens again and again has what one session has.
            for _ in range(20):
                await mallory.open(session="s0")
            assert len(sessions(a)) == MAX_SESSIONS

    trio.run(main)
    a.wait_for(lambda: sessions(a) == [] and kv_bytes(a) == 0, 20, "KV freed")
    assert answer(a) == alone


def test_what_a_listed_peer_computes_with_nonsense_is_its_own_failure(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    pids = a.worker_pids()
    mallory = Mallory(cluster, a)
    nan = Tensor.from_f32(np.full((2, HIDDEN), np.nan, "f4"), "f32")
    huge = Tensor.from_f32(np.full((2, HIDDEN), 3e38, "f4"), "f32")
    wide = Tensor.from_f32(np.ones((2, HIDDEN + 1), "f4"), "f32")

    async def main() -> None:
        async with mallory.connected():
            for payload, kinds in (
                (nan, {"non_finite"}),
                (wide, {"backend"}),
                (ids(1, 2), {"backend"}),
                (huge, {"non_finite", "step"}),
            ):
                key = await mallory.open(session="nonsense")
                before = len(mallory.failures())
                await mallory.send(a_step(key, 0, 2), payload)
                await until(
                    lambda before=before: len(mallory.failures()) > before or mallory.messages(StepFrame)
                )
                if "step" not in kinds:
                    assert mallory.failures()[-1].kind in kinds
            key = await mallory.open(session="words", span="embed,0")
            await mallory.send(a_step(key, 0, 2), ids(5, 2**31 - 1))
            await until(lambda: mallory.failures()[-1].key == key)
            assert mallory.failures()[-1].kind == "backend"

    trio.run(main)
    assert a.worker_pids() == pids
    assert len(answer(a)) == TOKENS


# --- garbage ------------------------------------------------------------------------------------------


def random_strings(seed: int, count: int) -> Iterator[bytes]:
    """Of all lengths; some begin as something real does."""
    rng = random.Random(seed)
    starts = [
        b"",
        b"",
        b"\x13/multistream/1.0.0\n",
        b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20",
        b"dgn\x01",
        b'{"jsonrpc":"2.0","id":1,"method":"',
        b'{"jsonrpc":"2.0","id":1,"method":"generate","params":',
        b"GET / HTTP/1.1\r\n",
        b"\x00\x00",
    ]
    for _ in range(count):
        length = rng.choice((1, 3, 20, 100, 700, 3000))
        yield rng.choice(starts) + rng.randbytes(rng.randrange(length)) + rng.choice((b"", b"\n"))


def pour(make: Callable[[], socket.socket], seed: int, count: int) -> int:
    """Sends `count` strings, 20 a connection or fewer where the other side hangs up; how many connections."""
    strings = list(random_strings(seed, count))
    connections = 0
    while strings:
        connections += 1
        with make() as sock:
            sock.settimeout(5)
            for data in strings[:20]:
                try:
                    sock.sendall(data)
                    sock.setblocking(False)
                    if sock.recv(1 << 16) == b"":
                        del strings[0]  # it was this one
                        break
                except BlockingIOError:
                    pass
                except OSError:
                    break
                finally:
                    sock.settimeout(5)
                del strings[0]
    return connections


def test_ten_thousand_random_strings_on_port_and_socket_change_nothing(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    assert a.process is not None
    alone = answer(a, 50)
    daemon = psutil.Process(a.process.pid)

    def port() -> socket.socket:
        return socket.create_connection(("127.0.0.1", a.port), timeout=30)

    def control() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(a.socket))
        return sock

    pour(port, 1, 200)  # what is allocated once is not growth
    pour(control, 2, 200)
    before = daemon.memory_info().rss
    began = time.monotonic()
    connections = [pour(make, seed, 5000) for seed, make in ((3, port), (4, control))]
    assert min(connections) >= 250
    a.wait_for(lambda: answers(a), 30, "answer")  # once it has come to the end of what was poured
    grown = daemon.memory_info().rss - before
    assert grown < 50 * 2**20, f"{grown / 2**20:.1f} MB"
    assert time.monotonic() - began < 60
    assert daemon.is_running()
    assert call(a, "status").missing == {"three": "3,head"}
    assert answer(a, 50) == alone
    assert "Traceback" not in a.log


def test_garbage_frames_of_a_listed_peer_end_its_connection_with_one_line(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    mallory = Mallory(cluster, a)
    lines = len(a.log.splitlines())

    async def main() -> None:
        async with running(mallory.node):
            for garbage in (
                secrets.token_bytes(1000),
                b"dgn\x01" + b"\xff" * 5000,
                b"dgn\x01\x05\0\0\0\0\0\0\0hello",
            ):
                await mallory.node.network.connect(a.address)
                await until(lambda: mallory.node.network.is_up(a.peer_id))
                downs = len(mallory.node.downs)
                link = mallory.node.network._links[a.peer_id]
                await link._streams[negotiate.CONTROL].write(garbage)
                await until(lambda downs=downs: len(mallory.node.downs) > downs)
                await until(lambda: mallory.node.network.is_up(a.peer_id))  # it is let in again

    trio.run(main)
    new = a.log.splitlines()[lines:]
    closings = [line for line in new if "closing the connection" in line]
    assert len(closings) == 3
    assert all(mallory.identity.peer_id in line for line in closings)
    assert "Traceback" not in "\n".join(new)
    assert len(answer(a)) == TOKENS


def test_a_peer_that_floods_with_refused_frames_fills_neither_memory_nor_log(cluster: Cluster) -> None:
    a = cluster.nodes["a"]
    assert a.process is not None
    mallory = Mallory(cluster, a)
    daemon = psutil.Process(a.process.pid)
    before, log_before = daemon.memory_info().rss, len(a.log)
    flood = 5_000

    async def main() -> None:
        async with mallory.connected():
            key = HopKey(mallory.identity.peer_id, "s" * 400, 1)
            mallory.node.frames.clear()
            for number in range(flood):
                await mallory.send(a_step(HopKey(key.origin, key.session, number)), ids(1))

    trio.run(main)
    assert daemon.memory_info().rss - before < 50 * 2**20
    assert len(a.log) - log_before < 50_000
    assert "there is no hop" in a.log[log_before:]
    assert len(answer(a)) == TOKENS


def test_a_flood_of_replays_is_sent_once_and_others_are_served(cluster: Cluster) -> None:
    """Of a hop with results for a, and of b as its next: each asks the daemon for a copy of all of them."""
    a, b = cluster.nodes["a"], cluster.nodes["b"]
    mallory = Mallory(cluster, a)
    alone = answer(a)
    served: list[list[int]] = []

    async def main() -> None:
        async with mallory.connected(), trio.open_nursery() as nursery:
            key = await mallory.open(next=b.peer_id)
            for start in range(0, 512, 128):
                await mallory.send(a_step(key, start, 128), hidden(128))
                # b knows no such hop, and a passes that on: the results are in the journal then.
                await until(lambda start=start: len(mallory.failures()) > start // 128)
            before = len(mallory.failures())

            async def flood() -> None:
                while True:
                    for start in range(0, 512, 128):
                        await mallory.send(Replay(key=key, branch=0, route=1, start=start, stop=start + 128))
                    await trio.sleep(0.005)

            nursery.start_soon(flood)
            served.append(await trio.to_thread.run_sync(answer, a))
            await until(lambda: len(mallory.failures()) > before + 200)
            nursery.cancel_scope.cancel()
            told = [failure.message for failure in mallory.failures()[before:]]
            assert len([text for text in told if "there is no hop" in text]) == 4
            assert {text for text in told if "there is no hop" not in text} == {
                "positions up to 511 were sent again already in route 1"
            }

    trio.run(main)
    assert served == [alone]
    a.wait_for(lambda: sessions(a) == [], 10, "end of the session")


def test_hello_is_what_a_listed_peer_is_asked_for_first(cluster: Cluster) -> None:
    """Raw frames before Hello are against the protocol; so is a Hello without a version in common."""
    a = cluster.nodes["a"]
    mallory = Mallory(cluster, a)
    mallory.node.said = Hello(versions=(77,), software="x", name="future")

    async def main() -> None:
        async with running(mallory.node):
            with pytest.raises(PeerError, match="protocol version"):
                await mallory.node.network.connect(a.address)

    trio.run(main)
    state = next(peer for peer in call(a, "peers.list").peers if peer.id == mallory.identity.peer_id)
    assert state.state != "connected"
    assert codec.PROTOCOL_VERSIONS[0] != 77


# --- the post office ----------------------------------------------------------------------------------


def test_what_a_peer_does_not_read_is_bounded_and_what_can_not_be_sent_ends_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent: list[Frame] = []

    async def main() -> None:
        reads = trio.Event()

        async def send(peer: str, frame: Frame, bulk: bool) -> None:
            if peer == "lazy":
                await reads.wait()
            codec.encode(frame)
            sent.append(frame)

        background = Background()
        office = PostOffice("me", send, lambda *_: False, lambda peer, frame: None, background)
        async with trio.open_nursery() as nursery:
            await nursery.start(background.run)
            reply = Frame(HopLength(key=HopKey("o", "s", 1), branch=0, length=0))
            office.post("lazy", reply)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(2 * WAITING):
                office.post("lazy", reply)
            office.post("other", Frame(Failure(kind="x", message="y" * 100_000)))
            office.post("other", reply)
            await trio.testing.wait_all_tasks_blocked()
            assert sent == [reply]
            reads.set()
            await trio.testing.wait_all_tasks_blocked()
            assert len(sent) == WAITING + 2
            office.post("lazy", reply)
            await trio.testing.wait_all_tasks_blocked()
            assert len(sent) == WAITING + 3
            nursery.cancel_scope.cancel()

    trio.run(main)
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "lazy does not read" in line]) == 1
    assert len([line for line in lines if "can't be sent" in line]) == 1


def test_a_message_full_of_offers_is_refused_before_any_is_read(cluster: Cluster) -> None:
    """800 KB that keep every limit but those of offers: 17 offers of one model, each of 1000 spans."""
    a = cluster.nodes["a"]
    mallory = Mallory(cluster, a)
    spans = [{"span": f"{i % 3}-3", "numerics": "", "dtype": "f32", "step_ms": 3.6e6} for i in range(1000)]
    alone = answer(a)

    async def main() -> None:
        async with mallory.connected():
            digest = mallory.manifests()[0].config_digest
            offer = {"model": "m", "n_blocks": 4, "config_digest": digest, "spans": spans}
            message = {"t": "offers", "offers": [offer] * 17, "peers": []}
            header = msgspec.msgpack.encode([message, None])
            assert len(header) > 800_000
            link = mallory.node.network._links[a.peer_id]  # its own codec would not send this
            prefix = b"dgn\x01" + struct.pack("<II", len(header), 0)
            async with link._locks[negotiate.CONTROL]:
                await link._streams[negotiate.CONTROL].write(prefix + header)
            await until(lambda: not mallory.node.network.is_up(a.peer_id))

    trio.run(main)
    assert "1000 spans of model 'm'; at most 64" in a.log
    assert answer(a) == alone


def test_nothing_is_left_of_a_peer_that_is_gone() -> None:
    sent: list[tuple[str, Frame]] = []

    async def main() -> None:
        up = {"a", "b"}
        goes_on = trio.Event()

        async def send(peer: str, frame: Frame, bulk: bool) -> None:
            await goes_on.wait()
            if peer not in up:
                raise PeerGone("gone")
            sent.append((peer, frame))

        background = Background()
        office = PostOffice("me", send, lambda *_: False, lambda peer, frame: None, background)
        first, second = (Frame(HopLength(key=HopKey("o", "s", 1), branch=0, length=n)) for n in (1, 2))
        async with trio.open_nursery() as nursery:
            await nursery.start(background.run)
            idle = trio.lowlevel.current_statistics().tasks_living
            for peer in ("a", "a", "a", "b"):
                office.post(peer, first)
            await trio.testing.wait_all_tasks_blocked()
            up.remove("a")
            office.forget("a")
            office.post("a", first)  # its own answer to what came before
            goes_on.set()
            await trio.testing.wait_all_tasks_blocked()
            assert sent == [("b", first)]
            assert (
                trio.lowlevel.current_statistics().tasks_living == idle
            )  # a task only while something waits
            up.add("a")
            office.post("a", second)
            await trio.testing.wait_all_tasks_blocked()
            assert sent == [("b", first), ("a", second)]
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_bytes_that_wait_for_a_peer_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postoffice, "WAITING_BYTES", 10_000)

    async def main() -> None:
        reads, sent = trio.Event(), []

        async def send(peer: str, frame: Frame, bulk: bool) -> None:
            await reads.wait()
            sent.append(frame)

        def chunk(size: int) -> Frame:
            step = StepFrame(HopKey("o", "s", 1), 0, 0, 0, size, digest_start=1, digest_end=2)
            return Frame(step, Tensor("f32", (size, 1), bytes(4 * size)))

        background = Background()
        office = PostOffice("me", send, lambda *_: False, lambda peer, frame: None, background)
        async with trio.open_nursery() as nursery:
            await nursery.start(background.run)
            assert office.post("narrow", chunk(4000))  # one alone may be as large as it is
            assert not office.post("narrow", chunk(1))
            assert office.post("narrow", Frame(HopLength(key=HopKey("o", "s", 1), branch=0, length=0)))
            assert office.post("other", chunk(1250))
            assert office.post("other", chunk(1250))
            assert not office.post("other", chunk(1))
            reads.set()
            await trio.testing.wait_all_tasks_blocked()
            assert office.post("narrow", chunk(1))
            await trio.testing.wait_all_tasks_blocked()
            assert len(sent) == 5
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_peer_that_reads_now_and_then_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(postoffice, "WAITING_BYTES", 10_000)
    step = StepFrame(HopKey("o", "s", 1), 0, 0, 0, 1250, digest_start=1, digest_end=2)
    chunk = Frame(step, Tensor("f32", (1250, 1), bytes(5000)))

    async def main() -> None:
        reads = trio.Semaphore(0)
        left: list[int] = []

        async def send(peer: str, frame: Frame, bulk: bool) -> None:
            await reads.acquire()

        background = Background()
        office = PostOffice("me", send, lambda *_: False, lambda peer, frame: None, background)
        async with trio.open_nursery() as nursery:
            await nursery.start(background.run)
            for number in range(6):
                taken = [office.post("narrow", chunk, lambda number=number: left.append(number))]
                taken += [office.post("narrow", chunk) for _ in range(3)]
                assert taken[0]
                assert not taken[-1]
                for _ in range(2 if number % 2 else 1):  # now and then all of it is read
                    reads.release()
                    await trio.testing.wait_all_tasks_blocked()
            assert len(left) >= 3
            office.forget("narrow")
            assert left == list(range(6))
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert len([record for record in caplog.records if "narrow does not read" in record.getMessage()]) == 1
