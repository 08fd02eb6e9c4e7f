"""The libp2p host: TCP, Noise alone, yamux. Connections with a proven peer id come out; nothing else gets
that far.

It is composed of py-libp2p's parts below its Swarm, because the Swarm brings what must not be here: it
accepts plaintext unless told otherwise, never gives an inbound slot back, ends with the first exception of a
handler, talks identify with every connection, and redials on its own. Knows nothing of streams' contents or
of who is allowed.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.io.exceptions import IOException
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE

from dgnd.errors import IdentityMismatch, PeerGone, PeerRefused
from dgnd.p2p import tcp, yamux
from dgnd.p2p.addresses import Endpoint, endpoint_of
from dgnd.p2p.muxer import MuxedConnection
from dgnd.p2p.negotiate import NotAgreed, accept, propose
from dgnd.p2p.noise import FastSession, Gate, GateClosed, GatedNoise

log = logging.getLogger("dgnd.p2p")

#: Inbound connections that have not proved a peer id yet, of all strangers and of one address.
HALF_OPEN, HALF_OPEN_PER_ADDRESS = 128, 32


@dataclass(eq=False)
class Connection:
    """An encrypted, multiplexed connection with a peer that proved its id."""

    peer_id: str
    dialled: bool  #: by this side
    mux: MuxedConnection
    remote: Endpoint
    local: Endpoint


class Host:
    """Listens and dials.

    `gate` is asked for every inbound peer, `on_refused(peer_id, address, why)` told of refusals.
    """

    def __init__(
        self, seed: bytes, gate: Gate, on_refused: Callable[[str, Endpoint, str], None], handshake_s: float
    ) -> None:
        key_pair = create_new_key_pair(seed)
        self.public_key = key_pair.public_key.serialize()  #: as libp2p writes it
        self.peer_id = ID.from_pubkey(key_pair.public_key).to_base58()
        self._noise = GatedNoise(key_pair, gate)
        self._on_refused = on_refused
        self._handshake_s = handshake_s
        self._listeners: list[trio.SocketListener] = []
        self._half_open: dict[str, int] = {}

    async def listen(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        """Binds every address; returns the real ones (a port 0 becomes a number). Raises ListenFailed."""
        try:
            for endpoint in endpoints:
                self._listeners.append(await tcp.listen(endpoint))
        except BaseException:
            self.close()
            raise
        return [endpoint_of(*listener.socket.getsockname()[:2]) for listener in self._listeners]

    def close(self) -> None:
        """Stops listening."""
        for listener in self._listeners:
            listener.socket.close()
        self._listeners.clear()

    async def serve(self, on_connection: Callable[[Connection], Awaitable[None]]) -> None:
        """Accepts until cancelled; a connection's failure, whatever it is, ends only that connection."""
        handler = partial(self._accepted, on_connection)
        async with trio.open_nursery() as nursery:
            for listener in self._listeners:
                nursery.start_soon(trio.serve_listeners, handler, [listener])

    async def _accepted(
        self, on_connection: Callable[[Connection], Awaitable[None]], stream: trio.SocketStream
    ) -> None:
        channel = tcp.TcpStream(stream)
        try:
            connection = await self._upgrade_inbound(channel)
            if connection is not None:
                await on_connection(connection)
        except Exception:  # one connection must not end the daemon; the log has what is our fault
            log.exception("a connection from %s failed", channel.remote)
        finally:
            channel.close_now()

    async def _upgrade_inbound(self, channel: tcp.TcpStream) -> Connection | None:
        if channel.remote is None or channel.local is None:
            return None
        host = channel.remote[0]
        mine = self._half_open.get(host, 0)
        if mine >= HALF_OPEN_PER_ADDRESS or sum(self._half_open.values()) >= HALF_OPEN:
            log.debug("%s: too many connections that have not finished their handshake", host)
            return None
        self._half_open[host] = mine + 1
        try:
            with trio.move_on_after(self._handshake_s):
                await accept(channel, (str(NOISE),), self._handshake_s)
                session = await self._noise.secure_inbound(RawConnection(channel, initiator=False))
                await accept(session, (yamux.PROTOCOL,), self._handshake_s)
                return _connection(session, channel, dialled=False)
            log.debug("%s: no handshake within %g s", host, self._handshake_s)
        except GateClosed as refused:
            self._on_refused(refused.peer_id, endpoint_of(*channel.remote), refused.reason)
        except Exception as error:  # noqa: BLE001 a stranger's bytes make four libraries raise anything
            log.debug("%s: %s: %s", host, type(error).__name__, error)
        finally:
            self._half_open[host] -= 1
            if not self._half_open[host]:
                del self._half_open[host]
        return None

    async def dial(self, endpoint: Endpoint, peer_id: str, connect_s: float) -> Connection:
        """A connection to the peer.

        Raises PeerGone, IdentityMismatch, or PeerRefused when it hung up knowing who asks.
        """
        channel = await tcp.dial(endpoint, connect_s)
        proved = False
        try:
            with trio.fail_after(self._handshake_s):
                await propose(channel, str(NOISE), self._handshake_s)
                session = await self._noise.secure_outbound(
                    RawConnection(channel, initiator=True), ID.from_base58(peer_id)
                )
                proved = True
                await propose(session, yamux.PROTOCOL, self._handshake_s)
            return _connection(session, channel, dialled=True)
        except BaseException as error:
            channel.close_now()
            if isinstance(error, IdentityMismatch):
                raise IdentityMismatch(f"{endpoint}: {error.message}", **error.data) from error
            if isinstance(error, trio.TooSlowError):
                raise PeerGone(
                    f"{endpoint}: it did not finish the handshake in {self._handshake_s:g} s"
                ) from error
            if proved and isinstance(error, (NotAgreed, IOException)):
                local = channel.local[0] if channel.local else ""
                raise PeerRefused(
                    f"{endpoint}: it closed the connection after the handshake", local=local
                ) from error
            if not isinstance(error, Exception):
                raise
            log.debug("%s: %s: %s", endpoint, type(error).__name__, error)
            raise PeerGone(
                f"{endpoint}: it answers, but not as a libp2p node with Noise; is this dgnd's port?"
            ) from error


def _connection(session: FastSession, channel: tcp.TcpStream, dialled: bool) -> Connection:
    assert channel.remote is not None
    assert channel.local is not None
    return Connection(
        session.get_remote_peer().to_base58(),
        dialled,
        MuxedConnection(session, channel, dialer=dialled),
        endpoint_of(*channel.remote),
        endpoint_of(*channel.local),
    )
