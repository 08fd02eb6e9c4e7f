"""JSON-RPC 2.0, one message a line: bytes to messages and back, for both ends.

Knows nothing of sockets, of an event loop, or of which methods there are. Receiving bytes (`Lines.receive`)
and getting lines (`Lines.next`) are two calls; a line becomes a message by `parse`, which never raises: what
can't be used comes back as `Malformed`, with the error to answer. Batches are refused by design: requests on
a connection run concurrently anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

from dgnd.errors import BadRequest, DgnError, InvalidRequest, ParseError, RpcError, error_from

Id = int | str

#: The longest line that either end accepts from the other, in bytes.
MAX_LINE_BYTES: Final = 16 * 1024 * 1024
#: The longest line that dgnd accepts from a client.
MAX_REQUEST_BYTES: Final = 4 * 1024 * 1024
_MAX_ID: Final = 2**63
_MAX_ID_LENGTH: Final = 128
_BAD_ID: Final = f'"id" must be a 64-bit whole number or a string of at most {_MAX_ID_LENGTH} characters'

T = TypeVar("T")


class Request(msgspec.Struct, frozen=True):
    """A call that wants an answer. `params` is the JSON of an object, not yet checked."""

    id: Id
    method: str
    params: bytes


class Notification(msgspec.Struct, frozen=True):
    """A call that wants no answer."""

    method: str
    params: bytes


class Response(msgspec.Struct, frozen=True):
    """The result of a request, as JSON not yet checked."""

    id: Id
    result: bytes


class ErrorObject(msgspec.Struct, frozen=True):
    """An error as it is sent. `data` holds at least `kind` and `retryable`."""

    code: int
    message: str
    data: dict[str, Any] = {}


class ErrorResponse(msgspec.Struct, frozen=True):
    """A request failed; `id` is None where the other end could not read one."""

    id: Id | None
    error: ErrorObject


class Malformed(msgspec.Struct, frozen=True):
    """A line that is no message; `error` is what to answer."""

    id: Id | None
    error: RpcError


Message = Request | Notification | Response | ErrorResponse | Malformed


class LineTooLong(msgspec.Struct, frozen=True):
    """A line beyond the bound was skipped."""

    limit: int


class Lines:
    """Splits a stream of bytes at newlines, holding at most one line of `limit` bytes and the last chunk
    received.

    A longer line is reported once as `LineTooLong`, dropped as it arrives, and the next one is read as usual.
    """

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._scanned = 0
        self._skipping = False

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Takes what arrived. Call `next` until it returns None before the next `receive`."""
        self._buffer += data

    def next(self) -> bytes | LineTooLong | None:
        """The next line without its newline; None when more data is needed. Blank lines are passed over."""
        while True:
            end = self._buffer.find(b"\n", self._scanned)
            if end < 0:
                self._scanned = len(self._buffer)
                if self._skipping:
                    self._clear()
                elif self._scanned > self._limit:
                    self._clear()
                    self._skipping = True
                    return LineTooLong(self._limit)
                return None
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._scanned = 0
            if self._skipping:
                self._skipping = False
            elif len(line) > self._limit:
                return LineTooLong(self._limit)
            elif line and not line.isspace():
                return line

    def _clear(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0


class _Envelope(msgspec.Struct):
    jsonrpc: msgspec.Raw = msgspec.Raw()
    id: msgspec.Raw = msgspec.Raw()
    method: msgspec.Raw = msgspec.Raw()
    params: msgspec.Raw = msgspec.Raw()
    result: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()


_envelopes = msgspec.json.Decoder(_Envelope)
_syntax = msgspec.json.Decoder(msgspec.Raw)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def parse(line: bytes) -> Message:
    """The message in one line; `Malformed` for anything else. Never raises, whatever the bytes."""
    try:
        line.decode()
        _syntax.decode(line)
    except _UNREADABLE as error:
        return Malformed(None, ParseError(f"not a line of JSON: {error}"))
    start = line.lstrip()[:1]
    if start == b"[":
        return Malformed(
            None, InvalidRequest("batches are not supported: send each request on a line of its own")
        )
    if start != b"{":
        return Malformed(None, InvalidRequest("a request is a JSON object"))
    try:
        envelope = _envelopes.decode(line)
    except _UNREADABLE as error:  # an object key that is no text, nesting at the edge of the stack
        return Malformed(None, ParseError(f"not a line of JSON: {error}"))
    return _classify(envelope)


def _classify(envelope: _Envelope) -> Message:
    identity = _read(envelope.id, int | str)
    if not _usable(identity):
        identity = None

    def malformed(message: str) -> Malformed:
        return Malformed(identity, InvalidRequest(message))

    has_id = bool(bytes(envelope.id))
    if _read(envelope.jsonrpc, str) != "2.0":
        return malformed('"jsonrpc" must be "2.0"')
    if bytes(envelope.method):
        method = _read(envelope.method, str)
        if method is None:
            return malformed('"method" must be a string')
        params = bytes(envelope.params) or b"{}"
        if params[:1] not in (b"{", b"["):
            return malformed('"params" must be an object')
        if not has_id:
            return Notification(method, params)
        if identity is None:
            return malformed(_BAD_ID)
        return Request(identity, method, params)
    if bytes(envelope.error):
        error = _read(envelope.error, ErrorObject)
        if error is None:
            return malformed('"error" must hold "code" and "message"')
        return ErrorResponse(identity, error)
    if bytes(envelope.result):
        if identity is None:
            return malformed(_BAD_ID)
        return Response(identity, bytes(envelope.result))
    return malformed('"method" is missing')


def _usable(identity: Id | None) -> bool:
    if isinstance(identity, str):
        return len(identity) <= _MAX_ID_LENGTH
    return identity is not None and -_MAX_ID <= identity < _MAX_ID


def _read(raw: msgspec.Raw, kind: type[T] | Any) -> T | None:
    """The value of a part of the envelope; None when absent or of another type."""
    if not bytes(raw):
        return None
    try:
        value: T = msgspec.json.decode(raw, type=kind)
    except _UNREADABLE:
        return None
    return value


def read_params(params: bytes, kind: type[T]) -> T:
    """Typed parameters.

    Raises:
        BadRequest: naming the field that is missing, unknown, or of the wrong type.
    """
    if params[:1] == b"[":
        raise BadRequest("params must be an object with named fields, not an array")
    return read_value(params, kind, "params")


def read_value(raw: bytes, kind: type[T] | Any, what: str) -> T:
    """A typed value out of JSON.

    Raises:
        BadRequest: naming `what` and the field.
    """
    try:
        value: T = msgspec.json.decode(raw, type=kind)
    except _UNREADABLE as error:
        raise BadRequest(f"{what}: {error}") from None
    return value


def encode_request(identity: Id, method: str, params: object) -> bytes:
    """A request as a line."""
    return _line({"jsonrpc": "2.0", "id": identity, "method": method, "params": params})


def encode_notification(method: str, params: object) -> bytes:
    """A notification as a line."""
    return _line({"jsonrpc": "2.0", "method": method, "params": params})


def encode_result(identity: Id, result: object) -> bytes:
    """The answer to a request as a line."""
    return _line({"jsonrpc": "2.0", "id": identity, "result": result})


def encode_error(identity: Id | None, error: DgnError) -> bytes:
    """The failure of a request as a line. Never raises: data that JSON can't hold is left out."""
    sent = error_object(error)
    try:
        return _line({"jsonrpc": "2.0", "id": identity, "error": sent})
    except (TypeError, ValueError, OverflowError):  # ValueError: a file name that is not Unicode
        text = sent.message.encode("utf-8", "replace").decode()
        plain = ErrorObject(sent.code, text, {"kind": error.kind, "retryable": error.retryable})
        return _line({"jsonrpc": "2.0", "id": identity, "error": plain})


def _line(message: Mapping[str, object]) -> bytes:
    return msgspec.json.encode(message) + b"\n"


def error_object(error: DgnError) -> ErrorObject:
    """An error of ours as it is sent: its code, its text, and `data` with kind and retryable."""
    data = {**error.data, "kind": error.kind, "retryable": error.retryable}
    return ErrorObject(error.code, error.message, data)


def error_of(sent: ErrorObject) -> DgnError:
    """The error that was sent, as an exception of ours; an unknown kind becomes a plain DgnError."""
    data = {
        key: value for key, value in sent.data.items() if key not in ("kind", "retryable", "self", "message")
    }
    return error_from(str(sent.data.get("kind", "")), sent.message, data)
