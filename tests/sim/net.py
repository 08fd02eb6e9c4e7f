"""A network in memory, as `dgnd.node` needs it: connections between nodes, frames in order within each class.

Frames go through the real codec. A connection has two ends, each of which learns by itself that it is over:
at once by an EOF, which comes after what was sent before (or, as a reset, instead of it), or late, by
silence.
A node that is frozen neither reads nor sends; a link that is cut holds everything back until it heals.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import trio

from dgnd.errors import PeerGone
from dgnd.p2p.heartbeat import NUDGE_S
from dgnd.p2p.settings import NetworkHandlers, NetworkSettings
from dgnd.wire.codec import encode_bytes
from dgnd.wire.decoder import PEER, FrameDecoder
from dgnd.wire.limits import DEFAULT_LIMITS
from dgnd.wire.messages import Frame, Hello

GONE_S = NetworkSettings().gone_s
#: What may be done to one frame. `corrupt`: the receiver's cipher finds out, and the connection ends.
Fault = Literal["delay", "duplicate", "corrupt", "cut"]
#: How a node ends, as others see it: its kernel closes its connections, resets them, or is gone too.
Death = Literal["eof", "reset", "silent"]
_TICKS = 20
#: Of one frame, from and to.
DELAY_S = (0.0005, 0.004)


def untouched(sender: str, receiver: str, frame: Frame) -> Fault | None:
    """Nothing happens to the frame."""
    return None


class End:
    """One node's side of a connection."""

    def __init__(self, owner: SimNetwork, peer: str, pair: Pair) -> None:
        self.owner = owner
        self.peer = peer
        self.pair = pair
        self.up = False
        self.over = ""
        self.other: End
        self.heard = 0  # frames
        self.said: Hello | None = None
        self._came_up = trio.Event()
        self._due = {False: 0.0, True: 0.0}
        self._lanes = {
            bulk: trio.open_memory_channel[tuple[float, bytes]](math.inf) for bulk in (False, True)
        }

    def start(self, nursery: trio.Nursery) -> None:
        """Begins with Hello."""
        for bulk in (False, True):
            nursery.start_soon(self._carry, bulk)
        self.said = self.owner.handlers.hello()
        self.send(Frame(self.said), False)

    def send(self, frame: Frame, bulk: bool, more_s: float = 0.0, times: int = 1) -> None:
        """Puts a frame on its way to the other end, which it reaches `more_s` later than others."""
        net = self.owner.net
        data = encode_bytes(frame)
        net.note("send", self.owner.me, self.peer, data)
        for _ in range(times):
            self.other._put(data, bulk, net.delay() + self.pair.further_s + more_s)

    def _put(self, data: bytes, bulk: bool, delay: float) -> None:
        if self.over:
            return  # and the sender has not noticed yet
        due = self._due[bulk] = max(self._due[bulk], trio.current_time() + delay)
        self._lanes[bulk][0].send_nowait((due, data))

    def end_of_stream(self) -> None:
        """The other end closed: this one sees it after all that was sent before."""
        self._due[False] = max(self._due.values())
        self._put(b"", False, self.owner.net.delay())

    async def reset(self) -> None:
        """The other end is gone with what was under way."""
        await trio.sleep(self.owner.net.delay())
        await self.owner.net.passable(self)
        self.fail("connection reset")

    async def _carry(self, bulk: bool) -> None:
        async for due, data in self._lanes[bulk][1]:
            await trio.sleep_until(due)
            await self.owner.net.passable(self)
            if bulk and not self.up:
                await self._came_up.wait()
            if self.over:
                return
            if not data:
                self.fail("it closed its stream")
                return
            decoder = FrameDecoder(DEFAULT_LIMITS, PEER)
            decoder.receive_data(data)
            frame = decoder.next_frame()
            assert frame is not None
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        self.heard += 1
        if not isinstance(frame.message, Hello):
            self.owner.handlers.on_frame(self.peer, frame)
            return
        self.up = True
        self._came_up.set()
        self.owner.net.note("up", self.owner.me, self.peer)
        self.owner.handlers.on_up(self.peer, frame.message)
        now = self.owner.handlers.hello()
        assert self.said is not None
        if (now.offers, now.peers) != (self.said.offers, self.said.peers):
            self.send(Frame(now.update), False)

    def fail(self, why: str, tell: bool = True) -> None:
        """This end is over; the other one learns of it by `tell`."""
        if self.over:
            return
        self.over, was_up, self.up = why, self.up, False
        self._came_up.set()
        for send, _ in self._lanes.values():
            send.close()
        if self.owner.ends.get(self.peer) is self:
            del self.owner.ends[self.peer]
        if tell and not self.other.over:
            self.other.end_of_stream()
        self.owner.net.note("down", self.owner.me, self.peer, why.encode())
        if was_up and self.owner.alive:
            self.owner.handlers.on_down(self.peer, why)
        self.pair.wake()


@dataclass
class Pair:
    """Two nodes that may connect. `cut`: nothing passes between them."""

    peers: tuple[str, str]
    cut: bool = False
    further_s: float = 0.0  #: more than usual, one way
    changed: trio.Event = field(default_factory=trio.Event)

    def wake(self) -> None:
        """Something about it is new."""
        self.changed.set()
        self.changed = trio.Event()


class Internet:
    """All nodes' networks and the connections between them."""

    def __init__(self, rng: random.Random, note: Callable[..., None], nursery: trio.Nursery) -> None:
        self.rng = rng
        self.note = note
        self.nursery = nursery
        self.nodes: dict[str, SimNetwork] = {}
        self.frozen: set[str] = set()
        #: Asked about every frame, with its sender and receiver.
        self.tamper: Callable[[str, str, Frame], Fault | None] = untouched
        self._pairs: dict[tuple[str, str], Pair] = {}
        self._changed = trio.Event()

    def delay(self) -> float:
        """Of one frame, in seconds."""
        return self.rng.uniform(*DELAY_S)

    def pair(self, a: str, b: str) -> Pair:
        """The pair, made when first named; from then on it is kept connected."""
        key = (min(a, b), max(a, b))
        if key not in self._pairs:
            self._pairs[key] = Pair(key)
            self.nursery.start_soon(self._keep, self._pairs[key])
        return self._pairs[key]

    # --- what happens to nodes and links

    def join(self, network: SimNetwork) -> None:
        """A node has started."""
        self.nodes[network.me] = network
        self.wake()

    def kill(self, peer: str, death: Death) -> None:
        """A node's process is gone: what it had not sent will never be."""
        network = self.nodes.pop(peer)
        network.alive = False
        self.frozen.discard(peer)
        for end in list(network.ends.values()):
            end.fail("killed", tell=death == "eof")
            if death == "reset":
                self.nursery.start_soon(end.other.reset)
            elif death == "silent":
                self.nursery.start_soon(self._notice_silence, end.other)
        self.wake()

    def slow_link(self, a: str, b: str, further_s: float) -> None:
        """All that goes between the two takes longer, one way, from now on."""
        self.pair(a, b).further_s = further_s

    def freeze(self, peer: str, frozen: bool) -> None:
        """SIGSTOP and SIGCONT."""
        (self.frozen.add if frozen else self.frozen.discard)(peer)
        if frozen:
            for end in self.nodes[peer].ends.values():
                self.nursery.start_soon(self._notice_silence, end.other)
        self.wake()

    def cut(self, a: str, b: str, cut: bool) -> None:
        """The link between two nodes breaks without a sign, or heals."""
        pair = self.pair(a, b)
        pair.cut = cut
        if cut:
            for me, peer in ((a, b), (b, a)):
                end = self.nodes[me].ends.get(peer) if me in self.nodes else None
                if end is not None:
                    self.nursery.start_soon(self._notice_silence, end)
        self.wake()

    def wake(self) -> None:
        """What could not pass may pass now."""
        self._changed.set()
        self._changed = trio.Event()
        for pair in self._pairs.values():
            pair.wake()

    # --- what passes

    async def passable(self, end: End) -> None:
        """Waits until bytes on their way to `end` can be read there."""
        while not end.over and (end.pair.cut or end.owner.me in self.frozen):
            await self._changed.wait()

    def reaches(self, end: End) -> bool:
        """Whether the other end would answer a ping."""
        peer = end.other.owner
        return peer.alive and not end.other.over and not end.pair.cut and end.peer not in self.frozen

    async def _notice_silence(self, end: End) -> None:
        heard = end.heard
        for _ in range(_TICKS):
            await trio.sleep(GONE_S / _TICKS)
            if end.over or self.reaches(end) or end.heard > heard:
                return
        if end.owner.me not in self.frozen:
            end.fail(f"no sign of life for {GONE_S:g} s")

    # --- connecting

    async def _keep(self, pair: Pair) -> None:
        while True:
            if not self._may_connect(pair):
                await pair.changed.wait()
                continue
            await trio.sleep(self.rng.uniform(0.05, 0.6))
            if not self._may_connect(pair):
                continue
            a, b = (self.nodes[peer] for peer in pair.peers)
            old = [end for net, peer in ((a, b.me), (b, a.me)) for end in [net.ends.get(peer)] if end]
            if old:  # one end has not noticed yet: it is asked whether anybody is there, see p2p's `choose`
                await trio.sleep(1.0)
                for end in old:
                    end.fail("replaced by a newer connection", tell=False)
                if not self._may_connect(pair):
                    continue
                a, b = (self.nodes[peer] for peer in pair.peers)
            ends = End(a, b.me, pair), End(b, a.me, pair)
            ends[0].other, ends[1].other = ends[1], ends[0]
            for end in ends:
                end.owner.ends[end.peer] = end
            for end in ends:
                end.start(self.nursery)

    def _may_connect(self, pair: Pair) -> bool:
        if pair.cut or any(peer not in self.nodes or peer in self.frozen for peer in pair.peers):
            return False
        a, b = (self.nodes[peer] for peer in pair.peers)
        if not (a.is_allowed(b.me) and b.is_allowed(a.me)):
            return False
        one, other = a.ends.get(b.me), b.ends.get(a.me)
        return one is None or other is None or one.other is not other


class SimNetwork:
    """One node's network: what `dgnd.node` uses of `dgnd.p2p.network.PeerNetwork`."""

    def __init__(self, net: Internet, me: str, handlers: NetworkHandlers) -> None:
        self.net = net
        self.me = me
        self.handlers = handlers
        self.alive = False
        self.ends: dict[str, End] = {}
        self._allowed: set[str] = set()
        self._nudged: set[str] = set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        self.alive = True
        self.net.join(self)
        task_status.started()
        await trio.sleep_forever()

    def allow(self, peer_id: str, name: str, addrs: tuple[str, ...] = ()) -> None:
        """Lets a peer in, and keeps connected with it."""
        self._allowed.add(peer_id)
        self.net.pair(self.me, peer_id)

    def is_allowed(self, peer_id: str) -> bool:
        """Whether the peer may connect."""
        return peer_id in self._allowed

    def is_up(self, peer_id: str) -> bool:
        """Whether frames can be sent to the peer now."""
        return peer_id in self.ends and self.ends[peer_id].up

    def send_now(self, peer_id: str, frame: Frame, bulk: bool) -> bool:
        """Never: what may happen to a frame happens on the other way."""
        return False

    async def send(self, peer_id: str, frame: Frame, *, bulk: bool = False) -> None:
        """As PeerNetwork's; something may happen to the frame on its way."""
        net = self.net
        await trio.lowlevel.checkpoint()
        while self.me in net.frozen:
            await net._changed.wait()
        end = self.ends.get(peer_id)
        if not self.alive or end is None or not end.up:
            raise PeerGone(f"{peer_id} is not connected", peer=peer_id)
        match net.tamper(self.me, peer_id, frame):
            case None:
                end.send(frame, bulk)
            case "delay":
                end.send(frame, bulk, more_s=net.rng.uniform(0.05, 1.5))
            case "duplicate":
                end.send(frame, bulk, times=2)
            case "corrupt":
                end.other.fail("what came can't be decrypted")
            case "cut":
                end.send(frame, bulk)
                net.cut(self.me, peer_id, True)
                net.nursery.start_soon(self._heal, peer_id, net.rng.uniform(0.1, 9.0))

    async def _heal(self, peer: str, after_s: float) -> None:
        await trio.sleep(after_s)
        self.net.cut(self.me, peer, False)

    def round_trips(self) -> dict[str, float]:
        """Of connected peers, as the delays of frames are drawn."""
        usual_s = statistics.fmean(DELAY_S)
        return {peer: 2000 * (usual_s + end.pair.further_s) for peer, end in self.ends.items() if end.up}

    def trip_s(self, peer_id: str) -> float | None:
        """As PeerNetwork's."""
        return None

    def announce(self) -> None:
        """What Hello says has changed."""
        now = self.handlers.hello()
        for end in self.ends.values():
            if end.up:
                end.send(Frame(now.update), False)

    def patience_s(self, peer_id: str) -> float:
        """As PeerNetwork's."""
        return NUDGE_S

    def nudge(self, peer_id: str) -> None:
        """An answer waits for the peer."""
        end = self.ends.get(peer_id)
        if end is not None and end.up and peer_id not in self._nudged:
            self._nudged.add(peer_id)
            self.net.nursery.start_soon(self._nudge, end)

    async def _nudge(self, end: End) -> None:
        heard = end.heard
        for _ in range(_TICKS):
            await trio.sleep(NUDGE_S / _TICKS)
            if end.over or end.heard > heard or self.net.reaches(end):
                break
        else:
            if self.me not in self.net.frozen:
                end.fail("no sign of life while an answer waits for it")
        self._nudged.discard(end.peer)
