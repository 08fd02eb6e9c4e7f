"""When to dial again, and what to tell who was refused. No tasks, no sockets."""

from __future__ import annotations

import random

from dgnd.p2p.addresses import Endpoint, endpoint_of

_GROWTH = 1.7


class Backoff:
    """Growing delays in seconds, each within a quarter of its value at random, so that nodes don't dial in step."""

    def __init__(self, first_s: float, last_s: float) -> None:
        self._first_s = first_s
        self._last_s = last_s
        self._next_s = first_s

    def next(self) -> float:
        """The delay before the next attempt."""
        delay = self._next_s
        self._next_s = min(delay * _GROWTH, self._last_s)
        return delay * random.uniform(0.75, 1.25)

    def reset(self) -> None:
        """It worked: begin again with the shortest."""
        self._next_s = self._first_s


def refused_line(name: str, local_host: str, listening: list[Endpoint], me: str) -> str:
    """What to do when `name` hung up on us: we were reached from it at `local_host`, and listen on `listening`."""
    kind = "ip6" if ":" in local_host else "ip4"
    ports = [
        bound.port
        for bound in listening
        if bound.kind == kind and bound.host in (local_host, "0.0.0.0", "::")
    ]
    if local_host and ports:
        address = str(endpoint_of(local_host, ports[0]))
    else:
        address = str(listening[0]) if listening else "/ip4/THIS-NODE/tcp/PORT"
    return (
        f"{name} closed the connection: it probably doesn't list this node; "
        f"run there: dgnctl connect {address}/p2p/{me}"
    )
