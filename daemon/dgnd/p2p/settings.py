"""What the peer network is given, and what it tells. Values and callbacks only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import trio

from dgnd.wire.limits import DEFAULT_LIMITS, Limits
from dgnd.wire.messages import Frame, Hello

PeerStatus = Literal["connected", "connecting", "refused", "unreachable"]


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """Settings of the peer network; `listen` holds multiaddresses."""

    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/4001",)
    name: str = "node"
    software: str = "dgnd"
    connect_s: float = 10.0  #: for TCP to answer
    handshake_s: float = 10.0  #: from there to a proven peer id, and from there to its Hello
    ping_s: float = 2.0
    gone_s: float = 6.0  #: without any byte from a peer: it is gone
    first_delay_s: float = 0.2  #: before the first reconnect
    last_delay_s: float = 15.0
    goodbye_s: float = 0.5  #: to tell every peer, at the end
    last_seen: Path | None = None  #: the file that keeps where peers were last seen
    limits: Limits = DEFAULT_LIMITS


@dataclass(slots=True)
class NetworkHandlers:
    """Called by the network; none may block or await.

    `hello` says what to tell peers now (`versions`, `name` and `software` included). `on_frame` gets every
    frame but Ping, Pong, Hello and Goodbye, between `on_up` and `on_down` of its peer.
    """

    hello: Callable[[], Hello]
    on_frame: Callable[[str, Frame], None]
    on_up: Callable[[str, Hello], None]
    on_down: Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class PeerState:
    """One known peer as it is now. `detail` says in one line why it is not connected."""

    id: str
    name: str
    state: PeerStatus
    addrs: tuple[str, ...] = ()
    rtt_ms: float | None = None
    hello: Hello | None = None  #: the last one, with the offers that followed it
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RefusalRecord:
    """An inbound peer that was not let in; `when` is UTC in ISO 8601."""

    id: str
    addr: str
    when: str
    reason: str


@dataclass(slots=True)
class Known:
    """A peer that may connect, and how its connection is doing. The network's own bookkeeping."""

    id: str
    name: str
    addrs: tuple[str, ...] = ()
    keep_connected: bool = True
    named: bool = True  #: else `name` is the address that was dialled last
    held: bool = False  #: disconnected by the operator: neither dialled nor let in
    state: PeerStatus = "connecting"
    detail: str = "not tried yet"
    came_up: trio.Event = field(default_factory=trio.Event)  #: set and replaced each time
    hello: Hello | None = None
