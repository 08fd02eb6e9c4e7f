"""A multiplexed connection: one reader that hands data on at once, one writer at a time, slices so that small
goes between big.

The reader never waits for anything but bytes: what the multiplexer wants to answer is sent by another task,
so two ends that both write can't block each other. Knows streams as bytes, not frames, and no peers.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError, IOException

from dgnd.errors import ProtocolError
from dgnd.p2p.noise import FastSession
from dgnd.p2p.tcp import TcpStream
from dgnd.p2p.write_lock import WriteLock
from dgnd.p2p.yamux import (
    INITIAL_WINDOW,
    Ended,
    Opened,
    Received,
    StreamState,
    WentAway,
    WindowGrew,
    Yamux,
    YamuxError,
    YamuxLimits,
)

#: What a peer may have under way on a stream whose data is used at once: 4 MiB fill 100 Mbit/s over 300 ms.
WINDOW = 4 * 1024 * 1024
#: A slice takes about this long on the link, so that a small frame waits no longer for a big one.
SLICE_S = 0.005
MIN_SLICE, FIRST_SLICE, MAX_SLICE = 16 * 1024, 64 * 1024, 256 * 1024


class MuxStream(ReadWriteCloser):
    """One stream. Read with `read` until `attach`; from then on its data goes to a callback as it arrives."""

    def __init__(self, owner: MuxedConnection, state: StreamState) -> None:
        self._owner = owner
        self.state = state
        self._buffer = bytearray()  # before attach; bounded by the initial window
        self._consumed = 0
        self._changed = trio.Event()
        self._ended = False
        self._on_data: Callable[[bytes | memoryview], None] | None = None
        self._on_end: Callable[[], None] | None = None

    async def read(self, n: int | None = None) -> bytes:
        """At least one byte, at most `n`. Raises ConnectionClosedError at the end."""
        while not self._buffer:
            if self._ended:
                raise ConnectionClosedError("the stream has ended")
            await self._changed.wait()
        out = bytes(self._buffer[:n])
        del self._buffer[: len(out)]
        self._consumed += len(out)
        if self._consumed >= INITIAL_WINDOW // 2:
            self._owner.grant(self.state, self._consumed)
            self._consumed = 0
        return out

    def attach(self, on_data: Callable[[bytes | memoryview], None], on_end: Callable[[], None]) -> None:
        """From now on data is used at once, so that the peer may send WINDOW bytes ahead."""
        self._on_data, self._on_end = on_data, on_end
        early = bytes(self._buffer)
        self._buffer.clear()
        self._owner.grant(self.state, WINDOW - INITIAL_WINDOW + self._consumed + len(early))
        self._consumed = 0
        if early:
            on_data(early)
        if self._ended:
            on_end()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends all of `data` in slices.

        Raises ConnectionClosedError. When cancelled, a part may have been sent.
        """
        view = memoryview(data)
        at = 0
        while at < len(view):
            while self.state.send_window == 0 and not self.state.send_closed:
                await self._changed.wait()
            at += await self._owner.write_slice(self.state, view[at:])

    def write_now(self, data: bytes | bytearray | memoryview) -> bool:
        """As `write`, where nothing has to be waited for; else False, and nothing is sent."""
        return self._owner.write_now(self.state, data)

    async def close(self) -> None:
        """Nothing more will be sent."""
        self._owner.finish(self.state)
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        """Ends both directions."""
        self._owner.reset(self.state)
        self.end()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Host and port of the other end."""
        return self._owner.tcp.remote

    def receive(self, data: memoryview) -> None:
        """For the owner: data has arrived."""
        if self._on_data is None:
            self._buffer += data
            self.wake()
            return
        self._on_data(data)
        self._consumed += len(data)
        if self._consumed >= WINDOW // 2:
            self._owner.grant(self.state, self._consumed)
            self._consumed = 0

    def end(self) -> None:
        """For the owner: nothing more will arrive."""
        if not self._ended:
            self._ended = True
            self.wake()
            if self._on_end is not None:
                self._on_end()

    def wake(self) -> None:
        """For the owner: something changed."""
        self._changed.set()
        self._changed = trio.Event()


class MuxedConnection:
    """An encrypted connection with streams. `dialer`: this side opened it."""

    def __init__(
        self, session: FastSession, tcp: TcpStream, dialer: bool, limits: YamuxLimits | None = None
    ) -> None:
        self._session = session
        self.tcp = tcp
        self._yamux = Yamux(dialer, limits)
        self._streams: dict[StreamState, MuxStream] = {}
        self._write_lock = WriteLock()
        self._tail = b""  # of what was sealed last, and goes before anything else
        self._wanted = trio.Event()
        self._slice = FIRST_SLICE
        self.closed = False
        self.last_received = trio.current_time()

    @property
    def open_streams(self) -> int:
        """How many streams are open, of both sides."""
        return self._yamux.open_streams

    def open_stream(self) -> MuxStream:
        """A new stream."""
        stream = MuxStream(self, self._yamux.open())
        self._streams[stream.state] = stream
        self._flush_soon()
        return stream

    async def run(self, on_stream: Callable[[MuxStream], None]) -> str:
        """Reads until the connection ends, and returns why; closes nothing.

        Raises ProtocolError when a rule of the multiplexer, or of what takes a stream's data, is broken.
        """
        fault: ProtocolError | None = None
        reason = ""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._flush)
            try:
                reason = await self._read(on_stream)
            except ProtocolError as error:
                fault = error
            nursery.cancel_scope.cancel()
        if fault is not None:
            raise fault
        return reason

    async def _read(self, on_stream: Callable[[MuxStream], None]) -> str:
        while True:
            try:
                data = await self._session.read()
            except IOException as error:
                return "closed here" if self.closed else str(error)
            self.last_received = trio.current_time()
            try:
                for event in self._yamux.receive(data):
                    match event:
                        case Received(state, piece):
                            self._streams[state].receive(piece)
                        case WindowGrew(state):
                            self._streams[state].wake()
                        case Opened(state):
                            self._streams[state] = stream = MuxStream(self, state)
                            on_stream(stream)
                        case Ended(state, reset):
                            stream = self._streams[state]
                            if reset or state.send_closed:
                                del self._streams[state]
                            stream.end()
                        case WentAway():
                            return "closed by the peer"
            except YamuxError as error:
                raise ProtocolError(str(error)) from error
            self._flush_soon()

    async def _flush(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            try:
                async with self._write_lock:
                    await self._send(self._yamux.data_to_send())
            except IOException:
                return  # the reader says why

    async def _send(self, data: bytes) -> None:
        if self.closed:
            raise ConnectionClosedError("the connection is closed")
        # Half a message would make every later one undecipherable; whoever gives up closes the connection
        # instead.
        with trio.CancelScope(shield=True):
            if self._tail:
                tail, self._tail = self._tail, b""
                await self.tcp.write(tail)
            await self._session.write(data)

    def write_now(self, state: StreamState, data: bytes | bytearray | memoryview) -> bool:
        """For streams: sends `data` in the task that calls, if it is one slice, its window is open and nobody
        else writes; else False, and nothing is sent."""
        size = len(data)
        if (
            self._write_lock.locked
            or self._tail
            or self.closed
            or state.send_closed
            or not 0 < size <= min(state.send_window, self._slice)
        ):
            return False
        first = self._yamux.data_to_send()
        sealed = self._session.seal(b"".join((first, self._yamux.data_header(state, size), data)))
        try:
            sent = self.tcp.write_now(sealed)
        except ConnectionClosedError:
            return True  # lost with the connection; the reader says why
        if sent < len(sealed):
            self._tail = sealed[sent:]
            self._wanted.set()
        return True

    async def write_slice(self, state: StreamState, data: memoryview) -> int:
        """For streams: sends the beginning of `data`.

        Returns how much. Small writes of others go between slices.
        """
        async with self._write_lock:
            if state.send_closed or self.closed:
                raise ConnectionClosedError("the stream has ended")
            size = min(len(data), state.send_window, self._slice)
            if size == 0:
                return 0
            started = trio.current_time()
            first = self._yamux.data_to_send()
            await self._send(b"".join((first, self._yamux.data_header(state, size), data[:size])))
            if size >= MIN_SLICE:
                rate = size / max(trio.current_time() - started, 1e-6)
                wanted = (3 * self._slice + rate * SLICE_S) / 4
                self._slice = int(min(max(wanted, MIN_SLICE), MAX_SLICE))
        return size

    def grant(self, state: StreamState, size: int) -> None:
        """For streams: lets the peer send more."""
        self._yamux.grant(state, size)
        self._flush_soon()

    def finish(self, state: StreamState) -> None:
        """For streams: nothing more will be sent."""
        self._yamux.finish(state)
        if state.receive_closed:
            self._streams.pop(state, None)
        self._flush_soon()

    def reset(self, state: StreamState) -> None:
        """For streams: both directions end."""
        self._yamux.reset(state)
        self._streams.pop(state, None)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._yamux.wants_to_send:
            self._wanted.set()

    async def finish_sending(self) -> None:
        """Says goodbye in the multiplexer's way and closes the sending side; what was sent still arrives."""
        self._yamux.go_away()
        try:
            async with self._write_lock:
                await self._send(self._yamux.data_to_send())
                await self.tcp.finish()  # in the lock: a write meanwhile is an error of the socket's
        except IOException:
            pass  # it was over already

    def close_now(self) -> None:
        """Closes at once; pending reads and writes end with ConnectionClosedError."""
        if self.closed:
            return
        self.closed = True
        self.tcp.close_now()
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.state.send_closed = stream.state.receive_closed = True
            stream.end()
