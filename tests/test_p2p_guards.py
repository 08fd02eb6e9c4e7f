"""What strangers and misbehaving peers may try, each on real sockets: the node goes on answering, within
bounds.
"""

from __future__ import annotations

import gc
import itertools
import random
import re
import secrets
import signal
from functools import partial

import psutil
import pytest
import trio
from libp2p.io.exceptions import ConnectionClosedError, IOException
from p2p_kit import Node, child, for_ever, pair, running, until

from dgnd.errors import ProtocolError
from dgnd.identity import Identity
from dgnd.p2p import addresses, host, negotiate, standard
from dgnd.p2p.host import Connection, Host
from dgnd.p2p.muxer import WINDOW, MuxStream
from dgnd.p2p.yamux import HEADER, SYN
from dgnd.wire import codec
from dgnd.wire.decoder import PEER, FrameDecoder
from dgnd.wire.messages import Cancel, EndTurn, Frame, Goodbye, Hello, HopKey

KEY = HopKey("o", "s", 1)
FAST = {"ping_s": 0.1, "gone_s": 0.6, "handshake_s": 1.0}


def endpoint(node: Node) -> addresses.Endpoint:
    return addresses.parse(node.address)[0]


async def raw(node: Node) -> trio.SocketStream:
    where = endpoint(node)
    return await trio.open_tcp_stream(where.host, where.port)


async def answers(node: Node) -> None:
    """A fresh listed peer gets an echo."""
    friend = Node("friend")
    async with running(friend):
        await pair(friend, node)
        await friend.network.send(node.id, Frame(EndTurn(key=KEY, branch=3)))
        await until(lambda: (friend.id, Frame(EndTurn(key=KEY, branch=3))) in node.frames)


class Attacker:
    """A listed peer with its own hands on the multiplexer. Use inside `attacking`."""

    def __init__(self, identity: Identity, connection: Connection) -> None:
        self.identity = identity
        self.connection = connection
        self.got: list[Frame] = []
        self.streams: dict[str, MuxStream] = {}
        self.over = trio.Event()

    async def run(self) -> None:
        try:
            await self.connection.mux.run(lambda stream: None)
        except ProtocolError:
            pass  # answers to what was written past its own multiplexer
        self.over.set()

    async def raw(self, data: bytes) -> None:
        """Writes past its own multiplexer."""
        async with self.connection.mux._write_lock:
            await self.connection.mux._session.write(data)

    async def open(self, protocol: str) -> MuxStream:
        stream = self.connection.mux.open_stream()
        await negotiate.propose(stream, protocol, 5)
        decoder = FrameDecoder(codec.DEFAULT_LIMITS, PEER)

        def read(data: bytes | memoryview) -> None:
            decoder.receive_data(data)
            while (frame := decoder.next_frame()) is not None:
                self.got.append(frame)

        stream.attach(read, lambda: None)
        self.streams[protocol] = stream
        return stream

    async def greet(self, node: Node) -> MuxStream:
        control = await self.open(negotiate.CONTROL)
        await self.open(negotiate.BULK)
        hello = codec.encode_bytes(Frame(Hello(versions=(1,), software="attacker", name="attacker")))
        if self.identity.peer_id > node.id:
            await control.write(hello)
            await until(lambda: self.got)
        else:
            await until(lambda: self.got)
            await control.write(hello)
        await until(lambda: node.network.is_up(self.identity.peer_id))
        return control


async def attack(node: Node, nursery: trio.Nursery) -> Attacker:
    identity = Identity.generate()
    node.network.allow(identity.peer_id, "attacker", keep_connected=False)
    dialler = Host(identity.seed, lambda peer, address: "closed", lambda *refused: None, 5.0)
    connection = await dialler.dial(endpoint(node), node.id, 5.0)
    attacker = Attacker(identity, connection)
    nursery.start_soon(attacker.run)
    nursery.start_soon(close_at_end, connection)
    return attacker


async def close_at_end(connection: Connection) -> None:
    try:
        await trio.sleep_forever()
    finally:
        connection.mux.close_now()


def test_inbound_slots_come_back() -> None:
    """py-libp2p refuses everybody after 250 inbound connections in its life."""

    async def main() -> None:
        node = Node("desk")
        async with running(node):
            for _ in range(1000):
                await (await raw(node)).aclose()
            identity = Identity.generate()
            node.network.allow(identity.peer_id, "visitor", keep_connected=False)
            for _ in range(50):
                visitor = Node("visitor", identity)
                async with running(visitor):
                    await visitor.network.connect(node.address)
            await until(lambda: len(node.downs) == 50)
            assert len(node.ups) == 50
            await answers(node)

    trio.run(main)


def test_ten_thousand_random_byte_strings() -> None:
    async def main() -> None:
        node = Node("desk", settings=FAST)
        process = psutil.Process()
        rng = random.Random(5)
        limiter = trio.CapacityLimiter(20)

        async def one() -> None:
            async with limiter:
                stream = await raw(node)
                async with stream:
                    try:
                        await stream.send_all(rng.randbytes(rng.choice((1, 10, 100, 1000, 5000))))
                    except trio.BrokenResourceError:
                        pass

        async with running(node):
            await answers(node)
            gc.collect()
            before = process.memory_info().rss
            for _ in range(20):
                async with trio.open_nursery() as nursery:
                    for _ in range(500):
                        nursery.start_soon(one)
            gc.collect()
            assert process.memory_info().rss - before < 50e6
            assert len(node.ups) == 1
            await answers(node)

    trio.run(main)


def test_random_bytes_within_the_encryption_end_only_that_connection() -> None:
    async def main() -> None:
        node = Node("desk", settings=FAST)
        async with running(node), trio.open_nursery() as nursery:
            for _ in range(20):
                attacker = await attack(node, nursery)
                await attacker.raw(secrets.token_bytes(4000))
                await attacker.over.wait()
            await answers(node)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_handshakes_that_never_end_time_out_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        node = Node("desk", settings={**FAST, "handshake_s": 6.0})
        async with running(node), trio.open_nursery() as nursery:
            monkeypatch.setattr(host, "HALF_OPEN_PER_ADDRESS", 10)
            slow = [await raw(node) for _ in range(10)]
            for stream in slow:
                assert await stream.receive_some() == b"\x13/multistream/1.0.0\n"
            # One more of the same address is closed at once; the others when their time is over.
            one_more = await raw(node)
            with trio.fail_after(5):
                assert await one_more.receive_some() == b""
            with trio.fail_after(30):
                for stream in slow:
                    assert await stream.receive_some() == b""
            for stream in (*slow, one_more):
                await stream.aclose()
            await answers(node)
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize(
    "said", [b"\0" * 100_000, b"\xff\xff\xff\xff\x7f" + bytes(100_000), b"\x03ls\n" * 20_000]
)
def test_a_stranger_can_not_make_the_negotiation_long(said: bytes) -> None:
    async def main() -> None:
        node = Node("desk")
        async with running(node):
            stream = await raw(node)
            answer = b""
            with trio.fail_after(15):
                try:
                    await stream.send_all(b"\x13/multistream/1.0.0\n" + said)
                    async for piece in stream:
                        answer += piece
                except trio.BrokenResourceError:
                    pass  # closed while we still spoke
            assert len(answer) < 40_000
            await stream.aclose()
            await answers(node)

    trio.run(main)


def test_a_listed_peer_that_never_says_hello_is_let_go() -> None:
    async def main() -> None:
        node = Node("desk", settings=FAST)
        async with running(node), trio.open_nursery() as nursery:
            attacker = await attack(node, nursery)
            await attacker.open(negotiate.CONTROL)
            with trio.fail_after(15):
                await attacker.over.wait()
            assert node.ups == []
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_fault_in_a_handler_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        a, b = Node("desk"), Node("attic")

        def broken(peer: str, frame: Frame) -> None:
            if isinstance(frame.message, Cancel):
                raise KeyError("our own fault")

        b.on_frame = broken
        async with running(a, b):
            await pair(a, b)
            await a.network.send(b.id, Frame(Cancel(key=KEY, branch=1)))
            await until(lambda: a.frames)
            ((_, failure),) = a.frames
            assert (failure.message.kind, failure.message.key, failure.message.tag) == (
                "internal",
                KEY,
                "cancel",
            )
            await a.network.send(b.id, Frame(EndTurn(key=KEY, branch=2)))
            await until(lambda: len(b.frames) == 2)
            assert a.downs == b.downs == []

    trio.run(main)
    assert "our own fault" in caplog.text


def test_a_flood_beyond_the_window_is_cut_and_not_held(caplog: pytest.LogCaptureFixture) -> None:
    """py-libp2p takes 200 MB into memory from a peer that ignores the window."""

    async def main() -> None:
        node = Node("desk")
        process = psutil.Process()
        async with running(node), trio.open_nursery() as nursery:
            attacker = await attack(node, nursery)
            stream = attacker.connection.mux.open_stream()  # nobody attaches to it: its window never grows
            await stream.write(b"\x13/multistream/1.0.0\n")
            size = 60_000
            block = HEADER.pack(0, 0, 0, stream.state.id, size) + b"\xff" * size
            before, sent = process.memory_info().rss, 0
            with pytest.raises(ConnectionClosedError):  # noqa: PT012 it is the loop that is cut
                while sent < 100 << 20:
                    await attacker.raw(block)
                    sent += size
            assert process.memory_info().rss - before < 20e6
            await answers(node)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert re.search("over the receive window|not open", caplog.text)


def test_one_frame_over_the_window_of_a_stream_in_use_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        node = Node("desk")
        async with running(node), trio.open_nursery() as nursery:
            attacker = await attack(node, nursery)
            control = await attacker.greet(node)
            oversized = HEADER.pack(0, 0, 0, control.state.id, 2 * WINDOW)
            await attacker.raw(oversized)
            await attacker.over.wait()
            await until(lambda: node.downs)
            assert "over the receive window" in node.downs[0][1]
            nursery.cancel_scope.cancel()

    caplog.set_level("WARNING")
    trio.run(main)
    assert len([record for record in caplog.records if record.name.startswith("dgnd")]) == 1


def test_64_mb_of_well_formed_frames_pass_through_without_being_held() -> None:
    async def main() -> None:
        node = Node("desk")
        node.on_frame = lambda peer, frame: node.frames.clear()
        process = psutil.Process()
        async with running(node), trio.open_nursery() as nursery:
            attacker = await attack(node, nursery)
            control = await attacker.greet(node)
            before = process.memory_info().rss
            block = codec.encode_bytes(Frame(Goodbye(reason="x" * 500))).replace(b"bye", b"huh") * 1000
            sent = 0
            while sent < 70 << 20:  # each is answered with a Failure, as it is of an unknown kind
                await control.write(block)
                sent += len(block)
                attacker.got.clear()
            assert process.memory_info().rss - before < 50e6
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_streams_are_bounded_and_leave_nothing() -> None:
    async def main() -> None:
        node = Node("desk")
        async with running(node), trio.open_nursery() as nursery:
            attacker = await attack(node, nursery)
            await attacker.greet(node)
            link = node.network._links[attacker.identity.peer_id]
            for _ in range(300):  # opened and refused
                stream = attacker.connection.mux.open_stream()
                with pytest.raises(negotiate.NotAgreed):
                    await negotiate.propose(stream, "/floodsub/1.0.0", 5)
                await stream.close()
            await until(lambda: link.connection.mux.open_streams == 2)
            assert attacker.connection.mux.open_streams == 2
            assert node.network.is_up(attacker.identity.peer_id)
            # And open ones without end.
            syn = b"".join(HEADER.pack(0, 1, SYN, 100_001 + 2 * n, 0) for n in range(1000))
            await attacker.raw(syn)
            await attacker.over.wait()
            await until(lambda: node.downs)
            assert "streams over the limit" in node.downs[0][1]
            nursery.cancel_scope.cancel()

    trio.run(main)


async def asked_for(attacker: Attacker, protocol: str) -> MuxStream:
    stream = attacker.connection.mux.open_stream()
    await negotiate.propose(stream, protocol, 5)
    return stream


def test_pings_are_echoed_without_end_and_not_held_for_who_does_not_read() -> None:
    async def main() -> None:
        node = Node("desk")
        async with running(node), trio.open_nursery() as nursery:
            attacker = await attack(node, nursery)
            await attacker.greet(node)
            stream = await asked_for(attacker, standard.PING)
            for _ in range(12):  # more than the window of a stream
                sent = secrets.token_bytes(32 * 1024)
                await stream.write(sent)
                came = b""
                while len(came) < len(sent):
                    came += await stream.read()
                assert came == sent
            deaf = await asked_for(attacker, standard.PING)
            with trio.move_on_after(1.0) as scope:
                await deaf.write(bytes(64 << 20))
            assert scope.cancelled_caught
            assert node.network.is_up(attacker.identity.peer_id)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_streams_of_ping_and_identify_are_few_and_leave_nothing() -> None:
    async def main() -> None:
        node = Node("desk")
        async with running(node), trio.open_nursery() as nursery:
            attacker = await attack(node, nursery)
            await attacker.greet(node)
            link = node.network._links[attacker.identity.peer_id]
            held = [await asked_for(attacker, standard.PING) for _ in range(standard.MOST)]
            one_more = await asked_for(attacker, standard.IDENTIFY)
            with pytest.raises(IOException):
                await one_more.read()
            for stream in held:
                await stream.close()
            await until(lambda: link.connection.mux.open_streams == 2)
            for _ in range(50):
                stream = await asked_for(attacker, standard.IDENTIFY)
                assert await stream.read()
                await stream.close()
            await until(lambda: link.connection.mux.open_streams == 2)
            assert node.network.is_up(attacker.identity.peer_id)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_peer_that_asks_and_does_not_read_is_cut() -> None:
    async def main() -> None:
        node = Node("desk")
        async with running(node), trio.open_nursery() as nursery:
            attacker = await attack(node, nursery)
            attacker.connection.mux.grant = lambda *_: None  # type: ignore[method-assign]
            control = await attacker.greet(node)
            known = codec.encode_bytes(Frame(EndTurn(key=KEY, branch=9)))
            kinds = itertools.count(10_000_000)  # each another unknown kind, so that each needs its answer
            with trio.fail_after(20), pytest.raises(Exception, match=r"closed|lost|ended"):
                await for_ever(lambda: control.write(known.replace(b"end_turn", str(next(kinds)).encode())))
            await until(lambda: node.downs)
            assert "asks but does not read" in node.downs[0][1]
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"dgn\x02garbage", "not a frame of this protocol"),
        (codec.encode_bytes(Frame(Hello(versions=(1,), software="", name="again"))), "a second Hello"),
    ],
)
def test_what_breaks_the_protocol_ends_the_connection_with_one_line(
    message: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        node = Node("desk")
        async with running(node), trio.open_nursery() as nursery:
            attacker = await attack(node, nursery)
            control = await attacker.greet(node)
            await control.write(message)
            await attacker.over.wait()
            await until(lambda: node.downs)
            assert reason in node.downs[0][1]
            assert isinstance(attacker.got[-1].message, Goodbye)
            assert reason in attacker.got[-1].message.reason
            await answers(node)
            nursery.cancel_scope.cancel()

    trio.run(main)
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1
    assert reason in lines[0]


def test_a_message_before_hello_ends_the_connection() -> None:
    async def main() -> None:
        node = Node("desk")
        async with running(node), trio.open_nursery() as nursery:
            attacker = await attack(node, nursery)
            control = await attacker.open(negotiate.CONTROL)
            await control.write(codec.encode_bytes(Frame(EndTurn(key=KEY, branch=0))))
            await attacker.over.wait()
            assert node.ups == node.frames == []
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_an_unknown_kind_is_answered_and_the_connection_goes_on() -> None:
    async def main() -> None:
        node = Node("desk")
        async with running(node), trio.open_nursery() as nursery:
            attacker = await attack(node, nursery)
            control = await attacker.greet(node)
            known = codec.encode_bytes(Frame(EndTurn(key=KEY, branch=9)))
            await control.write(known.replace(b"end_turn", b"eat_lime") + known)
            await until(lambda: node.frames)
            await until(lambda: any(getattr(f.message, "tag", "") == "eat_lime" for f in attacker.got))
            assert node.network.is_up(attacker.identity.peer_id)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_frozen_peer_is_found_by_heartbeats() -> None:
    async def main() -> None:
        node = Node("desk", settings={"ping_s": 0.2, "gone_s": 1.2})
        with child(node.id) as frozen:
            async with running(node):
                node.network.allow(frozen.identity.peer_id, "frozen", (frozen.address,))
                await until(lambda: node.ups)
                frozen.signal(signal.SIGSTOP)
                stopped = trio.current_time()
                await until(lambda: node.downs)
                assert 0.5 < trio.current_time() - stopped < 12
                assert "no sign of life" in node.downs[0][1]
                frozen.signal(signal.SIGCONT)
                await until(lambda: len(node.ups) == 2)

    trio.run(main)


def test_a_write_to_a_frozen_peer_ends_when_it_is_given_up() -> None:
    async def main() -> None:
        node = Node("desk", settings={"ping_s": 0.2, "gone_s": 1.2})
        with child(node.id) as frozen:
            async with running(node):
                node.network.allow(frozen.identity.peer_id, "frozen", (frozen.address,))
                await until(lambda: node.ups)
                frozen.signal(signal.SIGSTOP)
                frame = Frame(EndTurn(key=KEY, branch=0))
                with trio.fail_after(15), pytest.raises(Exception, match="no sign of life"):
                    await for_ever(partial(node.network.send, frozen.identity.peer_id, frame))

    trio.run(main)
