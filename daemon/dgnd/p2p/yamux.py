"""The stream multiplexer `/yamux/1.0.0` as a state machine: bytes in, events out, bytes to send kept until
asked for.

Source: https://github.com/hashicorp/yamux/blob/master/spec.md. py-libp2p 0.8.1 has a multiplexer too, and
this one speaks with it, but its own does not enforce the receive window, polls every 10 ms while a window is
empty, resets a stream after 5 s of that, and lets a peer open streams without end. Here a peer that breaks a
limit is an error on arrival of the frame's header, before its body, and the body is passed on piece by piece:
nothing is buffered.

Knows nothing of sockets, tasks, encryption, or of what streams carry.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

PROTOCOL = "/yamux/1.0.0"
HEADER = struct.Struct("!BBHII")  # version, type, flags, stream id, length
DATA, WINDOW, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
INITIAL_WINDOW = 256 * 1024  # fixed by the specification


class YamuxError(Exception):
    """The peer broke the multiplexer's protocol or one of its limits; the connection has to be closed."""


@dataclass(frozen=True, slots=True)
class YamuxLimits:
    """What one peer may make us hold."""

    inbound_streams: int = 8  #: open at the same time; more are reset
    refused_streams: int = 256  #: resets before the peer is cut
    queued_replies: int = 1024  #: control frames waiting to be sent


@dataclass(eq=False, slots=True)
class StreamState:
    """One stream as the multiplexer sees it."""

    id: int
    send_window: int = INITIAL_WINDOW
    receive_window: int = INITIAL_WINDOW
    send_closed: bool = False
    receive_closed: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer opened a stream."""

    stream: StreamState


@dataclass(frozen=True, slots=True)
class Received:
    """A piece of a stream's data, in order; shares memory with what was received."""

    stream: StreamState
    data: memoryview


@dataclass(frozen=True, slots=True)
class WindowGrew:
    """More may be sent on a stream."""

    stream: StreamState


@dataclass(frozen=True, slots=True)
class Ended:
    """The peer will send nothing more on a stream; with `reset` it takes nothing more either."""

    stream: StreamState
    reset: bool


@dataclass(frozen=True, slots=True)
class WentAway:
    """The peer closes the connection; 0 is a normal end."""

    code: int


Event = Opened | Received | WindowGrew | Ended | WentAway


class Yamux:
    """Both directions of one connection. `dialer`: this side opened the connection (odd stream ids)."""

    def __init__(self, dialer: bool, limits: YamuxLimits | None = None) -> None:
        self._limits = limits or YamuxLimits()
        self._dialer = dialer
        self._next_id = 1 if dialer else 2
        self._streams: dict[int, StreamState] = {}
        self._header = bytearray()
        self._body = 0  # bytes of a DATA frame's body that are still to come
        self._body_of: StreamState | None = None  # None: of a stream that is gone
        self._body_flags = 0
        self._refused = 0
        self._discardable = 0  # bytes that may still arrive for streams that are gone
        self._replies: list[bytes] = []
        self._grants: dict[int, int] = {}

    # --- what arrives

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Event]:
        """The events that `data` completes. Raises YamuxError, after which nothing more may be given."""
        view = memoryview(data)
        at = 0
        while at < len(view):
            if self._body:
                piece = view[at : at + self._body]
                self._body -= len(piece)
                at += len(piece)
                if self._body_of is not None:
                    yield Received(self._body_of, piece)
                if not self._body and self._body_of is not None:
                    yield from self._flags(self._body_of, self._body_flags)
                continue
            if self._header or len(view) - at < HEADER.size:  # it came in two pieces
                piece = view[at : at + HEADER.size - len(self._header)]
                self._header += piece
                at += len(piece)
                if len(self._header) < HEADER.size:
                    return
                header = HEADER.unpack(self._header)
                self._header.clear()
            else:
                header = HEADER.unpack_from(view, at)
                at += HEADER.size
            version, kind, flags, stream_id, length = header
            if version != 0:
                raise YamuxError(f"yamux version {version}")
            if flags & SYN and kind in (DATA, WINDOW):
                yield from self._open_inbound(stream_id)
            if kind == DATA:
                self._data(stream_id, flags, length)
                if not length and self._body_of is not None:
                    yield from self._flags(self._body_of, flags)
            else:
                yield from self._control(kind, flags, stream_id, length)

    def _control(self, kind: int, flags: int, stream_id: int, length: int) -> Iterator[Event]:
        if kind == PING:
            if flags & SYN:
                self._reply(PING, ACK, 0, length)
        elif kind == GO_AWAY:
            yield WentAway(length)
        elif kind != WINDOW:
            raise YamuxError(f"yamux frame type {kind}")
        elif (stream := self._streams.get(stream_id)) is not None:
            stream.send_window += length
            if length:
                yield WindowGrew(stream)
            yield from self._flags(stream, flags)

    def _data(self, stream_id: int, flags: int, length: int) -> None:
        """The header of a DATA frame; its body is still to come."""
        stream = self._streams.get(stream_id)
        if stream is None:
            self._discardable -= length
            if self._discardable < 0:
                raise YamuxError(f"data for stream {stream_id}, which is not open")
        else:
            if stream.receive_closed and length:
                raise YamuxError(f"data on stream {stream_id} after its end")
            stream.receive_window -= length
            if stream.receive_window < 0:
                raise YamuxError(
                    f"{length} bytes on stream {stream_id}, {-stream.receive_window} over the receive window"
                )
        self._body, self._body_of, self._body_flags = length, stream, flags

    def _open_inbound(self, stream_id: int) -> Iterator[Event]:
        if stream_id == 0 or stream_id % 2 == (1 if self._dialer else 0):
            raise YamuxError(f"stream id {stream_id} is not the peer's to give")
        if stream_id in self._streams:
            raise YamuxError(f"stream {stream_id} opened twice")
        open_now = sum(1 for known in self._streams if known % 2 == stream_id % 2)
        if open_now >= self._limits.inbound_streams:
            self._refused += 1
            if self._refused > self._limits.refused_streams:
                raise YamuxError(f"{self._refused} streams over the limit of {self._limits.inbound_streams}")
            self._discardable += INITIAL_WINDOW
            self._reply(WINDOW, RST, stream_id, 0)
            return
        stream = self._streams[stream_id] = StreamState(stream_id)
        self._reply(WINDOW, ACK, stream_id, 0)
        yield Opened(stream)

    def _flags(self, stream: StreamState, flags: int) -> Iterator[Event]:
        if flags & RST:
            self._forget(stream)
            stream.send_closed = stream.receive_closed = True
            yield Ended(stream, reset=True)
        elif flags & FIN and not stream.receive_closed:
            stream.receive_closed = True
            if stream.send_closed:
                self._forget(stream)
            yield Ended(stream, reset=False)

    # --- what is sent

    def open(self) -> StreamState:
        """A new stream of this side's."""
        stream = self._streams[self._next_id] = StreamState(self._next_id)
        self._next_id += 2
        self._reply(WINDOW, SYN, stream.id, 0)
        return stream

    def data_header(self, stream: StreamState, length: int) -> bytes:
        """The header for `length` bytes of data, at most the stream's send window, to be sent right before
        them.
        """
        assert 0 < length <= stream.send_window
        assert not stream.send_closed
        stream.send_window -= length
        return HEADER.pack(0, DATA, 0, stream.id, length)

    def grant(self, stream: StreamState, length: int) -> None:
        """Lets the peer send `length` bytes more."""
        if not stream.receive_closed:
            stream.receive_window += length
            self._grants[stream.id] = self._grants.get(stream.id, 0) + length

    def finish(self, stream: StreamState) -> None:
        """Nothing more will be sent on the stream."""
        if not stream.send_closed:
            stream.send_closed = True
            self._reply(WINDOW, FIN, stream.id, 0)
            if stream.receive_closed:
                self._forget(stream)

    def reset(self, stream: StreamState) -> None:
        """Ends the stream in both directions; what still arrives for it is thrown away."""
        if stream.id in self._streams:
            self._reply(WINDOW, RST, stream.id, 0)
            self._discardable += max(stream.receive_window, 0)
            self._forget(stream)
        stream.send_closed = stream.receive_closed = True
        if self._body_of is stream:
            self._body_of = None

    def go_away(self, code: int = 0) -> None:
        """Says that this side closes the connection."""
        self._reply(GO_AWAY, 0, 0, code)

    def data_to_send(self) -> bytes:
        """The control frames that wait; taken out. To be sent before any data header made later."""
        if not self._replies and not self._grants:
            return b""
        grants = [HEADER.pack(0, WINDOW, 0, stream_id, n) for stream_id, n in self._grants.items()]
        out = b"".join(self._replies + grants)
        self._replies.clear()
        self._grants.clear()
        return out

    @property
    def wants_to_send(self) -> bool:
        """Whether control frames wait."""
        return bool(self._replies or self._grants)

    @property
    def open_streams(self) -> int:
        """How many streams are not finished."""
        return len(self._streams)

    def _reply(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if len(self._replies) >= self._limits.queued_replies:
            raise YamuxError(f"{len(self._replies)} control frames wait: the peer asks but does not read")
        self._replies.append(HEADER.pack(0, kind, flags, stream_id, length))

    def _forget(self, stream: StreamState) -> None:
        self._streams.pop(stream.id, None)
        self._grants.pop(stream.id, None)
