"""The echo of 4 KB through py-libp2p as it comes (Noise, yamux), between two processes on loopback: what a
hop's cost is compared with, as both change with the machine. Knows nothing of dgnd.

    python -m bench_kit.stock_echo SEED-HEX     the other end: prints its address, echoes until it is killed
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID, Transport
from multiaddr import Multiaddr

BYTES = 4096
_ECHO = TProtocol("/dgn-bench/echo/1")
_ANY_PORT = Multiaddr("/ip4/127.0.0.1/tcp/0")


def _host(seed: bytes) -> BasicHost:
    keys = create_new_key_pair(seed)
    noise = Transport(keys, create_x25519_key_pair().private_key)
    host = new_host(keys, sec_opt={TProtocol(PROTOCOL_ID): noise})
    assert isinstance(host, BasicHost)
    return host


async def _read(stream: NetStream, size: int) -> bytes:
    out = b""
    while len(out) < size:
        piece = await stream.read(size - len(out))
        if not piece:
            break
        out += piece
    return out


async def _echo(stream: NetStream) -> None:
    while data := await _read(stream, BYTES):
        await stream.write(data)


async def _serve(seed: str) -> None:
    host = _host(bytes.fromhex(seed))
    host.set_stream_handler(_ECHO, _echo)  # type: ignore[arg-type]
    async with host.run(listen_addrs=[_ANY_PORT]):
        print(host.get_addrs()[0], flush=True)
        await trio.sleep_forever()


@contextlib.contextmanager
def _other_end() -> Iterator[str]:
    command = [sys.executable, "-m", "bench_kit.stock_echo", "01" * 32]
    here = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


async def _times(address: str, count: int) -> list[float]:
    data, times = bytes(BYTES), []
    host = _host(b"\x02" * 32)
    async with host.run(listen_addrs=[_ANY_PORT]):
        peer = info_from_p2p_addr(Multiaddr(address))
        await host.connect(peer)
        stream = await host.new_stream(peer.peer_id, [_ECHO])
        for _ in range(count):
            began = time.perf_counter()
            await stream.write(data)
            assert len(await _read(stream, BYTES)) == BYTES  # type: ignore[arg-type]
            times.append(time.perf_counter() - began)
    return times


def echo_times(count: int, skip: int = 100) -> list[float]:
    """Seconds of `count` round trips, one after the other; `skip` before them warm up."""
    with _other_end() as address:
        return trio.run(_times, address, skip + count)[skip:]


if __name__ == "__main__":
    trio.run(_serve, sys.argv[1])
