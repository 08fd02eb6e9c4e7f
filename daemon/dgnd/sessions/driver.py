"""Drives one session over its hops: sends steps while there is credit, waits for tokens, cancels.

The origin's half of the protocol in time; what is sent when is `OriginSession`'s, how hops are opened is
`dgnd.sessions.laying`'s. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dgnd.errors import (
    Cancelled,
    DgnError,
    Draining,
    NotReady,
    NotYet,
    PeerError,
    PeerGone,
    PeerSilent,
    ProtocolError,
    ShuttingDown,
    StaleState,
    TicketRefused,
    WorkerSilent,
    error_from,
)
from dgnd.routing.exactness import Line
from dgnd.routing.lineage import Lineage
from dgnd.sessions.driver_host import DriverHost
from dgnd.sessions.inbox import Inbox
from dgnd.sessions.kv_room import KvRoom, least_room
from dgnd.sessions.patience import LOOK_S, Patience
from dgnd.sessions.session import OriginSession, RouteHop
from dgnd.sessions.silence import Silence
from dgnd.wire.messages import (
    Cancel,
    CloseHop,
    Credit,
    EndTurn,
    Failure,
    Frame,
    HopKey,
    HopLength,
    HopOpened,
    PeerMessage,
    Probe,
    Sampling,
    StepFrame,
    TokenFrame,
)

CANCEL_TIMEOUT_S = 2.0
#: Without any progress of a step for this long the hops of the route are given up.
STEP_TIMEOUT_S = 120.0
#: Positions of a prompt in one step.
MAX_CHUNK = 128


#: After such a report the hop is as it was; after any other it is of no use to the session any more.
_STAYS = (PeerGone, PeerSilent, NotReady, NotYet, Draining)
#: After such a report the hop can be opened again where it is; after others somebody else is to try.
_COMES_BACK = (StaleState, TicketRefused)


@dataclass(frozen=True, slots=True)
class Waits:
    """An answer can't go on now: why, and until when it is tried, in trio's time."""

    error: DgnError
    deadline: float


class SessionDriver:
    """One session's conversation with its hops. At most one of its coroutines runs at a time."""

    def __init__(self, session: OriginSession, host: DriverHost, lease_s: float) -> None:
        self.session = session
        self.dead: set[int] = set()  #: hops of the route whose KV is gone, or can't be reached
        self.sound: set[int] = set()  #: hops that got everything that was sent, as long as they live
        self.lineage = Lineage()  #: how what the hops hold was computed
        self.exact = False  #: the answer has to be exact
        self.exactly: Line | None = None  #: how further hops of this answer must compute, where it matters
        self.positions = 0  #: how long the session may soon be, for room in KV caches
        self.leaving: set[int] = set()  #: hops that ask to be replaced soon, and go on until then
        self.reserve: list[RouteHop] = []  #: of those, what the next route does without, until it is laid
        self.waits: Waits | None = None
        self.host = host
        self.lease_s = lease_s
        self._laid = False
        self._told = ""  # the answer that the hops know to be theirs
        self._silence = Silence(host.patience_s)
        self._kv_room: KvRoom | None = None
        self._inbox = Inbox()

    @property
    def broken(self) -> DgnError | None:
        """Why the hops can't be used as they are."""
        return self._inbox.broken

    # --- news from the hops

    def deliver(self, sender: str, frame: Frame) -> None:
        """A frame for this session; one that does not come from the hop it speaks of is dropped."""
        message = frame.message
        key = getattr(message, "key", None)
        hop = next((h for h in self.hops if isinstance(key, HopKey) and h.hop == key.hop), None)
        if hop is None:
            return
        if sender == hop.peer:
            self._silence.heard(hop)
        if hop in self.reserve:
            if sender == hop.peer and isinstance(message, CloseHop | Failure):
                self.dead.add(hop.hop)
        elif isinstance(message, StepFrame):
            self._relay(sender, hop, frame)
        elif isinstance(message, Failure) and self._may_report(sender, hop):
            if message.kind == Draining.kind and message.tag != "open" and sender == hop.peer:
                self.leaving.add(hop.hop)  # what to do about it is `dgnd.origin.handover`'s
            else:
                self._failed(hop, message)
        elif sender != hop.peer:
            return
        elif isinstance(message, CloseHop):
            self.dead.add(hop.hop)
            self.fail(StaleState(f"{self.place(hop)} closed the session: {message.reason}"))
        elif isinstance(message, TokenFrame | Credit):
            now = (self.session.branch, self.session.route_number)
            if (message.branch, message.route) == now:
                self._queue(hop, message)
        elif isinstance(message, HopOpened | HopLength):
            self._queue(hop, message)

    def _failed(self, hop: RouteHop, message: Failure) -> None:
        """What a hop reported, or what its predecessor says of it."""
        error = self._reported(hop, message)
        stays = isinstance(error, _STAYS) or type(error) is PeerError
        if not stays:
            self.dead.add(hop.hop)
        if hop.hop not in self.sound or not (stays or isinstance(error, _COMES_BACK)):
            self.host.pass_over(hop.peer, self.session.model)
        if isinstance(error, WorkerSilent):
            self.host.suspect(hop.peer)
        self.fail(error)

    def _queue(self, hop: RouteHop, message: PeerMessage) -> None:
        if not self._inbox.put(message):
            self.fail(ProtocolError(f"{self.place(hop)} sends answers that nobody asked for"))

    def peer_down(self, peer: str, why: str) -> None:
        """A peer is gone; it matters if it is on the route."""
        self.dead.update(hop.hop for hop in self.hops if hop.peer == peer)
        gone = [hop for hop in self.session.route if hop.peer == peer]
        if gone:
            self.fail(PeerGone(f"{self.place(gone[0])}: {why}", peer=peer, span=str(gone[0].span)))

    def fail(self, error: DgnError) -> None:
        """The hops can't be used any more; whoever waits is told."""
        self._inbox.fail(error)

    def _reported(self, hop: RouteHop, message: Failure) -> DgnError:
        """What `hop` reported, named by who failed: a lost neighbour is not the fault of who noticed it."""
        lost = next((other for other in self.session.route if other.peer == message.data.get("peer")), None)
        if message.kind == PeerGone.kind and lost is not None:
            text = f"{self.place(lost)}: {self.host.peer_name(hop.peer)} lost the connection to it"
        else:
            text = f"{self.place(hop)}: {message.message}"
        if message.kind in (Cancelled.kind, ShuttingDown.kind):  # that is not for a hop to say
            return ProtocolError(text)
        return error_from(message.kind, text, {**message.data, "span": str(hop.span)})

    def _may_report(self, sender: str, hop: RouteHop) -> bool:
        """A hop reports itself; its predecessor reports that it can't reach it."""
        index = self.session.route.index(hop)
        return sender == hop.peer or (index > 0 and sender == self.session.route[index - 1].peer)

    def _relay(self, sender: str, hop: RouteHop, frame: Frame) -> None:
        index = self.session.route.index(hop)
        before = self.session.route[index - 1] if index else None
        if before is not None and before.relayed and before.peer == sender:
            self.host.post(hop.peer, frame)

    def place(self, hop: RouteHop) -> str:
        return f"{self.host.peer_name(hop.peer)} ({hop.span})"

    # --- the route

    @property
    def hops(self) -> list[RouteHop]:
        """All that are open as far as is known: those of the route, and those in reserve."""
        return [*self.session.route, *self.reserve]

    @property
    def line(self) -> Line:
        """How each unit of the model is computed on the route."""
        return {unit: hop.way for hop in self.session.route for unit in hop.span.units()}

    @property
    def usable(self) -> bool:
        """Whether steps can be sent."""
        return self._laid and self.broken is None

    @property
    def half_laid(self) -> bool:
        """Whether hops were opened, but not all of them, or not filled."""
        return bool(self.session.route) and not self._laid

    def begin_route(self, route: tuple[RouteHop, ...]) -> None:
        """Takes other hops, which are to be opened; what came from the ones before no longer counts. Those
        that are about to leave stay open in reserve, as they still have what the new ones lack."""
        ids = {hop.hop for hop in route}
        others, self.reserve = [hop for hop in self.hops if hop.hop not in ids], []
        for hop in others:
            if hop.hop in self.leaving & self.sound - self.dead:
                self.reserve.append(hop)
            else:
                self.close_hop(hop)
        self._laid = False
        self._told = self.session.generation  # in the tickets
        self._inbox.open()
        self.session.set_route(route)
        known = {hop.hop for hop in self.hops}
        self.dead &= known
        self.leaving &= known

    def end_route(self, common: int, fresh: Collection[int], window: int) -> None:
        """All hops are open and hold `common` positions, those with the units `fresh` since now. `window`:
        steps that may be under way."""
        session = self.session
        self._give_up_reserve()
        session.resume(common, window, new=len(fresh) == len(self.line))
        self.lineage.through(self.line, fresh, common)
        self.sound = {hop.hop for hop in session.route}
        self._laid, self.waits = True, None

    def _give_up_reserve(self) -> None:
        for hop in self.reserve:
            self.close_hop(hop)
            self.leaving.discard(hop.hop)
        self.reserve.clear()

    def note_rooms(self, opened: Mapping[int, HopOpened]) -> None:
        """Remembers which of the hops just opened can hold least."""
        self._kv_room = least_room((self.place(hop), opened[hop.hop]) for hop in self.session.route)

    def room_for(self, prompt: int) -> int | None:
        """How many tokens may follow a prompt of so many positions on the hops that are open; None where no
        hop knows a bound. Raises LimitError where its KV can never fit."""
        return None if self._kv_room is None else self._kv_room.after(prompt)

    def close(self) -> None:
        """Frees the hops, wherever they are; those that are gone don't mind."""
        self._give_up_reserve()
        for hop in self.session.route:
            self.close_hop(hop)
        self.session.drop_route()
        self.lineage.clear()
        self._laid, self.waits = False, None
        self.dead.clear()
        self.leaving.clear()

    def let_go(self) -> None:
        """Between two answers: gives up the hops that are about to leave; the next answer finds others."""
        for hop in self.session.route:
            if hop.hop in self.leaving:
                self.dead.add(hop.hop)
                self.close_hop(hop)
                self.fail(Draining(f"{self.place(hop)} was about to leave"))
        self.leaving.clear()

    def close_hop(self, hop: RouteHop) -> None:
        """Frees one hop."""
        self.host.post(hop.peer, Frame(CloseHop(key=self.session.key(hop.hop))))

    # --- a turn

    def tell_generation(self) -> None:
        """Hops that stay from the answer before learn which one they are for now; for their logs alone."""
        if self._told != self.session.generation:
            self._told = self.session.generation
            self._probe()

    def set_tokens(self, tokens: Sequence[int]) -> None:
        """What the session goes on from; what the hops hold of other ids is given up."""
        self.session.set_tokens(tokens)
        self.lineage.truncate(self.session.sent)

    def tell_history(self, answer_start: int) -> None:
        """Gives the head's hop the token ids, for penalties."""
        self.session.begin_branch()
        self.host.post(self.session.head.peer, self.session.history(answer_start))

    def send_steps(self, sampling: Sampling, allowed: bytes | None = None) -> None:
        """Sends what is unsent, as far as there is credit. `allowed`: as in `OriginSession.next_step`."""
        while (frame := self.session.next_step(sampling, MAX_CHUNK, allowed)) is not None:
            self.host.post(self.session.route[0].peer, frame)

    async def next_token(self, sampling: Sampling, allowed: bytes | None = None) -> TokenFrame:
        """Sends what is unsent and returns the token picked for the next position; the session is not
        changed by it.

        Raises what a hop reported, or PeerError when nothing moves for STEP_TIMEOUT_S.
        """
        session = self.session
        patience = Patience(STEP_TIMEOUT_S)
        while True:
            self.send_steps(sampling, allowed)
            message = await self.next_message(patience)
            if message is None:
                where = self.give_up_on(session.route)
                error = PeerError(f"no progress for {STEP_TIMEOUT_S:.0f} s on the route {where}")
                self.fail(error)
                raise error
            if isinstance(message, Credit):
                if session.credit(message.stop):
                    patience.renew()
            elif isinstance(message, TokenFrame):
                session.credit(message.position)
                if message.position == len(session.tokens):
                    return message

    async def end_turn(self, interrupted: bool) -> None:
        """Ends an answer: hops say how far they are. After an interruption they first drop what waits."""
        if not self.usable:
            return
        ask: type[Cancel] | type[EndTurn] = Cancel if interrupted else EndTurn
        branch = self.session.branch
        waiting = {hop.hop for hop in self.session.route}
        lengths: list[int] = []
        for hop in self.session.route:
            self.host.post(hop.peer, Frame(ask(key=self.session.key(hop.hop), branch=branch)))
        try:
            patience = Patience(CANCEL_TIMEOUT_S)
            while waiting and (message := await self.next_message(patience)) is not None:
                if isinstance(message, HopLength) and message.key.hop in waiting:
                    waiting.remove(message.key.hop)
                    lengths.append(message.length)
                    patience.renew()
        except DgnError:
            return  # told to the next turn by self.broken
        if waiting:
            self.fail(PeerError("a hop did not say where it stopped"))
        elif interrupted or min(lengths) < self.session.sent:
            self.session.hops_stopped_at(lengths)

    def blamed(self, hop: RouteHop, what: str) -> ProtocolError:
        """The error of a hop that `what` says of; the hop is of no use any more."""
        error = ProtocolError(f"{self.give_up_on([hop])} {what}")
        self.fail(error)
        return error

    def give_up_on(self, hops: Sequence[RouteHop]) -> str:
        """None of `hops` is used again if others can be: those that are at fault, or may be where that can't
        be told. Returns their names."""
        self.dead.update(hop.hop for hop in hops)
        for hop in hops:
            self.host.pass_over(hop.peer, self.session.model)
        return ", ".join(self.place(hop) for hop in hops)

    async def next_message(self, patience: Patience) -> PeerMessage | None:
        """What a hop says next, None when `patience` is over; raises `broken`.

        Meanwhile the hops are looked after, so that one that hangs is found. The caller renews `patience`
        where what came was what it waits for.
        """
        return await self._inbox.next(patience, self._look_after_hops)

    def _look_after_hops(self) -> None:
        """Connections to them are looked at here; each hop looks at its worker and the connection onward. One
        that does not say that it will is passed over."""
        self._silence.wait(LOOK_S)
        for hop, waited in self._silence.silent(self.session.route):
            self.dead.add(hop.hop)
            self.host.suspect(hop.peer)
            text = f"{self.place(hop)} answers pings, but nothing about this session for {waited:.1f} s"
            self.fail(PeerSilent(f"{text}; it is passed over", peer=hop.peer))
        for peer in dict.fromkeys(hop.peer for hop in self.session.route):
            self.host.nudge(peer)
        self._probe()
        self._silence.probed(self.session.route)

    def _probe(self) -> None:
        for hop in self.session.route:
            probe = Probe(key=self.session.key(hop.hop), generation=self.session.generation)
            self.host.post(hop.peer, Frame(probe))
