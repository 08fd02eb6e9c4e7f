"""The hop server: sessions of origins that run through blocks of this node.

It opens a hop for a valid ticket, lets frames through that the fence admits, and hands steps to the worker.
Everything arrives through callbacks that never block. Knows nothing of text or sampling.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable

from dgn_backends.tensor import Tensor
from dgnd.errors import (
    DgnError,
    Draining,
    LimitError,
    NotReady,
    PeerGone,
    ProtocolError,
    StaleState,
    TicketRefused,
    WorkerDied,
    WorkerSilent,
)
from dgnd.hosting.admission import Admission, HopHost, claimed_key
from dgnd.hosting.hop import Hop
from dgnd.hosting.journal import JournalBook
from dgnd.hosting.leaving import Leaving
from dgnd.hosting.replays import Replays
from dgnd.hosting.results import HopResults
from dgnd.hosting.table import HopTable
from dgnd.wire import q8
from dgnd.wire.codec import failure_of
from dgnd.wire.fencing import AlreadyHave, Compute, Drop, HopFence, Reject
from dgnd.wire.limits import tag_of
from dgnd.wire.messages import (
    Alive,
    Cancel,
    CloseHop,
    EndTurn,
    Failure,
    Frame,
    History,
    HopKey,
    HopLength,
    OpenHop,
    OpenSequence,
    Probe,
    Replay,
    StepFrame,
    Ticket,
)
from dgnd.wire.ticket import TicketBook

log = logging.getLogger("dgnd.hops")

#: Between two warnings about one peer; what it sends in between is told to it alone.
QUIET_S = 1.0


class HopServer:
    """All hops of this node, by key."""

    def __init__(self, host: HopHost, tickets: TicketBook, max_sessions: int, journal_bytes: int) -> None:
        """`max_sessions`: of each origin, so that others never take this node's own room. `journal_bytes`:
        of all journals together."""
        self._host = host
        self._admission = Admission(host, tickets, max_sessions)
        self._table = HopTable(host, JournalBook(journal_bytes))
        self._results = HopResults(host, self._table)
        self._replays = Replays(self._table, self._results)
        self.hops, self.journals = self._table.hops, self._table.journals
        self.on_worker_frame = self._results.on_worker_frame
        self.leaving = Leaving()  #: where no new hop is opened
        self._quiet_until: dict[str, float] = {}  # by peer, of which there are few

    # --- from peers and from this node's own engine

    def on_frame(self, sender: str, frame: Frame) -> None:
        """One frame from an authenticated sender (this node's id for its own)."""
        message = frame.message
        try:
            match message:
                case StepFrame():
                    self._step(sender, message, frame.payload)
                case OpenHop():
                    self._open(sender, message)
                case History() | Cancel() | EndTurn() | CloseHop() | Replay() | Probe():
                    self._control(sender, message, frame.payload)
                case Failure(key=HopKey()):
                    self._pass_failure(sender, message)
                case _:
                    pass  # not a hop's business
        except DgnError as error:
            key = getattr(message, "key", None)
            if key is None and isinstance(message, OpenHop):
                key = claimed_key(message)
            tag = "open" if isinstance(message, OpenHop) else "step"
            self._host.counts.refusals[error.kind] += 1
            if self._host.now() >= self._quiet_until.get(sender, 0.0):
                self._quiet_until[sender] = self._host.now() + QUIET_S
                log.warning("refused %s of %s: %s", tag_of(message), sender, error.message)
            self._host.post(sender, Frame(failure_of(error, key, getattr(message, "branch", 0), tag)))

    def _open(self, sender: str, message: OpenHop) -> None:
        host = self._host
        if self._came_before(sender, message):
            return
        ticket, span = self._admission.check(sender, message, self.hops)
        hop = self.hops.get(ticket.key)
        if hop is not None:
            self._reroute(hop, ticket)
            return
        if self.leaving.refuses(ticket.model, own=ticket.key.origin == host.me):
            raise Draining("it is about to leave and opens nothing new")
        self._table.make_way(ticket, span)
        fence = HopFence(branch=ticket.branch, route=ticket.route, credits=0)  # granted when it is open
        hop = Hop(ticket, span, fence, host.now() + ticket.lease_s, generation=ticket.generation)
        self.hops[ticket.key] = hop
        opening = OpenSequence(key=ticket.key, span=str(span), max_positions=ticket.max_positions)
        if not host.to_worker(ticket.model, Frame(opening)):
            del self.hops[ticket.key]
            raise NotReady(f"the worker of {ticket.model} is not running")
        _log_state(hop, "opened")

    def _came_before(self, sender: str, message: OpenHop) -> bool:
        """Whether an open hop has this ticket already. It is answered once more, where it is the last one of
        the hop and nothing is under way that will be answered anyway."""
        key = claimed_key(message)
        hop = self.hops.get(key) if key is not None else None
        again = self._admission.again(sender, message) if hop is not None else None
        if hop is None or again is None:
            return False
        if again == hop.ticket and hop.opened is not None and hop.cancelling is None:
            self._host.post(again.key.origin, hop.opened_frame())
        return True

    def _reroute(self, hop: Hop, ticket: Ticket) -> None:
        """The hop stays, with other neighbours; it is told of as opened once nothing is under way in it."""
        hop.reroute(ticket, self._host.now())
        self._host.to_worker(ticket.model, Frame(Cancel(key=ticket.key, branch=hop.fence.branch)))

    def _step(self, sender: str, message: StepFrame, payload: Tensor | None) -> None:
        hop = self.hops.get(message.key)
        if hop is None:
            raise StaleState(f"there is no hop {message.key.hop} of that session here")
        if sender != hop.ticket.previous:
            raise ProtocolError(f"data of this hop comes from {hop.ticket.previous}, not from {sender}")
        if message.count > hop.ticket.max_chunk or message.stop > hop.ticket.max_positions:
            raise LimitError(
                f"positions {message.start}-{message.stop - 1} exceed the ticket: "
                f"{hop.ticket.max_chunk} a step, {hop.ticket.max_positions} in all"
            )
        hop.deadline = self._host.now() + hop.ticket.lease_s
        hop.answering = True
        match hop.fence.admit(message):
            case Compute(step=step, skip=skip):
                if step.truncate_to is not None:
                    self.journals.truncate(message.key, step.truncate_to)
                hop.generated += step.sample is not None
                rows = payload.rows(skip, payload.shape[0]) if payload is not None and skip else payload
                self._compute(hop, step, rows)
            case Reject(error=error):
                raise error
            case AlreadyHave() | Drop():
                pass

    def _compute(self, hop: Hop, step: StepFrame, payload: Tensor | None) -> None:
        penalised = step.sample is not None and step.sample.needs_history and hop.span.head
        if penalised and hop.history_branch != step.branch:  # the origin's History comes by another way
            hop.parked.append((step, payload))
            return
        if payload is not None and payload.dtype == "q8":
            payload = q8.decode(payload)
        if not self._host.to_worker(hop.ticket.model, Frame(step, payload)):
            raise WorkerDied(f"the worker of {hop.ticket.model} is not running")

    def _control(
        self,
        sender: str,
        message: History | Cancel | EndTurn | CloseHop | Replay | Probe,
        payload: Tensor | None,
    ) -> None:
        if sender != message.key.origin:
            raise TicketRefused("only its origin may steer a session")
        hop = self.hops.get(message.key)
        if hop is None:
            if isinstance(message, Cancel | EndTurn):
                self._host.post(sender, Frame(HopLength(key=message.key, branch=message.branch, length=0)))
            elif isinstance(message, Replay | Probe):
                raise StaleState(f"there is no hop {message.key.hop} of that session here")
            return
        hop.deadline = self._host.now() + hop.ticket.lease_s
        match message:
            case History():
                self._history(hop, message, payload)
            case EndTurn():
                hop.answering = False
                length = HopLength(key=message.key, branch=message.branch, length=hop.fence.length)
                self._host.post(sender, Frame(length))
                self._host.to_worker(hop.ticket.model, Frame(message))  # its KV may now give way
            case Cancel():
                hop.answering = False
                hop.cancel(message.branch)
                self._host.to_worker(hop.ticket.model, Frame(message))
            case Replay():
                self._replays.ask(hop, message)
            case Probe():
                self._host.post(sender, Frame(Alive(key=message.key)))
                if message.generation not in ("", hop.generation):
                    hop.generation = message.generation
                    _log_state(hop, f"goes on at {hop.fence.length}")
                self._host.look_after(hop.ticket.model)
                self._host.nudge(hop.ticket.next)
            case CloseHop():
                self._table.forget(hop)

    def _history(self, hop: Hop, message: History, payload: Tensor | None) -> None:
        if message.branch < hop.history_branch:
            return
        stop = message.start + (payload.shape[0] if payload is not None else 0)
        if stop > hop.ticket.max_positions:
            raise LimitError(f"a history of {stop} positions; the ticket is for {hop.ticket.max_positions}")
        self._host.to_worker(hop.ticket.model, Frame(message, payload))
        hop.history_branch = message.branch
        parked, hop.parked = hop.parked, []
        for step, rows in parked:
            self._compute(hop, step, rows)

    def _pass_failure(self, sender: str, message: Failure) -> None:
        """The next hop refused a frame of ours: its origin has to know."""
        key = message.key
        if key is None:
            return
        for hop in self.hops.values():
            ticket = hop.ticket
            same_session = (ticket.key.origin, ticket.key.session) == (key.origin, key.session)
            if same_session and ticket.next == sender and ticket.next_hop == key.hop:
                self._host.post(key.origin, Frame(message))
                return

    # --- ends

    def on_worker_down(
        self, model: str, why: str, keys: Collection[HopKey], running: Collection[HopKey]
    ) -> None:
        """A worker of `model` ended, and with it the KV of the hops `keys`; it was computing steps of those
        in `running`."""
        for key, hop in list(self.hops.items()):
            if key in keys:
                self._table.drop(hop, "its worker ended")
                text = f"the worker with {hop.span} of {model} ended: {why}"
                error = WorkerDied(text, running=key in running, stop=hop.fence.next_out)
                self._host.post(key.origin, Frame(failure_of(error, key, hop.ticket.branch, "worker")))

    def on_worker_silent(self, model: str, why: str, keys: Collection[HopKey]) -> None:
        """A worker of `model`, with the hops `keys`, does not move; it may yet."""
        for key, hop in self.hops.items():
            if key in keys:
                error = WorkerSilent(f"the worker with {hop.span} of {model} {why}")
                self._host.post(key.origin, Frame(failure_of(error, key, hop.ticket.branch, "worker")))

    def on_peer_down(self, peer: str) -> None:
        """Sessions of that origin end; origins whose sessions ran through it are told."""
        for key, hop in list(self.hops.items()):
            if key.origin == peer:
                self._table.forget(hop)
            elif peer in (hop.ticket.previous, hop.ticket.next):
                error = PeerGone(f"lost the connection to {peer}, the neighbour of {hop.span}", peer=peer)
                self._host.post(key.origin, Frame(failure_of(error, key, hop.ticket.branch, "step")))

    def sweep(self) -> None:
        """Closes hops whose lease ended; to be called now and then."""
        now = self._host.now()
        for hop in list(self.hops.values()):
            if hop.deadline < now:
                self._end(hop, "its lease ended")

    def foreign(self) -> list[Hop]:
        """Those that serve other origins."""
        return [hop for key, hop in self.hops.items() if key.origin != self._host.me]

    def ask_to_leave(self, hops: Iterable[Hop], why: str) -> None:
        """Tells the origins of `hops` to go on without them; they stay until those do."""
        for hop in hops:
            key = hop.ticket.key
            failure = failure_of(Draining(why), key, hop.fence.branch, "drain")
            self._host.post(key.origin, Frame(failure))

    def set_limits(self, max_sessions: int) -> None:
        """As in the constructor; what is beyond it now stays."""
        self._admission.max_sessions = max_sessions

    def close(self, hops: Iterable[Hop], reason: str) -> None:
        """They end here, and their origins are told."""
        for hop in hops:
            self._end(hop, reason)

    def close_all(self, reason: str) -> None:
        """The node stops serving."""
        self.close(self.foreign(), reason)
        for hop in list(self.hops.values()):
            self._table.forget(hop)

    def _end(self, hop: Hop, reason: str) -> None:
        key = hop.ticket.key
        self._table.forget(hop, reason)
        self._host.post(key.origin, Frame(CloseHop(key=key, reason=reason)))


def _log_state(hop: Hop, what: str) -> None:
    ticket, about = hop.ticket, hop.about
    log.info(
        "generation %s: hop %d %s, %s of %s, for %s",
        about["generation"],
        ticket.key.hop,
        what,
        hop.span,
        ticket.model,
        ticket.key.origin,
        extra=about,
    )
