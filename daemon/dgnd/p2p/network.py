"""The peer network: who may connect, who is connected, and frames to and from them. The facade of this
package.

Knows nothing of what frames mean, nor of the configuration file. A send to this node's own id is the caller's
affair.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import trio

from dgnd.errors import BadRequest, IdentityMismatch, NotFound, PeerGone
from dgnd.identity import Identity
from dgnd.p2p import addresses
from dgnd.p2p.addresses import Endpoint, endpoint_of
from dgnd.p2p.dialer import Dialer
from dgnd.p2p.heartbeat import NUDGE_S
from dgnd.p2p.host import Connection, Host
from dgnd.p2p.last_seen import PER_PEER, LastSeen
from dgnd.p2p.link import Link
from dgnd.p2p.logs import quieten_libraries
from dgnd.p2p.negotiate import BULK, CONTROL
from dgnd.p2p.refusals import Refusals
from dgnd.p2p.settings import Known, NetworkHandlers, NetworkSettings, PeerState, PeerStatus, RefusalRecord
from dgnd.p2p.standard import IDENTIFY, PING, identify_message
from dgnd.wire.messages import Frame, Hello

if TYPE_CHECKING:
    from trio_typing import TaskStatus

log = logging.getLogger("dgnd.p2p")

#: Connections of one allowed peer at the same time: one that is used, and ones that are being greeted.
CONNECTIONS_PER_PEER = 4


class PeerNetwork:
    """Connections to peers that were allowed, kept for as long as `run` runs."""

    def __init__(self, identity: Identity, settings: NetworkSettings, handlers: NetworkHandlers) -> None:
        quieten_libraries()
        self._me = identity.peer_id
        self._settings = settings
        self._handlers = handlers
        self._host = Host(identity.seed, self._gate, self._refused, settings.handshake_s)
        self._known: dict[str, Known] = {}
        self._links: dict[str, Link] = {}  # the one of each peer that was chosen
        self._open: dict[str, int] = {}
        self._last_seen = LastSeen(settings.last_seen)
        self._dialer = Dialer(self._host, settings, self._me, self._links, self._start, self._last_seen)
        self._refusals = Refusals()
        self._listening: list[Endpoint] = []
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listens and keeps connections until cancelled.

        Started once listening. Raises ListenFailed, BadRequest.
        """
        endpoints = [addresses.parse(text)[0] for text in self._settings.listen]
        self._listening = await self._host.listen(endpoints)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._dialer.started(nursery, self._listening)
                for known in self._known.values():
                    self._dialer.keep(known)
                nursery.start_soon(self._last_seen.keep)
                nursery.start_soon(self._host.serve, self._accepted)
                for address in self.listen_addrs():
                    log.info("listening on %s", address)
                task_status.started()
        finally:
            self._nursery = None
            self._dialer.stopped()
            self._host.close()

    # --- who may connect

    def allow(
        self, peer_id: str, name: str, addrs: tuple[str, ...] = (), keep_connected: bool = True
    ) -> None:
        """Lets a peer in.

        With `keep_connected` it is dialled, and again whenever it is lost. Raises BadRequest.
        """
        if peer_id == self._me:
            raise BadRequest(f"{peer_id} is this node itself")
        for text in addrs:
            _, named = addresses.parse(text)
            if named not in (None, peer_id):
                raise BadRequest(f"{text} names another peer than {peer_id}")
        known = self._known.get(peer_id)
        if known is None:
            known = self._known[peer_id] = Known(peer_id, name)
        known.name, known.named, known.addrs = name, True, addrs
        known.keep_connected, known.held = keep_connected, False
        self._refusals.forget(peer_id)
        self._dialer.keep(known)

    def disallow(self, peer_id: str) -> None:
        """Lets a peer in no more, and closes its connection."""
        if self._known.pop(peer_id, None) is not None:
            self._last_seen.forget(peer_id)
            self._let_go(peer_id, "not allowed any more")

    async def connect(self, multiaddr: str) -> str:
        """Dials an address that ends in /p2p/ID; that peer is let in from now on, whether or not it answers.

        Where the peer is connected already nothing is dialled, and the address, unproven, is not kept.

        Returns its peer id after Hello. Raises BadRequest, PeerGone, PeerRefused, IdentityMismatch.
        """
        endpoint, peer_id = addresses.parse(multiaddr)
        if peer_id is None:
            raise BadRequest(
                f"{multiaddr} does not say whom to expect; add /p2p/PEER-ID (dgnctl status shows it there)"
            )
        if peer_id == self._me:
            raise BadRequest(f"{peer_id} is this node itself")
        known = self._known.get(peer_id)
        if known is None:
            known = self._known[peer_id] = Known(peer_id, "", keep_connected=False, named=False)
        known.held = False
        self._refusals.forget(peer_id)
        if not self.is_up(peer_id):
            if not known.named:
                known.name = f"{endpoint.host}:{endpoint.port}"
            try:
                await self._dialer.dial(known, [endpoint])
            except IdentityMismatch:
                if not known.addrs and not known.keep_connected:
                    del self._known[peer_id]  # a mistyped id must not stay on the list
                raise
            if str(endpoint) not in [str(addresses.parse(text)[0]) for text in known.addrs]:
                known.addrs = (*known.addrs, str(endpoint))
        known.keep_connected = True
        self._dialer.keep(known)
        return peer_id

    async def disconnect(self, peer_id: str) -> None:
        """Closes the connection.

        The peer is neither dialled nor let in until `connect` or `allow`. Raises NotFound.
        """
        known = self._known.get(peer_id)
        if known is None:
            raise NotFound(f"no peer {peer_id}")
        known.held = True
        self._let_go(peer_id, "disconnected by the operator")
        known.state, known.detail = (
            "unreachable",
            "disconnected here by the operator; dgnctl connect brings it back",
        )
        await trio.lowlevel.checkpoint()

    def _let_go(self, peer_id: str, reason: str) -> None:
        self._dialer.leave(peer_id)
        link = self._links.get(peer_id)
        if link is not None and self._nursery is not None:
            link.fail(PeerGone(reason), close=False)
            self._nursery.start_soon(link.say_goodbye, reason)

    def _gate(self, peer_id: str, address: str) -> str | None:
        known = self._known.get(peer_id)
        if known is None:
            return (
                "it has this node's own identity"
                if peer_id == self._me
                else "not in this node's configuration"
            )
        if known.held:
            return "disconnected here by the operator"
        if self._open.get(peer_id, 0) >= CONNECTIONS_PER_PEER:
            return f"it has {CONNECTIONS_PER_PEER} connections already"
        return None

    def _refused(self, peer_id: str, endpoint: Endpoint, reason: str) -> None:
        if self._refusals.add(peer_id, str(endpoint), reason):
            log.info("refused %s from %s: %s", peer_id, endpoint, reason)

    # --- what is known

    def is_allowed(self, peer_id: str) -> bool:
        """Whether the peer may connect now."""
        known = self._known.get(peer_id)
        return known is not None and not known.held

    def is_up(self, peer_id: str) -> bool:
        """Whether frames can be sent to the peer now."""
        link = self._links.get(peer_id)
        return link is not None and link.is_up

    def peers(self) -> list[PeerState]:
        """Every allowed peer as it is now."""
        return [self._state(known) for known in self._known.values()]

    def _state(self, known: Known) -> PeerState:
        state = PeerState(known.id, known.name, known.state, known.addrs, None, known.hello, known.detail)
        link = self._links.get(known.id)
        if link is None or not link.is_up:
            return state
        rtt_ms = None if link.heartbeat.rtt_s is None else round(link.heartbeat.rtt_s * 1000, 3)
        return replace(state, state="connected", rtt_ms=rtt_ms, hello=link.hello, detail="")

    def round_trips(self) -> dict[str, float]:
        """Round trips to connected peers in ms, as far as they are measured."""
        trips = {link.peer_id: link.heartbeat.rtt_s for link in self._links.values() if link.is_up}
        return {peer: trip * 1000 for peer, trip in trips.items() if trip is not None}

    def trip_s(self, peer_id: str) -> float | None:
        """The round trip to a peer in seconds, as last measured."""
        link = self._links.get(peer_id)
        return None if link is None else link.heartbeat.rtt_s

    def refused(self) -> int:
        """How many inbound connections were not let in."""
        return self._refusals.total

    def refusals(self) -> list[RefusalRecord]:
        """The last inbound peers that were not let in, oldest first."""
        return self._refusals.list()

    def listen_addrs(self) -> list[str]:
        """The addresses that this node can be dialled at, with /p2p/ID."""
        return [f"{real}/p2p/{self._me}" for real in self._dialled_at()]

    def _dialled_at(self) -> list[Endpoint]:
        return [real for bound in self._listening for real in addresses.expanded(bound)]

    # --- frames

    def send_now(self, peer_id: str, frame: Frame, bulk: bool) -> bool:
        """As `send`, where nothing has to be waited for; else False, and nothing is sent. Raises
        ProtocolError."""
        link = self._links.get(peer_id)
        return link is not None and link.send_now(frame, bulk)

    async def send(self, peer_id: str, frame: Frame, *, bulk: bool = False) -> None:
        """Sends a frame; `bulk` is for what may wait (prefill), and is passed by what is not.

        Frames of one class stay in order. A frame once begun is sent to its end, also when cancelled. Raises
        PeerGone, and ProtocolError for a frame against the protocol's limits.
        """
        link = self._links.get(peer_id)
        known = self._known.get(peer_id)
        name = known.name if known else peer_id
        if link is None or not link.is_up:
            raise PeerGone(f"{name} is not connected", peer=peer_id)
        try:
            await link.send(frame, bulk)
        except PeerGone as error:
            raise PeerGone(f"the connection to {name} ended: {error.message}", peer=peer_id) from error

    def nudge(self, peer_id: str) -> None:
        """An answer waits for the peer: if it gives no sign of life soon, it is gone."""
        link = self._links.get(peer_id)
        if link is not None:
            link.nudge()

    def patience_s(self, peer_id: str) -> float:
        """How long a sign of life from the peer may take when it is asked for."""
        link = self._links.get(peer_id)
        return NUDGE_S if link is None else link.heartbeat.patience_s

    def announce(self) -> None:
        """What Hello says has changed: tells every connected peer."""
        now = self.hello()
        for link in self._links.values():
            if link.is_up:
                link.say(now.update)

    # --- for links

    def hello(self) -> Hello:
        """What this node says of itself now."""
        ports = tuple(dict.fromkeys(bound.port for bound in self._listening))
        return msgspec.structs.replace(self._handlers.hello(), ports=ports)

    def identify(self, link: Link) -> bytes:
        """What libp2p's identify says now."""
        return identify_message(
            self._host.public_key,
            self._settings.software,
            self._dialled_at(),
            link.connection.remote,
            (CONTROL, BULK, PING, IDENTIFY),
        )

    def admits(self, link: Link) -> bool:
        """Whether the peer may still connect."""
        return self.is_allowed(link.peer_id)

    async def choose(self, link: Link) -> bool:
        """Whether `link` becomes the peer's connection; not while another one answers."""
        while (current := self._links.get(link.peer_id)) is not None:
            if not current.is_up or await current.heartbeat.probe():
                return False
            current.fail(PeerGone("replaced by a newer connection"))
        if link.error is not None or not self.admits(link):
            return False
        self._links[link.peer_id] = link
        return True

    def up(self, link: Link) -> None:
        """Hello went both ways."""
        old = self._links.get(link.peer_id)
        if old is not None and old is not link:
            old.fail(PeerGone("replaced by a newer connection"))
        self._links[link.peer_id] = link
        known = self._known.get(link.peer_id)
        assert link.hello is not None
        if known is not None:
            known.hello, known.state, known.detail = link.hello, "connected", ""
            known.came_up.set()
            known.came_up = trio.Event()
            self._last_seen.note(link.peer_id, _dialable(link))
        how = "dialled" if link.connection.dialled else "accepted"
        log.info("%s is connected (%s, %s)", self._name(link), how, link.connection.remote)
        try:
            self._handlers.on_up(link.peer_id, link.hello)
        except Exception:  # a fault of ours must not end the peer's connection
            log.exception("%s: on_up failed", link.peer_id)

    def down(self, link: Link) -> None:
        """The link has ended."""
        if self._links.get(link.peer_id) is link:
            del self._links[link.peer_id]
        if not link.was_up:
            return
        reason = link.error.message if link.error else "closed"
        known = self._known.get(link.peer_id)
        if known is not None:
            state: PeerStatus = "connecting" if known.keep_connected and not known.held else "unreachable"
            known.hello, known.state, known.detail = link.hello, state, reason
        log.info("%s is gone: %s", self._name(link), reason)
        try:
            self._handlers.on_down(link.peer_id, reason)
        except Exception:  # a fault of ours must not end the network
            log.exception("%s: on_down failed", link.peer_id)

    def frame(self, link: Link, frame: Frame) -> None:
        """A frame has arrived."""
        self._handlers.on_frame(link.peer_id, frame)

    def _name(self, link: Link) -> str:
        known = self._known.get(link.peer_id)
        return f"{known.name} ({link.peer_id})" if known else link.peer_id

    # --- connections

    async def _accepted(self, connection: Connection) -> None:
        await self._serve(Link(connection, self._me, self._settings, self))

    def _start(self, connection: Connection) -> Link:
        link = Link(connection, self._me, self._settings, self)
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, link)
        return link

    async def _serve(self, link: Link) -> None:
        self._open[link.peer_id] = self._open.get(link.peer_id, 0) + 1
        try:
            await link.run()
        except Exception:  # one connection must not end the others
            log.exception("the connection to %s failed", link.peer_id)
        finally:
            self._open[link.peer_id] -= 1
            if not self._open[link.peer_id]:
                del self._open[link.peer_id]


def _dialable(link: Link) -> list[Endpoint]:
    """Where the peer of a connection can be dialled: there, or at the ports that it says to listen on."""
    remote = link.connection.remote
    if link.connection.dialled:
        return [remote]
    ports = link.hello.ports if link.hello is not None else ()
    return [endpoint_of(remote.host, port) for port in ports[:PER_PEER] if 0 < port < 1 << 16]
