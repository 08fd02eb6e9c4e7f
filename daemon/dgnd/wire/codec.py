"""Frames to bytes; `dgnd.wire.decoder` is the way back. No sockets, no event loop, nothing is ever pickled.

A frame is a prefix of 12 bytes, a msgpack header `[message, [dtype, shape] | nil]`, and the tensor's raw
bytes:

    "dgn" | layout (u8) = 1 | header length (u32) | payload length (u32) | header | payload

Integers of the prefix and numbers of the payload are little-endian. Which messages come in which order is not
known here. See docs/protocol.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec

from dgnd.errors import DgnError, ProtocolError, one_line
from dgnd.wire.checks import validate
from dgnd.wire.limits import DEFAULT_LIMITS, Limits, check_header_size, check_lengths, tag_of
from dgnd.wire.messages import AnyMessage, Failure, Frame, HopKey

#: Versions of the protocol that this software speaks: the current one and the one before it.
PROTOCOL_VERSIONS = (1,)

PREFIX = struct.Struct("<4sII")
BEGINS = b"dgn\x01"  # the last byte is the layout
_SMALL = 64 << 10  # to copy so much costs less than to write twice

_encoder = msgspec.msgpack.Encoder()


def negotiate(mine: Sequence[int], theirs: Sequence[int]) -> int:
    """The highest protocol version that both sides speak. Raises ProtocolError where there is none."""
    common = set(mine) & set(theirs)
    if not common:
        raise ProtocolError(
            f"no common protocol version: this node speaks {_listed(mine)}, the peer {_listed(theirs[:16])}; "
            "update the older of the two"
        )
    return max(common)


def encode(frame: Frame, limits: Limits | None = DEFAULT_LIMITS) -> list[bytes | memoryview]:
    """The frame's bytes in order: prefix and header, then the payload's own memory, not copied.

    Raises ProtocolError for a frame that no decoder would take; without `limits` nothing is checked, for a
    reader that does so itself.
    """
    if limits is not None:
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


def _head(
    message: AnyMessage, tensor: tuple[str, tuple[int, ...]] | None, payload_len: int, limits: Limits | None
) -> bytes:
    header = _encoder.encode((message, tensor))
    if limits is not None:
        check_lengths(len(header), payload_len, limits)
        check_header_size(tag_of(message), len(header), limits)
    return PREFIX.pack(BEGINS, len(header), payload_len) + header


def _listed(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions)) or "none"
