"""TCP as libp2p's upgrade wants it: a stream with bounded reads, listening, and dialling with a reason on
failure.

py-libp2p's own listener sets SO_REUSEPORT, with which a second daemon binds the same port without an error,
and its resolver asks DNS servers directly, passing over the hosts file; so both are done here. Knows nothing
of peers.
"""

from __future__ import annotations

import errno
import os
import socket

import trio
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError

from dgnd.eager import write_now
from dgnd.errors import ListenFailed, PeerGone
from dgnd.p2p.addresses import Endpoint

#: Most bytes of one read: also what a length that a stranger announces can make us reserve.
READ_SIZE = 256 * 1024
BACKLOG = 128

#: Where the bytes of all connections arrive, to be copied out at once.
_arrived = memoryview(bytearray(READ_SIZE))


class TcpStream(ReadWriteCloser):
    """One TCP connection. Reads and writes raise ConnectionClosedError when it is over."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self.remote = _name(stream, "getpeername")
        self.local = _name(stream, "getsockname")

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes; none at the end."""
        sock = self._stream.socket
        most = READ_SIZE if n is None else min(n, READ_SIZE)
        while sock.fileno() >= 0:
            try:
                # Waits first: all that had come was read before, so to try would only fail.
                await trio.lowlevel.wait_readable(sock)
                size = os.readv(sock.fileno(), [_arrived[:most]])
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError) as error:
                raise ConnectionClosedError(f"connection lost: {error}", transport="tcp") from error
            return bytes(_arrived[:size])
        raise ConnectionClosedError("connection lost: closed here", transport="tcp")

    async def write(self, data: bytes) -> None:
        """Sends everything."""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(
                f"connection lost: {error.__cause__ or error}", transport="tcp"
            ) from error

    def write_now(self, data: bytes) -> int:
        """How much of `data` is sent at once, while no `write` is under way."""
        try:
            return write_now(self._stream.socket.fileno(), data)
        except OSError as error:
            raise ConnectionClosedError(f"connection lost: {error}", transport="tcp") from error

    async def finish(self) -> None:
        """Nothing more will be sent; what is under way still arrives."""
        try:
            await self._stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
            pass  # it is being closed anyway

    def close_now(self) -> None:
        """Closes without waiting; pending reads and writes end."""
        self._stream.socket.close()

    async def close(self) -> None:
        """Closes."""
        self.close_now()
        await trio.lowlevel.checkpoint()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Host and port of the other end."""
        return self.remote


def _name(stream: trio.SocketStream, which: str) -> tuple[str, int] | None:
    try:
        host, port = getattr(stream.socket, which)()[:2]
    except OSError:  # it was reset before we looked
        return None
    return str(host), int(port)


async def listen(endpoint: Endpoint) -> trio.SocketListener:
    """A listening socket; the port can be bound again at once after an end. Raises ListenFailed."""
    family = socket.AF_INET6 if endpoint.kind == "ip6" else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        await sock.bind((endpoint.host, endpoint.port))
        sock.listen(BACKLOG)
        return trio.SocketListener(sock)
    except OSError as error:
        sock.close()
        raise ListenFailed(f"can't listen on {endpoint}: {_why_not_bound(error)}") from error


def _why_not_bound(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "another process has this port; end it, or give another port in [node] listen"
        case errno.EADDRNOTAVAIL:
            return "this machine has no such address; use one of its own, or 0.0.0.0, in [node] listen"
        case errno.EACCES:
            return "ports below 1024 need privileges; give a higher port in [node] listen"
    return f"{error.strerror or error}; change [node] listen"


async def dial(endpoint: Endpoint, timeout_s: float) -> TcpStream:
    """A connection to the first address of the endpoint that answers.

    Raises PeerGone saying why there is none.
    """
    family = {"ip6": socket.AF_INET6, "dns6": socket.AF_INET6, "dns": socket.AF_UNSPEC}.get(
        endpoint.kind, socket.AF_INET
    )
    why = "it has no address"
    with trio.move_on_after(timeout_s) as scope:
        try:
            found = await trio.socket.getaddrinfo(endpoint.host, endpoint.port, family, socket.SOCK_STREAM)
        except OSError as error:
            raise PeerGone(
                f"{endpoint}: the name {endpoint.host} can't be resolved ({error.strerror})"
            ) from error
        for family_, kind, proto, _, address in found:
            sock = trio.socket.socket(family_, kind, proto)
            try:
                await sock.connect(address)
                return TcpStream(trio.SocketStream(sock))
            except OSError as error:
                sock.close()
                why = _why_not_reached(error)
            except BaseException:
                sock.close()
                raise
    if scope.cancelled_caught:
        why = (
            f"no answer within {timeout_s:g} s: is the machine on, "
            f"and does its firewall let port {endpoint.port} in?"
        )
    raise PeerGone(f"{endpoint}: {why}")


def _why_not_reached(error: OSError) -> str:
    if error.errno == errno.ECONNREFUSED:
        return "connection refused: nothing listens there; is dgnd running, and is this its port?"
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return f"no way to it from this machine ({error.strerror}): is it on, and on a network in reach?"
    return str(error.strerror or error)
