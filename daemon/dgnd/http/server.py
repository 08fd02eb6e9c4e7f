"""The HTTP server: an address listened on, at most so many connections, hypercorn's trio worker on each.

Hypercorn's own loop is not used, since it neither bounds connections nor lets go of a client that does not
read when the daemon ends. Knows nothing of what is asked.
"""

from __future__ import annotations

import logging
import socket
from typing import Any, Final, cast

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
from dgnd.http.unread import WholeRequests
from dgnd.metrics.counts import HttpCounts

log = logging.getLogger("dgnd.http")

#: Connections beyond the requests that may run: of clients that keep one open, or just came.
SPARE_CONNECTIONS: Final = 64
KEEP_ALIVE_S: Final = 30.0
_BACKLOG: Final = 128


async def serve_http(
    config: HttpConfig,
    service: Service,
    at_once: int,
    counts: HttpCounts,
    *,
    task_status: trio.TaskStatus[HttpAddress] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves `service` until cancelled; `at_once` answers run at a time. Started with its address.

    Raises ListenFailed, and ConfigError for a file of keys that can't be used.
    """
    keys = None if config.keys_file is None else KeyFile(config.keys_file)
    desk = Desk(service, at_once, config.max_requests, config.conversations, counts)
    app = WholeRequests(make_app(House(desk, Guard(keys), BodyLedger())))
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


class _Link:
    """One connection, and the ASGI application as it has it: knows whether a request runs on it."""

    def __init__(self, stream: trio.SocketStream, app: ASGIFramework) -> None:
        self.stream, self._app = stream, app
        self.running = 0
        self.idle_since = trio.current_time()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        self.running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.running -= 1
            self.idle_since = trio.current_time()

    def close(self) -> None:
        """Ends what reads and writes there, also what hypercorn shields."""
        self.stream.socket.close()


class _Server:
    """Connections of one listener, `most` at once."""

    def __init__(self, app: ASGIFramework, most: int) -> None:
        config = HypercornConfig()
        config.accesslog = None
        config.errorlog = log
        config.keep_alive_timeout = KEEP_ALIVE_S
        config.include_server_header = False
        self._config = config
        self._app = app
        self._context = WorkerContext(None)
        self._most = most
        self._links: set[_Link] = set()

    async def run(self, listener: trio.SocketListener) -> None:
        """Until cancelled; then no connection is left."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._close_at_the_end)
                await trio.serve_listeners(self._connection, [listener], handler_nursery=nursery)
        finally:
            listener.socket.close()

    async def _close_at_the_end(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            for link in self._links:
                link.close()

    def _room(self) -> bool:
        """Whether another connection may be had; of those on which nothing runs, the oldest gives way."""
        if len(self._links) < self._most:
            return True
        idle = [link for link in self._links if not link.running]
        if not idle:
            return False
        oldest = min(idle, key=lambda link: link.idle_since)
        self._links.discard(oldest)
        oldest.close()
        return True

    async def _connection(self, stream: trio.SocketStream) -> None:
        if not self._room():
            log.warning("refused a client of the HTTP API: on %d connections requests run", self._most)
            await trio.aclose_forcefully(stream)
            return
        link = _Link(stream, self._app)
        self._links.add(link)
        app = wrap_app(cast(ASGIFramework, link), self._config.wsgi_max_body_size, "asgi")
        tls_or_not = cast("trio.SSLStream[trio.SocketStream]", stream)  # it looks which
        server = TCPServer(app, self._config, self._context, ConnectionState({}), tls_or_not)
        try:
            await server.run()
        except Exception:  # one connection must not end the daemon
            log.exception("a connection of the HTTP API failed by a fault")
        finally:
            self._links.discard(link)
            link.close()
