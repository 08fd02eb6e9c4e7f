"""The two protocols that every libp2p implementation asks for: ping and identify, answered and never asked.

https://github.com/libp2p/specs/blob/master/ping/ping.md and identify/README.md. Knows streams as bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import trio
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.utils.varint import encode_uvarint
from multiaddr import Multiaddr  # type: ignore[import-untyped]  # it has no type information

from dgnd.p2p.addresses import Endpoint
from dgnd.p2p.muxer import MuxStream

PING = "/ipfs/ping/1.0.0"
IDENTIFY = "/ipfs/id/1.0.0"
#: Streams of them that one connection may have open at a time.
MOST = 4
PING_BYTES = 32
_PROTOCOL_VERSION = "ipfs/0.1.0"
_AT_ONCE = 64 * PING_BYTES


async def answer_pings(stream: MuxStream) -> None:
    """Echoes each 32 bytes until the other end has no more; who reads no echoes is read no further."""
    waiting = b""
    try:
        while True:
            waiting += await stream.read(_AT_ONCE)
            whole = len(waiting) - len(waiting) % PING_BYTES
            if whole:
                await stream.write(waiting[:whole])
            waiting = waiting[whole:]
    except IOException:
        await stream.close()


async def identify(stream: MuxStream, message: bytes, timeout_s: float) -> None:
    """Says who this is, and gives the other end `timeout_s` to have read it."""
    with trio.move_on_after(timeout_s):
        try:
            await stream.write(encode_uvarint(len(message)) + message)
            await stream.close()
            while True:  # whatever it says
                await stream.read(_AT_ONCE)
        except ConnectionClosedError:
            return
    stream.reset()


def identify_message(
    public_key: bytes,
    software: str,
    listening: Iterable[Endpoint],
    observed: Endpoint,
    protocols: Iterable[str],
) -> bytes:
    """The protobuf `Identify`. `public_key`: as libp2p writes it; `observed`: where the asker is seen."""
    fields = [
        (1, public_key),
        *((2, _binary(endpoint)) for endpoint in listening),
        *((3, protocol.encode()) for protocol in protocols),
        (4, _binary(observed)),
        (5, _PROTOCOL_VERSION.encode()),
        (6, software.encode()),
    ]
    return b"".join(
        encode_uvarint(number << 3 | 2) + encode_uvarint(len(value)) + value for number, value in fields
    )


def _binary(endpoint: Endpoint) -> bytes:
    value: bytes = Multiaddr(str(endpoint)).to_bytes()
    return value
