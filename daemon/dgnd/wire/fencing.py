"""The fence of one hop: which frames may change its KV. Pure state; every rule is in this table.

L is the hop's length: the positions whose frames it accepted. A boundary is a position where an accepted
frame ended (and 0); its digest is kept. B and R are the hop's branch and route. A frame of `branch` and
`route` covers `[start, stop)` and is judged by the first line that fits:

    frame                                              verdict
    ─────────────────────────────────────────────────  ─────────────────────────────────────────────
    branch <= the last cancelled one                   Drop
    route < R, or branch < B                           Drop
    route > R                                          Reject NotYet
    branch > B, a cancel not yet settled               Reject NotYet
    branch > B, no truncate_to                         Reject NotYet
    branch > B, truncate_to > L                        Reject PositionGap(L)
    branch > B, truncate_to no boundary                Reject PositionGap(largest boundary below)
    branch > B, start != truncate_to                   Reject PositionGap(truncate_to)
    branch > B, digest_start not the one there         Reject StalePrefix
    branch > B                                         Compute: truncate, B becomes branch, append
    branch = B, start > L                              Reject PositionGap(L)
    branch = B, start a boundary, another digest there Reject StalePrefix
    branch = B, start = L                              Compute: append
    branch = B, stop <= L, another digest there        Reject StalePrefix
    branch = B, stop <= L                              AlreadyHave
    branch = B, start < L < stop, start no boundary    Reject PositionGap(L)
    branch = B, start < L < stop                       Compute: the part from L on

A frame to compute that would be one more than the hop's credits, accepted and not yet passed on, is a
ProtocolError. A rejected or dropped frame changes nothing. `truncate_to` in a frame of branch B is ignored:
it was carried out. So what is appended always continues the prefix whose digest is kept: KV from stale or
foreign token ids is never extended. Knows nothing of KV, workers, journals, peers or time.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass

import msgspec

from dgnd.errors import DgnError, NotYet, PositionGap, ProtocolError, StalePrefix
from dgnd.wire.messages import StepFrame


class Compute(msgspec.Struct, frozen=True):
    """Append `step`: the frame itself, or the part of it from L on, without the first `skip` rows."""

    step: StepFrame
    skip: int = 0


@dataclass(frozen=True, slots=True)
class AlreadyHave:
    """Every position is there already: acknowledged and ignored."""


@dataclass(frozen=True, slots=True)
class Drop:
    """A late frame of an abandoned branch or route: ignored."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reject:
    """The sender has to be told `error`."""

    error: DgnError


Admit = Compute | AlreadyHave | Drop | Reject

_NONE = 0  # in the array of digests: no boundary here


class HopFence:
    """What one hop has accepted: 8 bytes a position, and the frames under way."""

    def __init__(self, *, branch: int, route: int, credits: int) -> None:
        """`branch` and `route` as in the ticket; `credits`: frames that may be under way at a time."""
        self._branch = branch
        self._route = route
        self._credits = credits
        self._digests = array("Q", [_NONE])  # of each position 0 to L
        self._under_way: deque[int] = deque()  # the stops of frames accepted, not yet passed on
        self._cancelled_branch = -1
        self._settling = False

    @property
    def length(self) -> int:
        """L: the positions accepted."""
        return len(self._digests) - 1

    @property
    def branch(self) -> int:
        """The branch of what was accepted last."""
        return self._branch

    @property
    def route(self) -> int:
        """The route number of this hop."""
        return self._route

    @property
    def credits(self) -> int:
        """How many frames may be under way."""
        return self._credits

    @property
    def under_way(self) -> int:
        """Frames accepted and not yet passed on."""
        return len(self._under_way)

    @property
    def next_out(self) -> int:
        """Where the oldest frame ends that was accepted and not yet passed on; L where there is none."""
        return self._under_way[0] if self._under_way else self.length

    def grant(self, credits: int) -> None:
        """Sets how many frames may be under way, once that is known."""
        self._credits = credits

    def admit(self, step: StepFrame) -> Admit:
        """The verdict on a frame, by the table above; a Compute is accounted for as accepted."""
        if step.branch <= self._cancelled_branch:
            return Drop(f"branch {step.branch} was cancelled")
        if step.route < self._route:
            return Drop(f"route {step.route} was given up for {self._route}")
        if step.branch < self._branch:
            return Drop(f"branch {step.branch} was given up for {self._branch}")
        if step.route > self._route:
            return Reject(NotYet(f"route {step.route} is not known here; this hop is of route {self._route}"))
        if step.branch > self._branch:
            return self._admit_branch(step)
        return self._admit_more(step)

    def passed_on(self, stop: int) -> None:
        """The frame that ends at `stop`, and those accepted before it, left the hop."""
        if stop in self._under_way:
            while self._under_way.popleft() != stop:
                pass

    def reroute(self, route: int) -> None:
        """The session's hops changed, this one stays: frames of the routes before are late from now on."""
        self._route = route

    def cancel(self, branch: int) -> None:
        """`branch` is cancelled: its frames are late from now on, and no other begins before `cancelled`."""
        self._cancelled_branch = max(self._cancelled_branch, branch)
        self._settling = True

    def cancelled(self, length: int) -> int:
        """What waited is gone and the KV holds `length` positions. Returns L, the last boundary in it.

        Frames of the branch so far are late from now on.
        """
        boundary = self._boundary_below(min(length, self.length))
        del self._digests[boundary + 1 :]
        self._under_way.clear()
        self._cancelled_branch = max(self._cancelled_branch, self._branch)
        self._settling = False
        return boundary

    def _admit_branch(self, step: StepFrame) -> Admit:
        """The first frame of a branch above B."""
        if self._settling:
            return Reject(
                NotYet(f"branch {step.branch} begins before the cancel of the one before is answered")
            )
        to = step.truncate_to
        if to is None:
            return Reject(
                NotYet(f"branch {step.branch} is not known here: no frame with truncate_to began it")
            )
        if to > self.length:
            return self._gap(step, self.length)
        boundary = self._boundary_below(to)
        if boundary != to:
            return self._gap(step, boundary)
        if step.start != to:
            return self._gap(step, to)
        if self._differs(to, step.digest_start):
            return self._stale(to)
        if len(self._under_way) >= self._credits:
            return self._beyond_credit()
        del self._digests[to + 1 :]
        self._branch = step.branch
        return self._append(step, 0)

    def _admit_more(self, step: StepFrame) -> Admit:
        """A frame of branch B."""
        length = self.length
        if step.start > length:
            return self._gap(step, length)
        if self._differs(step.start, step.digest_start):
            return self._stale(step.start)
        if step.stop <= length:
            if self._differs(step.stop, step.digest_end):
                return self._stale(step.stop)
            return AlreadyHave()
        skip = length - step.start
        if skip and self._digests[step.start] == _NONE:
            return self._gap(step, length)
        if len(self._under_way) >= self._credits:
            return self._beyond_credit()
        if skip:
            step = msgspec.structs.replace(
                step, start=length, count=step.stop - length, digest_start=self._digests[length]
            )
        if step.truncate_to is not None:
            step = msgspec.structs.replace(step, truncate_to=None)
        return self._append(step, skip)

    def _append(self, step: StepFrame, skip: int) -> Compute:
        assert step.start == self.length
        self._digests[step.start] = _kept(step.digest_start)
        self._digests.frombytes(bytes(8 * (step.count - 1)))
        self._digests.append(_kept(step.digest_end))
        self._under_way.append(step.stop)
        return Compute(step, skip)

    def _differs(self, position: int, digest: int) -> bool:
        return self._digests[position] not in (_NONE, _kept(digest))

    def _boundary_below(self, position: int) -> int:
        """The largest boundary not above `position`; 0 is always one."""
        while position and self._digests[position] == _NONE:
            position -= 1
        return position

    def _gap(self, step: StepFrame, expected: int) -> Reject:
        what = f"a frame for positions {step.start} to {step.stop - 1}"
        if step.branch > self._branch:
            what = (
                f"branch {step.branch}, which keeps {step.truncate_to} positions and begins at {step.start}"
            )
        message = f"{what}, can't follow what this hop has: {self.length} positions; send from {expected}"
        return Reject(PositionGap(message, expected=expected))

    def _stale(self, position: int) -> Reject:
        message = f"the token ids before position {position} are not those of this hop's KV"
        return Reject(StalePrefix(message, position=position))

    def _beyond_credit(self) -> Reject:
        return Reject(ProtocolError(f"a frame beyond the hop's credits: {self._credits} are under way"))


def _kept(digest: int) -> int:
    """A digest as stored: 0 stands for none."""
    return digest or 1
