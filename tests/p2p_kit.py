"""Peer networks on loopback for tests: started, watched, and always shut down."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from dgnd.identity import Identity
from dgnd.p2p.network import PeerNetwork
from dgnd.p2p.settings import NetworkHandlers, NetworkSettings
from dgnd.wire.codec import PROTOCOL_VERSIONS
from dgnd.wire.messages import Frame, Hello

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@dataclass
class Node:
    """One network and everything that it told."""

    name: str
    identity: Identity = field(default_factory=Identity.generate)
    listen: tuple[str, ...] = LOOPBACK
    settings: dict[str, object] = field(default_factory=dict)
    frames: list[tuple[str, Frame]] = field(default_factory=list)
    ups: list[tuple[str, Hello]] = field(default_factory=list)
    downs: list[tuple[str, str]] = field(default_factory=list)
    on_frame: Callable[[str, Frame], None] | None = None
    said: Hello | None = None

    def __post_init__(self) -> None:
        handlers = NetworkHandlers(
            self.hello, self._frame, lambda *up: self.ups.append(up), lambda *down: self.downs.append(down)
        )
        settings = NetworkSettings(listen=self.listen, name=self.name, **self.settings)  # type: ignore[arg-type]
        self.network = PeerNetwork(self.identity, settings, handlers)

    @property
    def id(self) -> str:
        return self.identity.peer_id

    @property
    def address(self) -> str:
        return self.network.listen_addrs()[0]

    def hello(self) -> Hello:
        return self.said or Hello(versions=PROTOCOL_VERSIONS, software="test", name=self.name)

    def _frame(self, peer: str, frame: Frame) -> None:
        self.frames.append((peer, frame))
        if self.on_frame is not None:
            self.on_frame(peer, frame)

    def state(self, peer: str) -> str:
        return next(state.state for state in self.network.peers() if state.id == peer)

    def detail(self, peer: str) -> str:
        return next(state.detail for state in self.network.peers() if state.id == peer)


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    """The nodes' networks run inside."""
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.network.run)
        yield
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object], within_s: float = 30.0) -> None:
    """Waits for something that other tasks bring about; fails after a while."""
    with trio.fail_after(within_s):
        while not condition():  # noqa: ASYNC110 what it waits for has no event of its own
            await trio.sleep(0.005)


async def for_ever(action: Callable[[], Awaitable[object]]) -> None:
    """Until it raises."""
    while True:
        await action()


async def pair(a: Node, b: Node) -> None:
    """`a` dials `b`; both are up afterwards."""
    b.network.allow(a.id, a.name, keep_connected=False)
    a.network.allow(b.id, b.name, (b.address,))
    await until(lambda: a.network.is_up(b.id) and b.network.is_up(a.id))


class Child:
    """A network in another process (see p2p_child.py), to be stopped, continued and killed."""

    def __init__(self, allowed: str, listen: str = LOOPBACK[0], address: str = "") -> None:
        self.identity = Identity.generate()
        here = Path(__file__).resolve().parent
        self._arguments = [self.identity.seed.hex(), listen, allowed, address]
        self._command = [sys.executable, str(here / "p2p_child.py")]
        roots = [str(here), str(here.parent / "daemon"), str(here.parent / "backends")]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(roots)}
        self.start()

    def start(self) -> None:
        """Starts it, and waits until it listens; again after `kill`, on the same port."""
        self.process = subprocess.Popen(
            [*self._command, *self._arguments], env=self._environment, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, "the child did not start"
        self._arguments[1] = self.address.partition("/p2p/")[0]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def child(*arguments: str) -> Iterator[Child]:
    """A Child that is killed at the end, also when stopped."""
    process = Child(*arguments)
    try:
        yield process
    finally:
        process.kill()
