"""Bytes to frames, as `dgnd.wire.codec` makes them. No sockets, no event loop, nothing is ever unpickled.

A reader knows every length before it takes memory for it, and what a payload must be before the first byte of
it arrives. Which messages come in which order is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, get_args

import msgspec

from dgn_backends.tensor import Tensor, WireDType
from dgnd.errors import ProtocolError, UnknownMessage
from dgnd.wire.checks import check_message, check_shape, check_values
from dgnd.wire.codec import BEGINS, PREFIX
from dgnd.wire.limits import DEFAULT_LIMITS, Limits, check_header_size, check_lengths, tag_of
from dgnd.wire.messages import AnyMessage, Frame, PeerMessage, WorkerMessage

_TAG_SHOWN = 40
_HEADER = "a frame's header"
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _TensorHeader(msgspec.Struct, frozen=True, array_like=True):
    dtype: str
    shape: tuple[int, ...]


class _RawHeader(msgspec.Struct, frozen=True, array_like=True):
    """A header whose message is not looked at."""

    message: msgspec.Raw
    tensor: _TensorHeader | None = None


class _Tag(msgspec.Struct, frozen=True):
    t: str


_raw_headers = msgspec.msgpack.Decoder(_RawHeader)
_tags = msgspec.msgpack.Decoder(_Tag)


@dataclass(frozen=True, slots=True)
class MessageSet:
    """The kinds of messages that may come on one kind of connection."""

    name: str
    tags: frozenset[str]
    headers: msgspec.msgpack.Decoder[Any]  #: with one of them in it


def _message_set(name: str, union: object) -> MessageSet:
    tags = frozenset(str(kind.__struct_config__.tag) for kind in get_args(union))
    header = msgspec.defstruct(
        "Header",
        [("message", union), ("tensor", _TensorHeader | None, None)],
        frozen=True,
        array_like=True,
    )
    return MessageSet(name, tags, msgspec.msgpack.Decoder(header))


PEER = _message_set("peer", PeerMessage)  #: between two dgnd
WORKER = _message_set("worker", WorkerMessage)  #: between dgnd and its worker, both ways


class FrameDecoder:
    """Takes bytes in any pieces, gives frames.

    After each `receive_data`, call `next_frame` until it returns None; then it holds less than one frame, and
    the memory of what it was given may be used again. `messages` is PEER or WORKER. Without `limits` what it
    reads is trusted, and only its form is checked: that it is a message, with a tensor of the right size.
    """

    def __init__(self, limits: Limits | None, messages: MessageSet) -> None:
        self._limits = limits
        self._messages = messages
        self._data: bytes | bytearray | memoryview = b""  # read from `_at` on
        self._at = 0
        self._own = False  # whether `_data` is a copy of our own; only then anything waits between two calls
        self._lengths: tuple[int, int] | None = None  # header, payload: once the prefix is in
        self._message: AnyMessage | None = None  # once the header is in
        self._tensor: _TensorHeader | None = None
        self._unknown: UnknownMessage | None = None  # its payload is being dropped
        self._left = 0  # bytes of that payload still to drop
        self._failed: str | None = None

    @property
    def buffered(self) -> int:
        """Bytes held for a frame that is not whole; 0 exactly where a connection may end."""
        return len(self._data) - self._at + (PREFIX.size if self._lengths is not None else 0)

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Takes bytes from the connection. Never raises; what is wrong with them is told by `next_frame`."""
        if self._failed is not None:
            return
        if self._at == len(self._data):  # mostly whole frames: they are read where they lie
            self._data, self._at, self._own = data, 0, False
            return
        if not self._own:
            self._keep_rest()
        assert isinstance(self._data, bytearray)
        self._data += data

    def next_frame(self) -> Frame | None:
        """The next whole frame, or None: more data is needed.

        Raises ProtocolError, and again on each later call: the connection can't go on. Raises
        UnknownMessage for a message of a kind not known here, once: answer it with `failure_of(error,
        tag=error.data["tag"])` and go on.
        """
        if self._failed is not None:
            raise ProtocolError(self._failed)
        if self._at == len(self._data) and self._lengths is None:  # as after every whole frame
            self._forget_data()
            return None
        try:
            frame = self._advance()
        except UnknownMessage:
            raise
        except ProtocolError as error:
            self._failed = error.message
            self._forget_data()
            self._message = self._tensor = None
            raise
        if frame is None:
            self._keep_rest()
        return frame

    def _forget_data(self) -> None:
        self._data, self._at, self._own = b"", 0, False

    def _keep_rest(self) -> None:
        """What is left is copied, if it is not ours already."""
        if self._own:
            assert isinstance(self._data, bytearray)
            del self._data[: self._at]
        else:
            self._data = bytearray(memoryview(self._data)[self._at :])
        self._at = 0
        self._own = bool(self._data)

    def _advance(self) -> Frame | None:
        if self._unknown is not None and not self._drop_payload():
            return None
        if self._message is None:
            if self._lengths is None and not self._take_prefix():
                return None
            if not self._take_header():
                return None
            if self._unknown is not None and not self._drop_payload():
                return None
        return self._take_frame()

    def _take_prefix(self) -> bool:
        if len(self._data) - self._at < PREFIX.size:
            # A wrong first byte is refused at once: a stranger's protocol may wait for our answer.
            begins = bytes(memoryview(self._data)[self._at : self._at + len(BEGINS)])
            if not BEGINS.startswith(begins):
                raise _no_frame(begins)
            return False
        begins, header_len, payload_len = PREFIX.unpack_from(self._data, self._at)
        if begins != BEGINS:
            raise _no_frame(begins)
        if self._limits is not None:
            check_lengths(header_len, payload_len, self._limits)
        self._at += PREFIX.size
        self._lengths = header_len, payload_len
        return True

    def _take_header(self) -> bool:
        assert self._lengths is not None
        header_len, payload_len = self._lengths
        end = self._at + header_len
        if len(self._data) < end:
            return False
        raw = bytes(memoryview(self._data)[self._at : end])
        self._at = end
        limits = self._limits
        if limits is not None and header_len > limits.header_bytes:  # before it is unpacked: may it be large?
            check_header_size(_tag_in(raw), header_len, limits)
        try:
            header = self._messages.headers.decode(raw)
        except _UNREADABLE as error:
            self._not_decoded(raw, error, payload_len)
            return True
        message, tensor = header.message, header.tensor
        dtype, shape = (None, ()) if tensor is None else (tensor.dtype, tensor.shape)
        if dtype is not None:
            check_shape(message, dtype, shape, payload_len, limits or DEFAULT_LIMITS)
        elif payload_len:
            raise ProtocolError(f"{tag_of(message)}: {payload_len} bytes of payload without dtype and shape")
        if limits is not None:
            check_message(message, dtype, shape, limits)
        self._message, self._tensor = message, tensor
        return True

    def _take_frame(self) -> Frame | None:
        assert self._lengths is not None
        assert self._message is not None
        payload_len = self._lengths[1]
        if len(self._data) - self._at < payload_len:
            return None
        payload = None
        if self._tensor is not None:
            data = self._split(payload_len)
            payload = Tensor(cast(WireDType, self._tensor.dtype), self._tensor.shape, data)
        frame = Frame(self._message, payload)
        if self._limits is not None:
            check_values(frame)
        self._lengths = self._message = self._tensor = None
        return frame

    def _split(self, size: int) -> bytes | bytearray:
        """The next `size` bytes. Large ones, which came in pieces, are not copied once more."""
        at, end = self._at, self._at + size
        if self._own and len(self._data) - end < size:
            whole = self._data
            assert isinstance(whole, bytearray)
            self._data, self._at = whole[end:], 0
            del whole[end:], whole[:at]
            return whole
        self._at = end
        return bytes(memoryview(self._data)[at:end])

    def _not_decoded(self, raw: bytes, error: Exception, payload_len: int) -> None:
        """An unknown kind is noted, to be told after its payload; anything else ends the connection."""
        tag = _tag_in(raw)
        if tag in self._messages.tags:
            raise ProtocolError(f"{tag}: {error}") from None
        shown = tag[:_TAG_SHOWN]
        self._unknown = UnknownMessage(f"unknown message {shown!r}", tag=shown)
        self._left = payload_len

    def _drop_payload(self) -> bool:
        """Whether the unknown message's payload is still coming; raises the UnknownMessage after its end."""
        assert self._unknown is not None
        dropped = min(self._left, len(self._data) - self._at)
        self._at += dropped
        self._left -= dropped
        if self._left:
            return False
        unknown, self._unknown, self._lengths = self._unknown, None, None
        raise unknown


def _tag_in(header: bytes) -> str:
    """What the message of a header calls itself."""
    found: _Tag = _decoded(_tags, _decoded(_raw_headers, header, _HEADER).message, "a message")
    return found.t


def _decoded(decoder: msgspec.msgpack.Decoder[Any], raw: bytes | msgspec.Raw, what: str) -> Any:
    try:
        return decoder.decode(raw)
    except _UNREADABLE as error:
        raise ProtocolError(f"{what} can't be read: {error}") from None


def _no_frame(begins: bytes) -> ProtocolError:
    return ProtocolError(f"not a frame of this protocol: it begins with {begins!r}")
