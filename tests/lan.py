"""A small network of its own for a test: a namespace for each node, and a switch here between them.

The switch is a thread that passes Ethernet frames on between TAP devices, later, not at all, or now and then
not, as the test says of each pair of nodes. Needs root and /dev/net/tun. Knows nothing of what is sent.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType

_TUN = "/dev/net/tun"
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_DEVICE = "lan0"
_FRAME_BYTES = 65536
_IDLE_S = 0.2


def why_not() -> str:
    """Why there can be no such network here; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.path.exists(_TUN):  # noqa: PTH110 - a device
        return f"there is no {_TUN}"
    trial = f"dgn-{os.getpid()}-trial"  # other processes of pytest ask at the same time
    for what in ("add", "del"):
        try:
            done = subprocess.run(["ip", "netns", what, trial], capture_output=True, text=True, check=False)
        except OSError:
            return "iproute2 is not installed"
        if done.returncode:
            return f"no network namespaces here: {done.stderr.strip()}"
    return ""


@dataclass
class Wire:
    """What becomes of frames between two nodes."""

    delay_s: float = 0.0
    loss: float = 0.0  #: the share of frames that is lost
    cut: bool = False


class Lan:
    """Namespaces and a switch for `names`, addressed 10.77.0.1 and so on. A context manager."""

    def __init__(self, names: Iterable[str], seed: int = 0) -> None:
        self._namespaces = {name: f"dgn-{os.getpid()}-{name}" for name in names}
        self._chance = random.Random(seed)
        self._wires = {frozenset(pair): Wire() for pair in itertools.combinations(self._namespaces, 2)}
        self._ports: dict[int, str] = {}  # by file descriptor
        self._owner: dict[bytes, int] = {}  # of a MAC address, as learnt
        self._under_way: list[tuple[float, int, int, bytes]] = []
        self._numbers = itertools.count()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._switch, name="switch")
        self.addresses = {name: f"10.77.0.{n}" for n, name in enumerate(self._namespaces, 1)}

    def __enter__(self) -> Lan:
        try:
            for name, namespace in self._namespaces.items():
                _ip("netns", "add", namespace)
                self._ports[_tap(namespace)] = name
                _ip("-n", namespace, "link", "set", "lo", "up")
                _ip("-n", namespace, "addr", "add", f"{self.addresses[name]}/24", "dev", _DEVICE)
                _ip("-n", namespace, "link", "set", _DEVICE, "up")
        except BaseException:
            self._remove()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._remove()

    def _remove(self) -> None:
        for port in self._ports:
            os.close(port)
        for namespace in self._namespaces.values():
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)

    def inside(self, name: str) -> list[str]:
        """What to write before a command that is to run at a node."""
        return ["nsenter", f"--net=/run/netns/{self._namespaces[name]}", "--"]

    def namespace(self, name: str) -> str:
        """Of a node, in /run/netns."""
        return self._namespaces[name]

    def wire(self, one: str, other: str) -> Wire:
        """Between two nodes; what is set there counts from now on."""
        return self._wires[frozenset((one, other))]

    def wires(self) -> list[Wire]:
        """All of them."""
        return list(self._wires.values())

    def move(self, name: str, address: str) -> None:
        """The node's address is another one from now on."""
        namespace, old = self._namespaces[name], self.addresses[name]
        _ip("-n", namespace, "addr", "del", f"{old}/24", "dev", _DEVICE)
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", _DEVICE)
        self.addresses[name] = address

    def _switch(self) -> None:
        poll = select.epoll()
        for port in self._ports:
            poll.register(port, select.EPOLLIN)
        with poll:
            while not self._over.is_set():
                due = self._under_way[0][0] - time.monotonic() if self._under_way else _IDLE_S
                for port, _ in poll.poll(min(max(due, 0.0), _IDLE_S)):
                    try:
                        self._take(port, os.read(port, _FRAME_BYTES))
                    except BlockingIOError:
                        pass
                while self._under_way and self._under_way[0][0] <= time.monotonic():
                    _, _, port, frame = heapq.heappop(self._under_way)
                    try:
                        os.write(port, frame)
                    except OSError:
                        pass  # its queue is full: lost, as anywhere

    def _take(self, source: int, frame: bytes) -> None:
        self._owner[frame[6:12]] = source
        known = self._owner.get(frame[:6])
        for port in self._ports if known is None else (known,):
            if port == source:
                continue
            wire = self.wire(self._ports[source], self._ports[port])
            if not wire.cut and self._chance.random() >= wire.loss:
                entry = (time.monotonic() + wire.delay_s, next(self._numbers), port, frame)
                heapq.heappush(self._under_way, entry)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _tap(namespace: str) -> int:
    """A TAP device in the namespace, made by a thread that goes there and ends there."""
    made: list[int] = []

    def make() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        place = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        try:
            if libc.setns(place, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns {namespace}")
        finally:
            os.close(place)
        port = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(port, _TUNSETIFF, struct.pack("16sH22x", _DEVICE.encode(), _IFF_TAP | _IFF_NO_PI))
        made.append(port)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    (port,) = made
    return port
