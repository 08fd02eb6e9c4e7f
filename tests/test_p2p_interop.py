"""With py-libp2p as it comes: its Noise, its yamux, its host; and its plaintext, which is refused."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.serialization import deserialize_public_key
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.host.ping import PingService
from libp2p.identity.identify.identify import parse_identify_response
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as StockNoise
from libp2p.security.secure_session import SecureSession
from multiaddr import Multiaddr
from p2p_kit import Node, running, until

from dgnd.identity import Identity
from dgnd.p2p.negotiate import CONTROL
from dgnd.p2p.noise import GateClosed, GatedNoise
from dgnd.p2p.standard import IDENTIFY, PING
from dgnd.p2p.tcp import TcpStream
from dgnd.wire import codec
from dgnd.wire.decoder import PEER, FrameDecoder
from dgnd.wire.messages import Frame, Hello, Ping, Pong

SIZES = (1, 2, 100, 65519, 65520, 65535, 65536, 300_000, 2_000_000)


async def sockets() -> tuple[TcpStream, TcpStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        ends: list[trio.SocketStream] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: accept(listener, ends))
            mine = await trio.open_tcp_stream("127.0.0.1", port)
    return TcpStream(mine), TcpStream(ends[0])


async def accept(listener: trio.SocketListener, ends: list[trio.SocketStream]) -> None:
    ends.append(await listener.accept())


async def read_exactly(session: SecureSession, size: int) -> bytes:
    out = b""
    while len(out) < size:
        out += await session.read(size - len(out))
    return out


@pytest.mark.parametrize("ours_dials", [True, False])
def test_the_fast_session_speaks_with_the_stock_one(ours_dials: bool) -> None:
    async def main() -> None:
        keys = create_new_key_pair(), create_new_key_pair()
        ours = GatedNoise(keys[0], lambda peer, address: None)
        stock = StockNoise(keys[1], create_x25519_key_pair().private_key)
        dialler, acceptor = (ours, stock) if ours_dials else (stock, ours)
        near, far = await sockets()
        sessions: dict[str, SecureSession] = {}

        async def inbound() -> None:
            sessions["in"] = await acceptor.secure_inbound(RawConnection(far, False))  # type: ignore[assignment]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(inbound)
            expected = ID.from_pubkey(keys[1 if ours_dials else 0].public_key)
            sessions["out"] = await dialler.secure_outbound(RawConnection(near, True), expected)  # type: ignore[assignment]
        for size in SIZES:
            for writer, reader in (("in", "out"), ("out", "in")):
                sent = secrets.token_bytes(size)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(sessions[writer].write, sent)
                    assert await read_exactly(sessions[reader], size) == sent
        near.close_now()
        far.close_now()

    trio.run(main)


def test_the_gate_is_asked_before_anything_else() -> None:
    async def main() -> None:
        keys = create_new_key_pair(), create_new_key_pair()
        stranger = ID.from_pubkey(keys[1].public_key).to_base58()
        asked: list[str] = []

        def gate(peer: str, address: str) -> str:
            asked.append(peer)
            return "not today"

        near, far = await sockets()
        async with trio.open_nursery() as nursery:
            stock = StockNoise(keys[1], create_x25519_key_pair().private_key)
            nursery.start_soon(
                stock.secure_outbound, RawConnection(near, True), ID.from_pubkey(keys[0].public_key)
            )
            with pytest.raises(GateClosed, match=f"{stranger}: not today"):
                await GatedNoise(keys[0], gate).secure_inbound(RawConnection(far, False))
        assert asked == [stranger]
        near.close_now()
        far.close_now()

    trio.run(main)


@asynccontextmanager
async def stock_host(identity: Identity, security: object) -> AsyncIterator[BasicHost]:
    host = new_host(create_new_key_pair(identity.seed), sec_opt=security)  # type: ignore[arg-type]
    async with host.run(listen_addrs=[Multiaddr("/ip4/127.0.0.1/tcp/0")]):
        yield host  # type: ignore[misc]


def noise_of(identity: Identity) -> dict[TProtocol, StockNoise]:
    keys = create_new_key_pair(identity.seed)
    return {TProtocol(NOISE): StockNoise(keys, create_x25519_key_pair().private_key)}


def test_a_stock_host_says_hello_over_its_own_noise_and_yamux() -> None:
    async def main() -> None:
        node, other = Node("desk"), Identity.generate()
        node.network.allow(other.peer_id, "stock", keep_connected=False)
        async with running(node), stock_host(other, noise_of(other)) as host:
            await host.connect(info_from_p2p_addr(Multiaddr(node.address)))
            streams = [
                await host.new_stream(ID.from_base58(node.id), [TProtocol(protocol)])
                for protocol in (CONTROL, f"{CONTROL}/bulk")
            ]
            decoder = FrameDecoder(codec.DEFAULT_LIMITS, PEER)
            mine = Hello(versions=codec.PROTOCOL_VERSIONS, software="stock", name="stock")
            hello = codec.encode_bytes(Frame(mine))
            ping = codec.encode_bytes(Frame(Ping(nonce=5)))
            got: list[Frame] = []

            async def read() -> None:
                while True:
                    decoder.receive_data(await streams[0].read(65536))
                    while (frame := decoder.next_frame()) is not None:
                        got.append(frame)

            async with trio.open_nursery() as nursery:
                if other.peer_id > node.id:  # the one with the larger id speaks first
                    await streams[0].write(hello)
                nursery.start_soon(read)
                await until(lambda: got)
                assert got[0].message == node.network.hello()
                if other.peer_id < node.id:
                    await streams[0].write(hello)
                await until(lambda: node.network.is_up(other.peer_id))
                await streams[0].write(ping)
                await until(lambda: Frame(Pong(nonce=5)) in got)
                nursery.cancel_scope.cancel()
            assert [hello.name for _, hello in node.ups] == ["stock"]
            # A stock host that ends with an open connection leaks its socket; so let ours end it.
            await node.network.disconnect(other.peer_id)
            await until(lambda: not host.get_network().connections)

    trio.run(main)


def test_a_stock_host_pings_and_identifies() -> None:
    async def main() -> None:
        node, other = Node("desk", settings={"software": "dgn/1.2.3"}), Identity.generate()
        node.network.allow(other.peer_id, "stock", keep_connected=False)
        async with running(node), stock_host(other, noise_of(other)) as host:
            await host.connect(info_from_p2p_addr(Multiaddr(node.address)))
            rtts = await PingService(host).ping(ID.from_base58(node.id), 5)
            assert len(rtts) == 5
            stream = await host.new_stream(ID.from_base58(node.id), [TProtocol(IDENTIFY)])
            found = parse_identify_response(await stream.read())
            await stream.close()
            assert ID.from_pubkey(deserialize_public_key(found.public_key)).to_base58() == node.id
            assert found.agent_version == "dgn/1.2.3"
            (listening,) = found.listen_addrs
            assert f"{Multiaddr(listening)}/p2p/{node.id}" == node.address
            assert str(Multiaddr(found.observed_addr)).startswith("/ip4/127.0.0.1/tcp/")
            assert {CONTROL, PING, IDENTIFY} <= set(found.protocols)
            await node.network.disconnect(other.peer_id)
            await until(lambda: not host.get_network().connections)

    trio.run(main)


def test_plaintext_is_refused_even_for_a_listed_peer() -> None:
    """py-libp2p's new_host() accepts it by default, and so whoever knows a peer's public key as that peer."""

    async def main() -> None:
        node, listed = Node("desk"), Identity.generate()
        node.network.allow(listed.peer_id, "listed", keep_connected=False)
        plaintext = {TProtocol(PLAINTEXT_PROTOCOL_ID): InsecureTransport(create_new_key_pair(listed.seed))}
        async with running(node), stock_host(listed, plaintext) as host:
            with pytest.raises(Exception, match=r"(?i)dial|connect"):
                await host.connect(info_from_p2p_addr(Multiaddr(node.address)))
            assert node.ups == []
            assert node.network.refusals() == []

    trio.run(main)
