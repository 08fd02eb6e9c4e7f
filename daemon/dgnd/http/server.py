"""The HTTP server: an address listened on, at most so many connections, hypercorn's trio worker on each.

Hypercorn's own loop is not used, since it neither bounds connections nor lets go of a client that does not
read when the daemon ends. Knows nothing of what is asked.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, cast

import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ASGIFramework, ConnectionState
from hypercorn.utils import wrap_app

from dgnd.config.http_address import HttpAddress, parse_http_address
from dgnd.config.schema import HttpConfig
from dgnd.errors import ListenFailed
from dgnd.http.app import make_app
from dgnd.http.bodies import BodyLedger
from dgnd.http.desk import Desk, Service
from dgnd.http.forms import House
from dgnd.http.guards import Guard
from dgnd.http.keys import KeyFile

log = logging.getLogger("dgnd.http")

#: Connections beyond the requests that may run: of clients that keep one open, or just came.
SPARE_CONNECTIONS: Final = 64
KEEP_ALIVE_S: Final = 30.0
_BACKLOG: Final = 128


async def serve_http(
    config: HttpConfig,
    service: Service,
    at_once: int,
    *,
    task_status: trio.TaskStatus[HttpAddress] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves `service` until cancelled; `at_once` answers run at a time. Started with its address.

    Raises ListenFailed, and ConfigError for a file of keys that can't be used.
    """
    keys = None if config.keys_file is None else KeyFile(config.keys_file)
    desk = Desk(service, at_once, config.max_requests)
    app = make_app(House(desk, Guard(keys), BodyLedger()))
    listener = trio.SocketListener(_listen(parse_http_address(config.listen)))
    host, port = listener.socket.getsockname()[:2]
    task_status.started(HttpAddress(host, port))
    framework = cast(ASGIFramework, app)  # hypercorn names the types of each message, starlette does not
    await _Server(framework, config.max_requests + SPARE_CONNECTIONS).run(listener)


def _listen(address: HttpAddress) -> trio.socket.SocketType:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address.host, address.port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        reason = error.strerror or str(error)
        raise ListenFailed(
            f"can't listen on {address}: {reason}; [http] listen names another address"
        ) from None
    return trio.socket.from_stdlib_socket(sock)


class _Server:
    """Connections of one listener."""

    def __init__(self, app: ASGIFramework, most: int) -> None:
        config = HypercornConfig()
        config.accesslog = None
        config.errorlog = log
        config.keep_alive_timeout = KEEP_ALIVE_S
        config.include_server_header = False
        self._config = config
        self._app = wrap_app(app, config.wsgi_max_body_size, "asgi")
        self._context = WorkerContext(None)
        self._most = most
        self._open: set[trio.SocketStream] = set()

    async def run(self, listener: trio.SocketListener) -> None:
        """Until cancelled; then no connection is left."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._close_at_the_end)
                await trio.serve_listeners(self._connection, [listener], handler_nursery=nursery)
        finally:
            listener.socket.close()

    async def _close_at_the_end(self) -> None:
        """Hypercorn shields what it sends; closed sockets end that too."""
        try:
            await trio.sleep_forever()
        finally:
            for stream in self._open:
                stream.socket.close()

    async def _connection(self, stream: trio.SocketStream) -> None:
        if len(self._open) >= self._most:
            log.warning("refused a client of the HTTP API: %d are connected", len(self._open))
            await trio.aclose_forcefully(stream)
            return
        with self._held(stream):
            tls_or_not = cast("trio.SSLStream[trio.SocketStream]", stream)  # it looks which
            server = TCPServer(self._app, self._config, self._context, ConnectionState({}), tls_or_not)
            try:
                await server.run()
            except Exception:  # one connection must not end the daemon
                log.exception("a connection of the HTTP API failed by a fault")
            finally:
                stream.socket.close()

    @contextmanager
    def _held(self, stream: trio.SocketStream) -> Iterator[None]:
        self._open.add(stream)
        try:
            yield
        finally:
            self._open.discard(stream)
