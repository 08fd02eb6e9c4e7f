"""One session's hop on this node: its ticket, its fence, what it waits for. Knows nothing of workers or
peers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from dgn_backends.span import Span
from dgn_backends.tensor import Tensor
from dgnd.errors import TicketRefused
from dgnd.logs.fields import about
from dgnd.wire.fencing import HopFence
from dgnd.wire.messages import Frame, HopOpened, Replay, StepFrame, Ticket


@dataclass(slots=True)
class Hop:
    """The state; `HopServer` moves it."""

    ticket: Ticket
    span: Span
    fence: HopFence
    deadline: float
    opened: HopOpened | None = None  #: what the worker said of it
    generation: str = ""  #: what logs call the answer that it is for now
    rerouted: bool = False  #: a later ticket is to be answered once nothing is under way
    answering: bool = False  #: in an answer, not between two
    generated: int = 0  #: tokens that were asked for here
    cancelling: int | None = None  #: the branch that a cancel is under way for
    history_branch: int = -1  #: the branch whose token ids the worker has been told
    parked: list[tuple[StepFrame, Tensor | None]] = field(default_factory=list)
    replays: deque[Replay] = field(default_factory=deque)  #: that wait for their turn
    resending: bool = False  #: whether one is on its way
    resent: int = 0  #: the position up to which results were sent again in this route

    @property
    def about(self) -> dict[str, str]:
        """What a line of the log about it carries."""
        key = self.ticket.key
        return about(self.generation or key.session, key.session, key.origin)

    def reroute(self, ticket: Ticket, now: float) -> None:
        """Takes a later ticket, which cancels what is under way. Raises TicketRefused for an earlier one, or
        one of other blocks."""
        before = self.ticket
        if (ticket.model, ticket.span, ticket.max_positions) != (
            before.model,
            before.span,
            before.max_positions,
        ):
            raise TicketRefused(f"hop {ticket.key.hop} is open for {before.span} of {before.model}")
        if ticket.wire != before.wire:  # what is journalled is sent again as it was
            raise TicketRefused(f"hop {ticket.key.hop} sends its results as {before.wire}")
        if ticket.route <= self.fence.route:
            raise TicketRefused(f"the ticket is of route {ticket.route}, the hop of {self.fence.route}")
        self.ticket, self.deadline, self.rerouted = ticket, now + ticket.lease_s, True
        self.generation = ticket.generation or self.generation
        self.fence.reroute(ticket.route)
        self.replays.clear()
        self.resent = 0
        self.cancel(self.fence.branch)

    def cancel(self, branch: int) -> None:
        """What waits is to be dropped; frames of `branch` are late from now on."""
        self.cancelling = branch
        self.fence.cancel(branch)
        self.parked.clear()

    def opened_frame(self) -> Frame:
        """What its origin is told when it is ready for frames."""
        assert self.opened is not None
        fence = self.fence
        return Frame(msgspec.structs.replace(self.opened, length=fence.length, route=fence.route))

    def goes_further(self, branch: int) -> bool:
        """Whether the next hop is to have results of `branch`."""
        return not (self.ticket.catch_up and branch <= self.ticket.branch)
