"""The client's end of the control socket: plain blocking sockets, one object for one connection.

Imports only what `dgnctl` may: no trio, nothing of compute. A generation is a `GenerateStream`, which a
caller that also watches a terminal can poll together with other files.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from dgnd.control import api, jsonrpc
from dgnd.errors import BadRequest, DgnError, NoDaemon, NotReady, ProtocolError, SocketDenied, StaleSocket

CONNECT_TIMEOUT_S: Final = 5.0
CALL_TIMEOUT_S: Final = 60.0
_CHUNK: Final = 64 * 1024


class ControlClient:
    """A connection to dgnd.

    Raises (on creation):
        NoDaemon: there is no socket at the path.
        StaleSocket: there is one, but nobody listens.
        SocketDenied: this user may not use it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = jsonrpc.Lines(4 * jsonrpc.MAX_LINE_BYTES)
        self._next_id = 0
        self._sock = _connect(path)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up, which cancels what runs on this connection. Idempotent."""
        self._sock.close()

    def fileno(self) -> int:
        """Of the socket, for poll."""
        return self._sock.fileno()

    def call(
        self, method: str, params: api.Params | None = None, timeout_s: float | None = CALL_TIMEOUT_S
    ) -> Any:
        """One request and its result, as the type that `api.METHODS` names for it.

        Raises:
            DgnError: what dgnd answered, or NoDaemon when it is gone, or NotReady after `timeout_s`.
        """
        identity = self.send(method, params)
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            message = self.receive(until)
            if isinstance(message, jsonrpc.ErrorResponse) and message.id in (identity, None):
                raise jsonrpc.error_of(message.error)
            if isinstance(message, jsonrpc.Response) and message.id == identity:
                return self.result(method, message)

    def generate(
        self, params: api.GenerateParams, on_delta: Callable[[api.GenerateDelta], object]
    ) -> api.GenerateResult:
        """Generates; `on_delta` gets each piece as it comes. For cancelling and polling use `start_generate`.

        Raises:
            DgnError: what dgnd answered, or NoDaemon when it is gone.
        """
        stream = self.start_generate(params)
        while True:
            for event in stream.wait():
                if isinstance(event, api.GenerateResult):
                    return event
                on_delta(event)

    def start_generate(self, params: api.GenerateParams) -> GenerateStream:
        """Begins a generation."""
        return GenerateStream(self, self.send("generate", params))

    # --- messages

    def send(self, method: str, params: api.Params | None = None) -> int:
        """Sends a request; returns its id.

        Raises:
            BadRequest: a text in it is not valid Unicode.
            NoDaemon: dgnd is gone.
        """
        self._next_id += 1
        try:
            line = jsonrpc.encode_request(self._next_id, method, params or api.NoParams())
        except (UnicodeEncodeError, OverflowError) as error:
            raise BadRequest(f"{method}: what was given can't be sent: {error}") from None
        self._send(line)
        return self._next_id

    def notify(self, method: str, params: api.Params) -> None:
        """Sends what wants no answer."""
        self._send(jsonrpc.encode_notification(method, params))

    def _send(self, line: bytes) -> None:
        try:
            self._sock.sendall(line)
        except OSError as error:
            raise self._gone(error) from None

    def result(self, method: str, message: jsonrpc.Response) -> Any:
        """The typed result of `method`.

        Raises:
            ProtocolError: it is of another shape: dgnd and dgnctl are of different versions.
        """
        try:
            return jsonrpc.read_value(message.result, api.METHODS[method][1], f"the result of {method}")
        except BadRequest as error:
            raise ProtocolError(f"{error}; dgnd may be of another version than dgnctl") from None

    def receive(self, until: float | None = None) -> jsonrpc.Message:
        """The next message; waits until the monotonic time `until`.

        Raises:
            NotReady: nothing came in time.
            NoDaemon: dgnd closed the connection.
            ProtocolError: what came is no message.
        """
        while True:
            if (message := self.poll()) is not None:
                return message
            wait = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._sock], [], [], wait)[0]:
                raise NotReady(f"dgnd at {self.path} does not answer; see its log, or restart it")
            self.fill()

    def poll(self) -> jsonrpc.Message | None:
        """A message that has arrived already, else None.

        Raises:
            ProtocolError: what came is no message.
        """
        line = self._lines.next()
        if line is None:
            return None
        if isinstance(line, jsonrpc.LineTooLong):
            raise ProtocolError(f"dgnd at {self.path} sent a line of more than {line.limit} bytes")
        message = jsonrpc.parse(line)
        if isinstance(message, jsonrpc.Malformed):
            raise ProtocolError(f"{self.path} does not speak dgn's control protocol: {message.error}")
        return message

    def fill(self) -> None:
        """Reads once what has arrived; call when the socket is readable.

        Raises:
            NoDaemon: dgnd closed the connection.
        """
        try:
            data = self._sock.recv(_CHUNK)
        except OSError as error:
            raise self._gone(error) from None
        if not data:
            raise self._gone(None)
        self._lines.receive(data)

    def _gone(self, error: OSError | None) -> NoDaemon:
        why = f" ({error.strerror or error})" if error is not None and error.errno != errno.EPIPE else ""
        return NoDaemon(
            f"dgnd at {self.path} closed the connection{why}: it ended or was restarted; see its log"
        )


class GenerateStream:
    """A generation under way: pieces and then the result, in the order they come."""

    def __init__(self, client: ControlClient, identity: int) -> None:
        self.client = client
        self._identity = identity
        self._error: DgnError | None = None

    def cancel(self) -> None:
        """Asks dgnd to stop; the result still comes, with finish_reason `cancelled`."""
        self.client.notify("cancel", api.CancelParams(request_id=self._identity))

    def wait(self) -> list[api.GenerateDelta | api.GenerateResult]:
        """Blocks until something of it has come. See `read`."""
        while not (events := self.read()):
            self.client.fill()
        return events

    def read(self) -> list[api.GenerateDelta | api.GenerateResult]:
        """What has arrived already, without blocking; a result is the last of all. Call it until it is empty.

        Raises:
            DgnError: what dgnd answered.
        """
        events: list[api.GenerateDelta | api.GenerateResult] = []
        while self._error is None and (message := self.client.poll()) is not None:
            match message:
                case jsonrpc.Notification("generate.delta", raw):
                    delta: api.GenerateDelta = jsonrpc.read_value(raw, api.GenerateDelta, "generate.delta")
                    if delta.request_id == self._identity:
                        events.append(delta)
                case jsonrpc.Response(self._identity, _):
                    events.append(self.client.result("generate", message))
                    break
                case jsonrpc.ErrorResponse(identity, error) if identity in (self._identity, None):
                    self._error = jsonrpc.error_of(error)
                case _:
                    pass  # the answer to an earlier request of this connection that nobody waits for
        if self._error is not None and not events:
            raise self._error
        return events


def _connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(CONNECT_TIMEOUT_S)
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            sock.connect(str(path))
        except OSError as error:
            if isinstance(error, BlockingIOError) and time.monotonic() < deadline:
                time.sleep(0.02)  # many are waiting to be accepted: the kernel's queue is full for a moment
                continue
            sock.close()
            raise _why_not(path, error) from None
        sock.settimeout(None)
        return sock


def _why_not(path: Path, error: OSError) -> DgnError:
    if isinstance(error, PermissionError):
        return SocketDenied(
            f"{path}: this user may not use dgnd's control socket; {_cure(path)}", path=str(path)
        )
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NoDaemon(
            f"no dgnd is running: no socket at {path}; start it with 'dgnd --config FILE'", path=str(path)
        )
    if isinstance(error, TimeoutError | BlockingIOError):
        return NotReady(
            f"dgnd at {path} does not accept connections; see its log, or restart it", path=str(path)
        )
    if isinstance(error, ConnectionRefusedError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116 - it was there a moment ago
            return NoDaemon(
                f"{path} is no socket; name dgnd's socket with --socket or $DGN_SOCKET", path=str(path)
            )
        return StaleSocket(
            f"dgnd has died: {path} is there, but nothing listens; start dgnd again (it replaces the socket)",
            path=str(path),
        )
    return BadRequest(f"{path}: can't be used as dgnd's control socket: {error.strerror or error}")


def _cure(path: Path) -> str:
    """What a user who is refused can do; names the socket's group where it can be seen."""
    import grp

    try:
        group = grp.getgrgid(os.stat(path).st_gid).gr_name  # noqa: PTH116
    except (OSError, KeyError):
        return "ask for membership of its group, or run as the user that dgnd runs as"
    return (
        f"join its group with 'sudo usermod -aG {group} $USER' and log in again, or run as the user of dgnd"
    )
