"""One peer's connection as frames: two streams, Hello both ways, a heartbeat, and what a peer may not do.

The peer with the smaller id chooses: it answers a Hello with its own on the one connection that it keeps, and
says Goodbye on others. So when both dial at once they agree on one, and neither ever takes one back.

Frames go to the owner from the reader, at once; what has to be answered is sent by another task. Knows no
peers but its own, and nothing of addresses or of what frames beyond Hello mean.
"""

from __future__ import annotations

import logging
import math
from functools import partial

import msgspec
import trio
from libp2p.io.exceptions import IOException

from dgnd.errors import PeerError, PeerGone, ProtocolError, UnknownMessage
from dgnd.p2p import negotiate, standard
from dgnd.p2p.heartbeat import Heartbeat
from dgnd.p2p.host import Connection
from dgnd.p2p.muxer import MuxStream
from dgnd.p2p.outbox import QUEUED, Outbox
from dgnd.p2p.owner import LinkOwner
from dgnd.p2p.settings import NetworkSettings
from dgnd.p2p.write_lock import WriteLock
from dgnd.wire import codec
from dgnd.wire.decoder import PEER, FrameDecoder
from dgnd.wire.limits import tag_of
from dgnd.wire.messages import Failure, Frame, Goodbye, Hello, Offers, PeerMessage, Ping, Pong
from dgnd.wire.plain_text import in_plain_words

log = logging.getLogger("dgnd.p2p")

DUPLICATE = "there is another connection"
#: All others are the owner's alone.
_ABOUT_THE_LINK = (Goodbye, Hello, Ping, Pong, Offers)


class Link:
    """A connection that becomes usable with Hello both ways (`is_up`) and is used until it ends (`ended`)."""

    def __init__(self, connection: Connection, me: str, settings: NetworkSettings, owner: LinkOwner) -> None:
        self.peer_id = connection.peer_id
        self.connection = connection
        self.is_up = False
        self.was_up = False
        self.hello: Hello | None = None
        self.error: PeerError | None = None  #: why it ended
        self.settled = trio.Event()  #: up, or ended
        self.ended = trio.Event()
        self.heartbeat = Heartbeat(
            settings, lambda nonce: self.say(Ping(nonce=nonce)), lambda: connection.mux.last_received
        )
        self._mux = connection.mux
        self._settings = settings
        self._owner = owner
        self._chooser = me < connection.peer_id
        self._streams: dict[str, MuxStream] = {}
        self._locks = {negotiate.CONTROL: WriteLock(), negotiate.BULK: WriteLock()}
        self._streams_ready = trio.Event()
        self._their_hello = trio.Event()
        self._said: Hello | None = None
        self._early: list[Frame] = []
        self._nudged = False
        self._standard_streams = 0
        self._outbox = Outbox()
        self._nursery: trio.Nursery | None = None

    # --- its life

    async def run(self) -> None:
        """Until the connection ends; then everything is closed and the owner told."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._watch)
                nursery.start_soon(self._send_waiting)
                nursery.start_soon(self._greet)
                try:
                    self.fail(PeerGone(await self._mux.run(self._on_stream)))
                except ProtocolError as error:
                    self.fail(error, close=False)
                    await self.say_goodbye(error.message)
                nursery.cancel_scope.cancel()
        finally:
            if self.error is None:
                cancelled = trio.current_effective_deadline() == -math.inf
                with trio.CancelScope(shield=True):
                    await self.say_goodbye("shutting down" if cancelled else "a fault here, see the log")
            self._mux.close_now()

    def fail(self, error: PeerError, close: bool = True) -> None:
        """Ends the link for `error`; only the first one counts."""
        if self.error is None:
            if isinstance(error, ProtocolError):
                log.warning("%s: closing the connection: %s", self.peer_id, error.message)
            self.error = error
            self.is_up = False
            self.settled.set()
            self.ended.set()
            self._owner.down(self)
        if close:
            self._mux.close_now()

    async def say_goodbye(self, reason: str) -> None:
        """Ends the link, telling the peer why if it listens; takes at most the settings' `goodbye_s`."""
        self.fail(PeerGone(reason), close=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._close_later)
            try:
                if negotiate.CONTROL in self._streams:
                    await self._write(Frame(Goodbye(reason=reason[:500])), negotiate.CONTROL)
                await self._mux.finish_sending()
            except PeerGone:
                pass  # it was over already
            nursery.cancel_scope.cancel()
        self._mux.close_now()

    async def _close_later(self) -> None:
        await trio.sleep(self._settings.goodbye_s)
        self._mux.close_now()  # not a cancellation: writes are shielded from those

    def nudge(self) -> None:
        """Ends the link soon if the peer gives no sign of life; asked for where an answer waits for it."""
        if self.is_up and not self._nudged and self._nursery is not None:
            self._nudged = True
            self._nursery.start_soon(self._nudge)

    async def _nudge(self) -> None:
        if not await self.heartbeat.lives():
            self.fail(PeerGone("no sign of life while an answer waits for it"))
        self._nudged = False

    async def _watch(self) -> None:
        self.fail(PeerGone(await self.heartbeat.watch(lambda: self.is_up)))

    # --- streams and the greeting

    def _on_stream(self, stream: MuxStream) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._accept_stream, stream)

    async def _accept_stream(self, stream: MuxStream) -> None:
        ours = () if self.connection.dialled else (negotiate.CONTROL, negotiate.BULK)
        wanted = (*ours, standard.PING, standard.IDENTIFY)
        try:
            protocol = await negotiate.accept(stream, wanted, self._settings.handshake_s)
        except negotiate.NotAgreed as error:
            log.debug("%s: a stream for something else: %s", self.peer_id, error)
            stream.reset()
            return
        if protocol not in ours:
            return await self._serve_standard(protocol, stream)
        if protocol in self._streams:
            log.debug("%s: opened %s a second time", self.peer_id, protocol)
            stream.reset()
            return
        self._attach(protocol, stream)

    async def _serve_standard(self, protocol: str, stream: MuxStream) -> None:
        if self._standard_streams >= standard.MOST:
            log.debug("%s: more than %d streams of %s", self.peer_id, standard.MOST, protocol)
            return stream.reset()
        self._standard_streams += 1
        try:
            if protocol == standard.PING:
                await standard.answer_pings(stream)
            else:
                message = self._owner.identify(self)
                await standard.identify(stream, message, self._settings.handshake_s)
        finally:
            self._standard_streams -= 1

    def _attach(self, protocol: str, stream: MuxStream) -> None:
        self._streams[protocol] = stream
        decoder = FrameDecoder(self._settings.limits, PEER)
        try:
            stream.attach(partial(self._received, decoder), self._stream_ended)
        except ProtocolError as error:
            self.fail(error)
        if len(self._streams) == len(self._locks):
            self._streams_ready.set()

    def _stream_ended(self) -> None:
        self.fail(PeerGone("it closed its stream"))

    async def _greet(self) -> None:
        try:
            if self.connection.dialled:
                for protocol in (negotiate.CONTROL, negotiate.BULK):
                    stream = self._mux.open_stream()
                    await negotiate.propose(stream, protocol, self._settings.handshake_s)
                    self._attach(protocol, stream)
            await self._streams_ready.wait()
            if not self._chooser:
                await self._say_hello()
            await self._their_hello.wait()
            if self._chooser:
                if not await self._owner.choose(self):
                    return await self.say_goodbye(DUPLICATE)
                await self._say_hello()
                self._go_up()
        except negotiate.NotAgreed as error:
            self.fail(PeerGone(f"it does not speak {negotiate.CONTROL}: {error}"))
        except PeerGone:
            pass  # the reader says why

    async def _say_hello(self) -> None:
        self._said = self._owner.hello()
        await self._write(Frame(self._said), negotiate.CONTROL)

    def _greeted(self, hello: Hello) -> None:
        if self.hello is not None:
            raise ProtocolError("a second Hello")
        codec.negotiate(self._owner.hello().versions, hello.versions)
        if not self._owner.admits(self):
            return self.fail(PeerGone("not allowed any more"))
        self.hello = hello
        self._their_hello.set()
        if not self._chooser:
            if self._said is None:
                raise ProtocolError("it said Hello before its turn")
            self._go_up()

    def _go_up(self) -> None:
        if self.error is not None:
            return
        self.is_up = self.was_up = True
        self._owner.up(self)
        self.settled.set()
        self.heartbeat.ping()
        now, said = self._owner.hello(), self._said
        if said is not None and (now.offers, now.peers) != (said.offers, said.peers):
            self.say(now.update)
        early, self._early = self._early, []
        try:
            for frame in early:
                self._frame(frame)
        except ProtocolError as error:
            self.fail(error)

    # --- frames that come

    def _received(self, decoder: FrameDecoder, data: bytes | memoryview) -> None:
        decoder.receive_data(data)
        while self.error is None:
            try:
                frame = decoder.next_frame()
            except UnknownMessage as error:
                log.debug("%s: %s", self.peer_id, error.message)
                self.say(codec.failure_of(error, tag=str(error.data.get("tag", ""))))
                continue
            if frame is None:
                return
            self._frame(frame)

    def _frame(self, frame: Frame) -> None:
        plain = in_plain_words(frame.message)
        frame = frame if plain is frame.message else Frame(plain, frame.payload)
        if self.is_up and not isinstance(plain, _ABOUT_THE_LINK):
            return self._hand_over(frame)
        match plain:
            case Goodbye(reason=reason):
                self.fail(PeerGone(f"it said goodbye: {reason}"))
            case Hello() as hello:
                self._greeted(hello)
            case message if not self.is_up:
                # The chooser's Hello is out and the answer faster than our own task; else it is too early.
                if not (self._chooser and self._said is not None) or len(self._early) >= QUEUED:
                    raise ProtocolError(f"a message {tag_of(message)!r} before Hello")
                self._early.append(frame)
            case Ping(nonce=nonce):
                self.say(Pong(nonce=nonce))
            case Pong(nonce=nonce):
                self.heartbeat.pong(nonce)
            case Offers() as said:
                assert self.hello is not None  # or it would not be up
                self.hello = msgspec.structs.replace(
                    self.hello, offers=said.offers, peers=said.peers, trips=said.trips
                )
                self._hand_over(frame)

    def _hand_over(self, frame: Frame) -> None:
        try:
            self._owner.frame(self, frame)
        except Exception:  # a fault of ours in one frame must not end the connection, nor go unanswered
            tag = tag_of(frame.message)
            log.exception("%s: a message %r could not be handled", self.peer_id, tag)
            if isinstance(frame.message, Failure):
                return  # or two faulty nodes would answer each other for ever
            key, branch = getattr(frame.message, "key", None), getattr(frame.message, "branch", 0)
            line = f"a fault while handling a message {tag!r}; see that node's log"
            self.say(Failure(kind="internal", message=line, key=key, branch=branch, tag=tag))

    # --- frames that go

    def say(self, message: PeerMessage) -> None:
        """Sends a small message soon, without waiting; ends the link when too many wait."""
        try:
            self._outbox.put(message)
        except ProtocolError as error:
            self.fail(error)

    async def _send_waiting(self) -> None:
        try:
            await self._streams_ready.wait()
            while True:
                await self._write(Frame(await self._outbox.take()), negotiate.CONTROL)
        except PeerGone:
            pass  # the reader says why

    async def send(self, frame: Frame, bulk: bool) -> None:
        """Sends a frame; small ones pass big ones of the other class.

        A frame once begun is sent to its end, also when the caller is cancelled. Raises PeerGone, and
        ProtocolError for a frame that no peer would take.
        """
        if not self.is_up:
            raise PeerGone(self.error.message if self.error else "not connected yet")
        await self._write(frame, negotiate.BULK if bulk else negotiate.CONTROL)

    def send_now(self, frame: Frame, bulk: bool) -> bool:
        """As `send`, where nothing has to be waited for; else False, and nothing is sent. Raises
        ProtocolError."""
        protocol = negotiate.BULK if bulk else negotiate.CONTROL
        if not self.is_up or self._locks[protocol].locked:
            return False
        pieces = codec.encode_for_stream(frame, self._settings.limits)
        return len(pieces) == 1 and self._streams[protocol].write_now(pieces[0])

    async def _write(self, frame: Frame, protocol: str) -> None:
        pieces = codec.encode_for_stream(frame, self._settings.limits)
        try:
            async with self._locks[protocol]:
                with trio.CancelScope(shield=True):
                    for piece in pieces:
                        await self._streams[protocol].write(piece)
        except IOException as error:
            raise PeerGone(self.error.message if self.error else str(error)) from error
