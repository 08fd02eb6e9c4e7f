"""Two or three networks on loopback: Hello, frames, order, announcements, who keeps which connection."""

from __future__ import annotations

import logging
import signal
from functools import partial

import numpy as np
import pytest
import trio
from p2p_kit import Node, child, for_ever, pair, running, until

from dgn_backends.tensor import Tensor
from dgnd.errors import PeerGone, ProtocolError
from dgnd.wire.messages import EndTurn, Frame, Hello, HopKey, ModelOffer, Offers, StepFrame


def step(start: int, rows: int, size: int = 64) -> Frame:
    """Hidden states [rows, size] in f32."""
    states = np.full((rows, size), start, dtype=np.float32)
    message = StepFrame(
        key=HopKey("o", "s", 1), branch=0, route=0, start=start, count=rows, digest_start=0, digest_end=1
    )
    return Frame(message, Tensor.from_f32(states, "f32"))


def end_turn(branch: int) -> Frame:
    return Frame(EndTurn(key=HopKey("o", "s", 1), branch=branch))


def test_hello_and_frames_both_ways() -> None:
    async def main() -> None:
        a, b = Node("desk"), Node("attic")
        async with running(a, b):
            await pair(a, b)
            assert [(peer, hello.name) for peer, hello in a.ups] == [(b.id, "attic")]
            assert [(peer, hello.name) for peer, hello in b.ups] == [(a.id, "desk")]
            await a.network.send(b.id, step(3, 4))
            await b.network.send(a.id, end_turn(7), bulk=True)
            await until(lambda: a.frames and b.frames)
            ((peer, got),) = b.frames
            assert peer == a.id
            assert got.payload is not None
            assert got.payload.to_f32().tolist() == [[3.0] * 64] * 4
            assert a.frames == [(b.id, end_turn(7))]
        assert a.downs[0][0] == b.id
        with pytest.raises(PeerGone, match="attic"):
            await a.network.send(b.id, end_turn(1))

    trio.run(main)


def test_frames_of_a_class_stay_in_order_and_small_ones_pass_big_ones() -> None:
    async def main() -> None:
        a, b = Node("desk"), Node("attic")
        async with running(a, b):
            await pair(a, b)
            arrived: list[str] = []
            b.on_frame = lambda peer, frame: arrived.append(
                "big" if frame.payload else f"small {frame.message.branch}"
            )
            big = step(0, 4096, 4096)  # 64 MiB

            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(a.network.send, b.id, big, bulk=True))
                await trio.sleep(0.01)
                for branch in range(20):
                    await a.network.send(b.id, end_turn(branch))
            await until(lambda: len(arrived) == 21, 30)
            assert [what for what in arrived if what != "big"] == [f"small {n}" for n in range(20)]
            assert arrived[-1] == "big"
            assert b.frames[-1][1].payload is not None
            assert bytes(b.frames[-1][1].payload.data) == bytes(big.payload.data)  # type: ignore[union-attr]

    trio.run(main)


def test_many_big_frames_both_ways_at_once_don_t_block_each_other() -> None:
    async def main() -> None:
        a, b = Node("desk"), Node("attic")
        async with running(a, b):
            await pair(a, b)
            async with trio.open_nursery() as nursery:
                for n in range(6):
                    nursery.start_soon(partial(a.network.send, b.id, step(n, 512, 2048), bulk=n % 2 == 0))
                    nursery.start_soon(partial(b.network.send, a.id, step(n, 512, 2048), bulk=n % 2 == 0))
            await until(lambda: len(a.frames) == len(b.frames) == 6, 30)
            for node in (a, b):
                assert sorted(frame.message.start for _, frame in node.frames) == list(range(6))

    trio.run(main)


def test_a_send_cancelled_halfway_leaves_whole_frames() -> None:
    async def main() -> None:
        a, b = Node("desk"), Node("attic")
        async with running(a, b):
            await pair(a, b)
            for n in range(10):
                with trio.move_on_after(0.001 * n):
                    await a.network.send(b.id, step(n, 512, 2048))
            await a.network.send(b.id, end_turn(99))
            await until(lambda: any(frame == end_turn(99) for _, frame in b.frames), 30)
            assert a.downs == b.downs == []
            assert all(
                frame.payload.to_f32().max() == frame.message.start
                for _, frame in b.frames
                if frame.payload is not None
            )

    trio.run(main)


def test_an_announcement_reaches_peers_and_their_state() -> None:
    async def main() -> None:
        a, b = Node("desk"), Node("attic")
        async with running(a, b):
            await pair(a, b)
            offer = ModelOffer(model="llama", n_blocks=4, config_digest="d")
            a.said = Hello(versions=(1,), software="test", name="desk", offers=(offer,), peers=(b.id,))
            a.network.announce()
            await until(lambda: b.frames)
            assert b.frames[0][1].message == Offers(offers=(offer,), peers=(b.id,))
            (state,) = b.network.peers()
            assert state.hello is not None
            assert (state.hello.offers, state.hello.peers, state.name) == ((offer,), (b.id,), "desk")

    trio.run(main)


def test_the_state_of_a_connected_peer_has_its_round_trip_time() -> None:
    async def main() -> None:
        a, b = Node("desk"), Node("attic")
        async with running(a, b):
            await pair(a, b)
            await until(lambda: a.network.peers()[0].rtt_ms is not None)
            (state,) = a.network.peers()
            assert (state.id, state.name, state.state, state.addrs) == (
                b.id,
                "attic",
                "connected",
                (b.address,),
            )
            assert state.rtt_ms is not None
            assert 0 < state.rtt_ms < 1000

    trio.run(main)


def test_three_networks_and_no_common_version() -> None:
    async def main() -> None:
        a, b, c = Node("desk"), Node("attic"), Node("future")
        c.said = Hello(versions=(8, 9), software="test", name="future")
        async with running(a, b, c):
            await pair(a, b)
            c.network.allow(a.id, "desk", keep_connected=False)
            a.network.allow(c.id, "future", (c.address,))
            await until(lambda: "no common protocol version" in a.detail(c.id))
            assert a.network.is_up(b.id)
            assert not a.network.is_up(c.id)
            assert len(a.ups) == 1
            assert c.ups == []

    trio.run(main)


def test_a_frame_that_no_peer_would_take_is_the_sender_s_error() -> None:
    async def main() -> None:
        a, b = Node("desk"), Node("attic")
        async with running(a, b):
            await pair(a, b)
            with pytest.raises(ProtocolError):
                await a.network.send(b.id, Frame(EndTurn(key=HopKey("x" * 9999, "s", 1), branch=0)))
            await a.network.send(b.id, end_turn(1))
            await until(lambda: b.frames)

    trio.run(main)


def test_shutdown_says_goodbye_is_prompt_and_leaves_no_task() -> None:
    async def main() -> None:
        a, b = Node("desk"), Node("attic")
        async with running(b):
            async with running(a):
                await pair(a, b)
                ending = trio.current_time()
            assert trio.current_time() - ending < 3
            await until(lambda: b.downs)
            assert b.downs == [(a.id, "it said goodbye: shutting down")]
            assert a.downs == [(b.id, "shutting down")]

    trio.run(main)


def test_shutdown_is_prompt_while_a_sender_waits_for_a_peer_that_is_frozen() -> None:
    async def main() -> None:
        node = Node("desk")
        with child(node.id) as frozen:
            async with trio.open_nursery() as nursery:
                await nursery.start(node.network.run)
                node.network.allow(frozen.identity.peer_id, "frozen", (frozen.address,))
                await until(lambda: node.ups)
                frozen.signal(signal.SIGSTOP)

                send = partial(node.network.send, frozen.identity.peer_id, step(0, 512, 2048), bulk=True)

                async def flood() -> None:
                    with pytest.raises(PeerGone):
                        await for_ever(send)

                nursery.start_soon(flood)
                await trio.sleep(0.3)
                ending = trio.current_time()
                nursery.cancel_scope.cancel()
            assert trio.current_time() - ending < 3

    trio.run(main)


def test_the_libraries_noise_is_debug_only() -> None:
    Node("desk")
    ours, seen = logging.getLogger("dgnd.p2p"), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append((record.levelname, record.getMessage()))  # type: ignore[method-assign]
    ours.addHandler(handler)
    try:
        for level in (logging.INFO, logging.DEBUG):
            ours.setLevel(level)
            logging.getLogger("libp2p.stream_muxer.yamux").error("Incomplete read %d", level)
    finally:
        ours.removeHandler(handler)
        ours.setLevel(logging.NOTSET)
    assert seen == [("DEBUG", f"Incomplete read {logging.DEBUG}")]
