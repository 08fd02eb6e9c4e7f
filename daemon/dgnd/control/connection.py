"""One client of the control socket. Its requests run concurrently, and end when it hangs up.

Two tasks, one that reads and one that writes, and one for each request. What is to be sent is in a buffer.
While a client leaves too much of it unread, its answers pause where they are, and then nothing more is read
from it, so that its slowness costs nobody else anything. Knows nothing of how a method is carried out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Final

import trio

from dgnd.control import api, jsonrpc
from dgnd.control.checks import check_generate, check_session
from dgnd.control.hangup import gone
from dgnd.control.service import ControlService, call
from dgnd.control.ties import Ties
from dgnd.errors import (
    BadRequest,
    Cancelled,
    DgnError,
    InternalError,
    InvalidRequest,
    MethodNotFound,
    NoRoomNow,
    ShuttingDown,
)

log = logging.getLogger("dgnd.control")

ANSWER_WAITS_BYTES: Final = 64 * 1024  #: with more than this unread, an answer is not gone on with
REQUESTS_WAIT_BYTES: Final = 1024 * 1024  #: with more than this unread, no further request is read
MAX_REQUESTS: Final = 64  #: running at once on one connection
CANCEL_GRACE_S: Final = 10.0  #: for a cancelled `generate` to return what it has
HANG_UP_GRACE_S: Final = 5.0  #: for other requests after the client closed its end
_FLUSH_S: Final = 0.5  #: for last words when the daemon ends
_CHUNK: Final = 64 * 1024
_KERNEL_BYTES: Final = 32 * 1024  #: of the socket's buffer, which the kernel doubles: it is unread, too


@dataclass
class _Running:
    """A request under way."""

    method: str
    cancelled: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    def cancel(self, others_grace_s: float = 0.0) -> None:
        """Softly for `generate`, which has something to give back; after `others_grace_s` for the rest."""
        self.cancelled.set()
        grace = CANCEL_GRACE_S if self.method == "generate" else others_grace_s
        self.scope.deadline = min(self.scope.deadline, trio.current_time() + grace)


class Connection:
    """Serves one client until it hangs up, is dropped, or the scope around `serve` is cancelled."""

    def __init__(self, sock: trio.socket.SocketType, service: ControlService, ties: Ties) -> None:
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, _KERNEL_BYTES)
        self._sock = sock
        self._service = service
        self._ties = ties
        self._running: dict[jsonrpc.Id, _Running] = {}
        self._unsent = bytearray()
        self._wake = trio.Event()
        self._io = trio.CancelScope()
        self._dropped = False

    async def serve(self) -> None:
        """Runs the connection to its end; always closes the socket."""
        try:
            async with trio.open_nursery() as requests:
                with self._io:
                    async with trio.open_nursery() as io:
                        io.start_soon(self._write)
                        await self._read(requests)
                        await self._finish()
                        io.cancel_scope.cancel()
                self._hang_up()
                requests.cancel_scope.deadline = trio.current_time() + CANCEL_GRACE_S
        finally:
            await self._last_words()
            self._sock.close()
        await self._ties.release(self)

    async def turn_away(self, error: DgnError) -> None:
        """Says why this client is not served, and closes the socket."""
        self.refuse(error)
        await self._last_words()
        try:  # with something of it unread, the client would lose what was said
            self._sock.shutdown(trio.socket.SHUT_WR)
            with trio.move_on_after(_FLUSH_S):
                while await self._sock.recv(_CHUNK):
                    pass
        except OSError:
            pass
        finally:
            self._sock.close()

    async def _finish(self) -> None:
        """After the client's last request: lets what runs end, and be read, unless the client is gone, which
        the writer finds out."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            while self._running:
                await self._wake.wait()
            nursery.cancel_scope.cancel()
        await self._room(0)

    async def _watch(self) -> None:
        await gone(self._sock)
        self._hang_up()

    def refuse(self, error: DgnError) -> None:
        """Queues an error that belongs to no request."""
        self._send(jsonrpc.encode_error(None, error))

    # --- bytes

    async def _read(self, requests: trio.Nursery) -> None:
        lines = jsonrpc.Lines(jsonrpc.MAX_REQUEST_BYTES)
        while True:
            try:
                data = await self._sock.recv(_CHUNK)
            except OSError:
                data = b""
            if not data:
                return
            lines.receive(data)
            while (line := lines.next()) is not None:
                await self._room(REQUESTS_WAIT_BYTES)
                if isinstance(line, jsonrpc.LineTooLong):
                    self.refuse(
                        InvalidRequest(
                            f"a line of more than {line.limit:,} bytes was skipped: send less at once"
                        )
                    )
                else:
                    self._take(jsonrpc.parse(line), requests)
            await trio.lowlevel.checkpoint()

    async def _write(self) -> None:
        while True:
            if not await self._flush():
                self._drop()
                return
            await self._wake.wait()

    async def _flush(self) -> bool:
        """Sends what is queued.

        False when the client is gone. Cancelled between sends, so no line is cut in two.
        """
        try:
            while self._unsent:
                sent = await self._sock.send(bytes(self._unsent[:_CHUNK]))
                del self._unsent[:sent]
                self._notify()
        except OSError:
            return False
        return True

    async def _last_words(self) -> None:
        """Sends what is queued, for a moment, also while the daemon is ending."""
        with trio.CancelScope(deadline=trio.current_time() + _FLUSH_S, shield=True):
            await self._flush()

    def _send(self, line: bytes) -> None:
        if not self._dropped:
            self._unsent += line
            self._notify()

    async def _room(self, most: int) -> None:
        """Waits until the client has read all but `most` bytes, or is gone."""
        while len(self._unsent) > most:
            await self._wake.wait()

    def _drop(self) -> None:
        """The client is gone."""
        self._dropped = True
        self._unsent = bytearray()
        self._notify()
        self._io.cancel()
        self._hang_up()

    def _notify(self) -> None:
        self._wake.set()
        self._wake = trio.Event()

    # --- requests

    def _hang_up(self) -> None:
        for running in self._running.values():
            running.cancel(HANG_UP_GRACE_S)

    def _take(self, message: jsonrpc.Message, requests: trio.Nursery) -> None:
        match message:
            case jsonrpc.Malformed(identity, error):
                self._send(jsonrpc.encode_error(identity, error))
            case jsonrpc.Request(identity, method, raw):
                try:
                    params = self._admit(identity, method, raw)
                except DgnError as error:
                    self._send(jsonrpc.encode_error(identity, error))
                    return
                if isinstance(params, api.CancelParams):
                    self._send(jsonrpc.encode_result(identity, self._cancel(params)))
                    return
                if isinstance(params, api.SessionTieParams):
                    self._ties.tie(params.session, self)
                    self._send(jsonrpc.encode_result(identity, api.Done()))
                    return
                running = self._running[identity] = _Running(method)
                requests.start_soon(self._run, identity, running, params)
            case jsonrpc.Notification("cancel", raw):
                try:
                    self._cancel(jsonrpc.read_params(raw, api.CancelParams))
                except BadRequest as error:
                    log.info("a notification 'cancel' was ignored: %s", error)
            case jsonrpc.Notification(method, _):
                log.info("a notification %.40r was ignored: only 'cancel' may go without an id", method)
            case _:
                self.refuse(InvalidRequest("this end answers requests; it asked for nothing"))

    def _admit(self, identity: jsonrpc.Id, method: str, raw: bytes) -> api.Params:
        if method not in api.METHODS:
            known = ", ".join(api.METHODS)
            raise MethodNotFound(f"no method {method[:60]!r}; there are {known}")
        if identity in self._running:
            raise InvalidRequest(f"the id {identity!r} is in use by a request that is still running")
        if len(self._running) >= MAX_REQUESTS:
            raise NoRoomNow(f"{MAX_REQUESTS} requests are running on this connection; wait for one to end")
        params = jsonrpc.read_params(raw, api.METHODS[method][0])
        if isinstance(params, api.SessionTieParams):
            check_session(params.session)
        return params

    def _cancel(self, params: api.CancelParams) -> api.Done:
        running = self._running.get(params.request_id)
        if running is None:
            return api.Done(ok=False)
        running.cancel()
        return api.Done()

    async def _run(self, identity: jsonrpc.Id, running: _Running, params: api.Params) -> None:
        answer: bytes | None = None
        try:
            with running.scope:
                answer = await self._answer(identity, running, params)
            if answer is None:
                answer = jsonrpc.encode_error(identity, Cancelled(f"{running.method} was cancelled"))
        finally:
            if answer is None:
                stopping = ShuttingDown(f"{running.method}: dgnd is stopping; ask again when it is back")
                answer = jsonrpc.encode_error(identity, stopping)
            del self._running[identity]
            self._send(answer)
            self._notify()

    async def _answer(self, identity: jsonrpc.Id, running: _Running, params: api.Params) -> bytes:
        """The line that answers a request: its result, or its error, whatever the service raised."""
        try:
            if isinstance(params, api.GenerateParams):
                result: object = await self._generate(identity, running, params)
            else:
                result = await call(self._service, running.method, params)
            return jsonrpc.encode_result(identity, result)
        except DgnError as error:
            return jsonrpc.encode_error(identity, error)
        except BaseExceptionGroup as group:
            ours, rest = group.split(DgnError)
            if rest is not None and rest.subgroup(lambda error: not isinstance(error, Exception)) is not None:
                raise  # a cancellation among them belongs to a scope outside
            if rest is None and ours is not None:
                return jsonrpc.encode_error(identity, _first(ours))
            return self._fault(identity, running, group)
        except Exception as error:  # noqa: BLE001 - a fault in one request must not end the daemon
            return self._fault(identity, running, error)

    async def _generate(
        self, identity: jsonrpc.Id, running: _Running, params: api.GenerateParams
    ) -> api.GenerateResult:
        async def on_delta(text: str, token_ids: list[int], logprobs: list[api.TokenLogprobs]) -> None:
            delta = api.GenerateDelta(identity, text, token_ids, logprobs)
            self._send(jsonrpc.encode_notification("generate.delta", delta))
            await trio.lowlevel.checkpoint()  # the writer has its turn even if the service never waits
            await self._room(ANSWER_WAITS_BYTES)

        def on_wait(words: str) -> None:
            if len(self._unsent) <= ANSWER_WAITS_BYTES:  # else the client does not read anyway
                delta = api.GenerateDelta(identity, "", [], waiting=words)
                self._send(jsonrpc.encode_notification("generate.delta", delta))

        check_generate(params)
        return await self._service.generate(params, on_delta, running.cancelled, on_wait)

    def _fault(self, identity: jsonrpc.Id, running: _Running, error: BaseException) -> bytes:
        log.error("%s failed by a fault of dgnd", running.method, exc_info=error)
        what = f"{running.method}: a fault in dgnd ({type(error).__name__}); its log has the details"
        return jsonrpc.encode_error(identity, InternalError(what))


def _first(group: BaseExceptionGroup[DgnError]) -> DgnError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, DgnError)
    return error
