"""Where Prometheus asks: one page on a loopback address or a Unix socket, and nothing else.

As much of HTTP as that takes: a request is read up to its empty line, answered, and the connection closed. So
metrics need none of the libraries of the HTTP API. A page of a website that has a browser ask, under a name
of its own that leads here, is refused. Knows nothing of what is counted.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import trio

from dgnd.config.http_address import HttpAddress
from dgnd.config.metrics_address import parse_metrics_address
from dgnd.control.listener import control_socket
from dgnd.errors import ListenFailed

log = logging.getLogger("dgnd.metrics")

#: Gives a page and its content type, for what a client takes.
Page = Callable[[str], tuple[bytes, str]]

PATH = "/metrics"
MOST_CONNECTIONS = 8
#: For a whole request, and its answer.
PATIENCE_S = 10.0
HEAD_BYTES = 16 << 10
_BACKLOG = 16


async def serve_metrics(
    listen: str, page: Page, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serves `page` at the address of `[metrics] listen` until cancelled. Started with where it is.

    Raises ListenFailed, ConfigError, AlreadyRunning.
    """
    address = parse_metrics_address(listen)
    with _listening(address) as sock:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
        where = f"unix:{address}" if isinstance(address, Path) else f"http://{_bound(sock)}{PATH}"
        task_status.started(where)
        server = _Server(page, by_address=isinstance(address, HttpAddress))
        await trio.serve_listeners(server.connection, [listener])


@contextlib.contextmanager
def _listening(address: HttpAddress | Path) -> Iterator[socket.socket]:
    if isinstance(address, Path):
        with control_socket(address, what="the socket for metrics") as sock:
            sock.setblocking(False)
            yield sock
        return
    with socket.socket(socket.AF_INET6 if ":" in address.host else socket.AF_INET) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address.host, address.port))
            sock.listen(_BACKLOG)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ListenFailed(
                f"can't listen on {address}: {reason}; [metrics] listen names another address"
            ) from None
        sock.setblocking(False)
        yield sock


def _bound(sock: socket.socket) -> HttpAddress:
    host, port = sock.getsockname()[:2]
    return HttpAddress(host, port)


class _Server:
    def __init__(self, page: Page, *, by_address: bool) -> None:
        self._page = page
        self._by_address = by_address
        self._open: dict[trio.CancelScope, None] = {}  # oldest first

    async def connection(self, stream: trio.SocketStream) -> None:
        """One request and its answer. Of too many connections the oldest gives way."""
        if len(self._open) >= MOST_CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.cancel()
        with trio.move_on_after(PATIENCE_S) as scope:
            self._open[scope] = None
            try:
                async with stream:
                    head = await _head_of(stream)
                    if head is not None:
                        await stream.send_all(self._answer(head))
                        await stream.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                pass  # the client has gone
            finally:
                self._open.pop(scope, None)

    def _answer(self, head: bytes) -> bytes:
        lines = head.decode("latin-1").split("\r\n")
        method, _, rest = lines[0].partition(" ")
        target, _, version = rest.partition(" ")
        if not version.startswith("HTTP/1."):
            return _response("400 Bad Request", "this is HTTP/1.1: GET /metrics HTTP/1.1\n")
        headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines[1:])
        }
        if self._by_address and not _is_here(headers.get("host", "localhost")):
            return _response("403 Forbidden", "only localhost and addresses of this machine are answered\n")
        if target.partition("?")[0] != PATH:
            return _response("404 Not Found", f"there is only {PATH}\n")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "GET it\n", "Allow: GET, HEAD")
        try:
            body, content_type = self._page(headers.get("accept", ""))
        except Exception:  # a fault of ours must not end the daemon
            log.exception("metrics could not be read")
            return _response("500 Internal Server Error", "a fault; see the node's log\n")
        return _response(
            "200 OK", b"" if method == "HEAD" else body, f"Content-Type: {content_type}", len(body)
        )


async def _head_of(stream: trio.SocketStream) -> bytes | None:
    """What comes before the empty line; None where that does not come."""
    head = b""
    while b"\r\n\r\n" not in head:
        data = await stream.receive_some(4096)
        head += data
        if not data or len(head) > HEAD_BYTES:
            return None
    return head.partition(b"\r\n\r\n")[0]


def _response(
    status: str,
    body: bytes | str,
    header: str = "Content-Type: text/plain; charset=utf-8",
    size: int | None = None,
) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    lines = [
        f"HTTP/1.1 {status}",
        header,
        f"Content-Length: {len(data) if size is None else size}",
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(lines).encode("latin-1") + data


def _is_here(host: str) -> bool:
    """Whether a Host header names this machine, and not a website whose name leads here."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False
