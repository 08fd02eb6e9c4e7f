"""The client's end of the control socket: plain blocking sockets, one object for one connection.

Imports only what `dgnctl` may: no trio, nothing of compute. A generation is a `GenerateStream`, which a
caller that also watches a terminal can poll together with other files. A request may take as long as it
takes, but a daemon that gives no sign of life meanwhile is not waited for: see `left_s` and `lapse`.
"""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from dgnd.control import api, jsonrpc
from dgnd.control.connecting import connect, silent
from dgnd.errors import BadRequest, DgnError, NoDaemon, NotReady, ProtocolError

CALL_TIMEOUT_S: Final = 60.0
#: After so long without a byte dgnd is asked for its status, which takes it no time, whatever else it does.
PROBE_AFTER_S: Final = 5.0
#: After so much longer it is given up: it is stopped, or hangs.
PROBE_S: Final = 10.0
_CHUNK: Final = 64 * 1024


class ControlClient:
    """A connection to dgnd.

    Raises (on creation):
        NoDaemon: there is no socket at the path.
        StaleSocket: there is one, but nobody listens.
        SocketDenied: this user may not use it.
        DaemonSilent: it accepts nobody.

    Raises (later): DaemonSilent, wherever dgnd is sent something or waited for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = jsonrpc.Lines(4 * jsonrpc.MAX_LINE_BYTES)
        self._next_id = 0
        self._sock = connect(path)
        self._sock.settimeout(PROBE_AFTER_S + PROBE_S)  # for a daemon that reads nothing
        self._probed = False
        self._until = 0.0
        self._wait_anew()

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
            BadRequest: a text in it is not valid Unicode, or it is longer than dgnd reads.
            NoDaemon: dgnd is gone.
        """
        self._next_id += 1
        try:
            line = jsonrpc.encode_request(self._next_id, method, params or api.NoParams())
        except (UnicodeEncodeError, OverflowError) as error:
            raise BadRequest(f"{method}: what was given can't be sent: {error}") from None
        if len(line) > jsonrpc.MAX_REQUEST_BYTES:
            limit = f"dgnd reads at most {jsonrpc.MAX_REQUEST_BYTES:,} at once"
            raise BadRequest(f"{method}: what was given takes {len(line):,} bytes, and {limit}; give less")
        self._send(line)
        self._wait_anew()
        return self._next_id

    def notify(self, method: str, params: api.Params) -> None:
        """Sends what wants no answer."""
        self._send(jsonrpc.encode_notification(method, params))

    def _send(self, line: bytes) -> None:
        try:
            self._sock.sendall(line)
        except TimeoutError:
            raise silent(self.path) from None
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
            NotReady: nothing came in time, though dgnd lives.
            NoDaemon: dgnd closed the connection.
            ProtocolError: what came is no message.
        """
        while True:
            if (message := self.poll()) is not None:
                return message
            self.wait(until)

    def wait(self, until: float | None = None) -> None:
        """Reads once what arrives until then. See `receive`."""
        wait = self.left_s() if until is None else min(self.left_s(), max(0.0, until - time.monotonic()))
        if select.select([self._sock], [], [], wait)[0]:
            self.fill()
        elif until is not None and time.monotonic() >= until:
            raise NotReady(f"dgnd at {self.path} did not answer in time; see its log, or try again")
        else:
            self.lapse()

    def left_s(self) -> float:
        """Seconds for which dgnd may say nothing before `lapse` is to be called."""
        return max(0.0, self._until - time.monotonic())

    def lapse(self) -> None:
        """To be called where nothing came for `left_s`: asks for a sign of life, or gives up.

        Raises:
            DaemonSilent: there was none.
            NoDaemon: dgnd is gone.
        """
        if self._probed:
            raise silent(self.path)
        self.send("status")  # its answer is nobody's, and passed over
        self._probed, self._until = True, time.monotonic() + PROBE_S

    def _wait_anew(self) -> None:
        self._probed, self._until = False, time.monotonic() + PROBE_AFTER_S

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
        self._wait_anew()
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
            self.client.wait()
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
