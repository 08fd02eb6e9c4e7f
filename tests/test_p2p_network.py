"""Two or three networks on loopback: Hello, frames, order, announcements, who keeps which connection."""

from __future__ import annotations

import numpy as np
import pytest
import trio
from p2p_kit import Node, pair, running, until

from dgn_backends.tensor import Tensor
from dgnd.errors import PeerGone
from dgnd.wire.messages import EndTurn, Frame, HopKey, StepFrame


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
            (peer, got), = b.frames
            assert peer == a.id
            assert got.payload is not None
            assert got.payload.to_f32().tolist() == [[3.0] * 64] * 4
            assert a.frames == [(b.id, end_turn(7))]
        assert a.downs[0][0] == b.id
        with pytest.raises(PeerGone, match="attic"):
            await a.network.send(b.id, end_turn(1))

    trio.run(main)
