"""Frames to bytes and back. Bytes in, frames out: no sockets, no event loop, nothing is ever unpickled.

A frame is a prefix of 12 bytes, a msgpack header `[message, [dtype, shape] | nil]`, and the tensor's raw
bytes:

    "dgn" | layout (u8) = 1 | header length (u32) | payload length (u32) | header | payload

Integers of the prefix and numbers of the payload are little-endian. A reader knows every length before it
takes memory for it, and what a payload must be before the first byte of it arrives. Which messages come in
which order is not known here. See docs/protocol.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast, get_args

import msgspec

from dgn_backends.tensor import Tensor, WireDType
from dgnd.errors import DgnError, ProtocolError, UnknownMessage, one_line
from dgnd.wire.limits import (
    DEFAULT_LIMITS,
    Limits,
    check_header_size,
    check_lengths,
    check_message,
    check_shape,
    check_values,
    tag_of,
    validate,
)
from dgnd.wire.messages import AnyMessage, Failure, Frame, HopKey, PeerMessage, WorkerMessage

#: Versions of the protocol that this software speaks: the current one and the one before it.
PROTOCOL_VERSIONS = (1,)

_PREFIX = struct.Struct("<3sBII")
_MAGIC = b"dgn"
_LAYOUT = 1
_TAG_SHOWN = 40
_SMALL = 64 << 10  # to copy so much costs less than to write twice


class _TensorHeader(msgspec.Struct, frozen=True, array_like=True):
    dtype: str
    shape: tuple[int, ...]


class _Header(msgspec.Struct, frozen=True, array_like=True):
    message: msgspec.Raw
    tensor: _TensorHeader | None = None


class _Tag(msgspec.Struct, frozen=True):
    t: str


@dataclass(frozen=True, slots=True)
class MessageSet:
    """The kinds of messages that may come on one kind of connection."""

    name: str
    tags: frozenset[str]
    decoder: msgspec.msgpack.Decoder[Any]


def _message_set(name: str, union: object) -> MessageSet:
    tags = frozenset(str(kind.__struct_config__.tag) for kind in get_args(union))
    return MessageSet(name, tags, msgspec.msgpack.Decoder(union))


PEER = _message_set("peer", PeerMessage)  #: between two dgnd
WORKER = _message_set("worker", WorkerMessage)  #: between dgnd and its worker, both ways

_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(_Header)
_tag_decoder = msgspec.msgpack.Decoder(_Tag)


def negotiate(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """The highest protocol version that both sides speak. Raises ProtocolError where there is none."""
    common = set(mine) & set(theirs)
    if not common:
        raise ProtocolError(
            f"no common protocol version: this node speaks {_listed(mine)}, the peer {_listed(theirs[:16])}; "
            "update the older of the two"
        )
    return max(common)


def encode(frame: Frame, limits: Limits = DEFAULT_LIMITS) -> list[bytes | memoryview]:
    """The frame's bytes in order: prefix and header, then the payload's own memory, not copied.

    Raises ProtocolError for a frame that no decoder would take.
    """
    validate(frame, limits)
    payload = frame.payload
    if payload is None:
        return [_head(frame.message, None, 0, limits)]
    data = memoryview(payload.data)
    head = _head(frame.message, (payload.dtype, payload.shape), len(data), limits)
    return [head, data] if len(data) else [head]


def encode_for_stream(frame: Frame, limits: Limits = DEFAULT_LIMITS) -> list[bytes | memoryview]:
    """As `encode`, but a small frame is one piece: one write, and one wakeup of the reader at the other
    end."""
    pieces = encode(frame, limits)
    if len(pieces) > 1 and sum(map(len, pieces)) <= _SMALL:
        return [b"".join(pieces)]
    return pieces


def encode_bytes(frame: Frame, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The frame's bytes in one piece (copies the payload once). Raises as `encode` does."""
    return b"".join(encode(frame, limits))


def failure_of(error: DgnError, key: HopKey | None = None, branch: int = 0, tag: str = "") -> Failure:
    """The message that tells a peer of `error`, its text one line, cut to what a frame may hold."""
    text = one_line(error.message[:4096])
    return Failure(kind=error.kind, message=text, data=dict(error.data), key=key, branch=branch, tag=tag)


class FrameDecoder:
    """Takes bytes in any pieces, gives frames.

    After each `receive_data`, call `next_frame` until it returns None; then it holds less than one frame.
    `messages` is PEER or WORKER.
    """

    def __init__(self, limits: Limits, messages: MessageSet) -> None:
        self._limits = limits
        self._messages = messages
        self._buffer = bytearray()
        self._lengths: tuple[int, int] | None = None  # header, payload: once the prefix is in
        self._message: AnyMessage | None = None  # once the header is in
        self._tensor: _TensorHeader | None = None
        self._unknown: UnknownMessage | None = None  # its payload is being dropped
        self._left = 0  # bytes of that payload still to drop
        self._failed: str | None = None

    @property
    def buffered(self) -> int:
        """Bytes held for a frame that is not whole; 0 exactly where a connection may end."""
        return len(self._buffer) + (_PREFIX.size if self._lengths is not None else 0)

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Takes bytes from the connection. Never raises; what is wrong with them is told by `next_frame`."""
        if self._failed is None:
            self._buffer += data

    def next_frame(self) -> Frame | None:
        """The next whole frame, or None: more data is needed.

        Raises ProtocolError, and again on each later call: the connection can't go on. Raises
        UnknownMessage for a message of a kind not known here, once: answer it with `failure_of(error,
        tag=error.data["tag"])` and go on.
        """
        if self._failed is not None:
            raise ProtocolError(self._failed)
        try:
            return self._advance()
        except UnknownMessage:
            raise
        except ProtocolError as error:
            self._failed = error.message
            self._buffer = bytearray()
            self._message = None
            raise

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
        # A wrong first byte is refused at once: a stranger's protocol may wait for our answer.
        if not _MAGIC.startswith(self._buffer[:3]) or (len(self._buffer) > 3 and self._buffer[3] != _LAYOUT):
            raise ProtocolError(f"not a frame of this protocol: it begins with {bytes(self._buffer[:4])!r}")
        if len(self._buffer) < _PREFIX.size:
            return False
        _, _, header_len, payload_len = _PREFIX.unpack_from(self._buffer)
        check_lengths(header_len, payload_len, self._limits)
        del self._buffer[: _PREFIX.size]
        self._lengths = header_len, payload_len
        return True

    def _take_header(self) -> bool:
        assert self._lengths is not None
        header_len, payload_len = self._lengths
        if len(self._buffer) < header_len:
            return False
        raw = bytes(memoryview(self._buffer)[:header_len])
        del self._buffer[:header_len]
        header: _Header = _decoded(_header_decoder, raw, "a frame's header")
        if header_len > self._limits.header_bytes:  # before a large one is unpacked: may it be large?
            check_header_size(self._tag(header.message), header_len, self._limits)
        try:
            message: AnyMessage = self._messages.decoder.decode(header.message)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._not_decoded(header.message, error, payload_len)
            return True
        tag = tag_of(message)
        tensor = header.tensor
        if tensor is None:
            if payload_len:
                raise ProtocolError(f"{tag}: {payload_len} bytes of payload without dtype and shape")
            check_message(message, None, (), self._limits)
        else:
            check_shape(tag, tensor.dtype, tensor.shape, payload_len, self._limits)
            check_message(message, tensor.dtype, tensor.shape, self._limits)
        self._message, self._tensor = message, tensor
        return True

    def _take_frame(self) -> Frame | None:
        assert self._lengths is not None
        assert self._message is not None
        payload_len = self._lengths[1]
        if len(self._buffer) < payload_len:
            return None
        payload = None
        if self._tensor is not None:
            data = self._split(payload_len)
            payload = Tensor(cast(WireDType, self._tensor.dtype), self._tensor.shape, data)
        frame = Frame(self._message, payload)
        check_values(frame)
        self._lengths = self._message = self._tensor = None
        return frame

    def _split(self, size: int) -> bytes | bytearray:
        """Takes `size` bytes off the buffer's front, copying the shorter of the two parts."""
        rest = len(self._buffer) - size
        if size <= rest:
            front = bytes(memoryview(self._buffer)[:size])
            del self._buffer[:size]
            return front
        tail = bytearray(memoryview(self._buffer)[size:])
        del self._buffer[size:]
        whole, self._buffer = self._buffer, tail
        return whole

    def _not_decoded(self, raw: msgspec.Raw, error: Exception, payload_len: int) -> None:
        """An unknown kind is noted, to be told after its payload; anything else ends the connection."""
        tag = self._tag(raw)
        if tag in self._messages.tags:
            raise ProtocolError(f"{tag}: {error}") from None
        shown = tag[:_TAG_SHOWN]
        self._unknown = UnknownMessage(f"unknown message {shown!r}", tag=shown)
        self._left = payload_len

    def _drop_payload(self) -> bool:
        """Whether the unknown message's payload is still coming; raises the UnknownMessage after its end."""
        assert self._unknown is not None
        dropped = min(self._left, len(self._buffer))
        del self._buffer[:dropped]
        self._left -= dropped
        if self._left:
            return False
        unknown, self._unknown, self._lengths = self._unknown, None, None
        raise unknown

    def _tag(self, raw: msgspec.Raw) -> str:
        found: _Tag = _decoded(_tag_decoder, raw, "a message")
        return found.t


def _head(
    message: AnyMessage, tensor: tuple[str, tuple[int, ...]] | None, payload_len: int, limits: Limits
) -> bytes:
    header = _encoder.encode((message, tensor))
    check_lengths(len(header), payload_len, limits)
    check_header_size(tag_of(message), len(header), limits)
    return _PREFIX.pack(_MAGIC, _LAYOUT, len(header), payload_len) + header


def _decoded(decoder: msgspec.msgpack.Decoder[Any], raw: bytes | msgspec.Raw, what: str) -> Any:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        _refuse(what, error)


def _refuse(what: str, error: Exception) -> NoReturn:
    raise ProtocolError(f"{what} can't be read: {error}") from None


def _listed(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions)) or "none"
