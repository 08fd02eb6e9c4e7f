"""Results that hops send again because their origins ask, so that new hops after them get what they lack.

However many an origin asks for, of each hop one is on its way at a time, and each position goes once in a
route: what nobody needs twice fills neither memory nor the links that others use. Knows nothing of who may
ask.
"""

from __future__ import annotations

from functools import partial

from dgnd.errors import JournalGone, LimitError
from dgnd.hosting.hop import Hop
from dgnd.hosting.results import HopResults
from dgnd.hosting.table import HopTable
from dgnd.wire.messages import Replay, StepFrame

#: Beyond the credits that a hop was opened with; its origin asks for so many at once.
_SPARE = 1


class Replays:
    """Of all hops of a node; what is under way is in each `Hop`."""

    def __init__(self, table: HopTable, results: HopResults) -> None:
        self._table = table
        self._results = results

    def ask(self, hop: Hop, message: Replay) -> None:
        """Sends what the origin asks for, at once or after what it asked for before; what comes of it is the
        next hop's to say. One of another route is late, and dropped.

        Raises LimitError for more than the ticket allows, and JournalGone.
        """
        if message.route != hop.fence.route:
            return
        ticket, queue = hop.ticket, hop.replays
        if message.stop - message.start > ticket.max_chunk:
            raise LimitError(
                f"positions {message.start}-{message.stop - 1} exceed the ticket: {ticket.max_chunk} at once"
            )
        done = queue[-1].stop if queue else hop.resent
        if message.start < done:
            raise LimitError(f"positions up to {done - 1} were sent again already in route {message.route}")
        most = (hop.opened.credits if hop.opened is not None else 0) + _SPARE
        if len(queue) >= most:
            raise LimitError(f"{len(queue)} replays wait for their turn; at most {most}")
        queue.append(message)
        if not hop.resending:
            self._next(hop)

    def _next(self, hop: Hop) -> None:
        """Sends the first that waits. Raises JournalGone."""
        message = hop.replays.popleft()
        kept = self._table.journals.read(message.key, message.start, message.stop)
        step = StepFrame(
            key=message.key,
            branch=message.branch,
            route=message.route,
            start=kept.start,
            count=kept.stop - kept.start,
            digest_start=kept.digest_start,
            digest_end=kept.digest_end,
            alone=message.alone,
        )
        hop.resent, hop.resending = kept.stop, True
        self._table.host.counts.model(hop.ticket.model).replayed(step.count)
        if not self._results.forward(hop, step, kept.rows, partial(self._left, hop)):
            hop.resending = False

    def _left(self, hop: Hop) -> None:
        """What was on its way has left, or was lost with its connection."""
        hop.resending = False
        if self._table.hops.get(hop.ticket.key) is not hop:
            hop.replays.clear()
        while hop.replays and not hop.resending:
            message = hop.replays[0]
            try:
                self._next(hop)
            except JournalGone as error:
                self._results.tell(hop, error, message)
