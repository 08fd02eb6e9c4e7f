"""A session at its origin: the token ids, and what of them the hops have been sent. Sans-IO.

The token ids are the root from which everything else can be rebuilt. `branch` rises when ids already sent
change, `route_number` when the hops change; only this class writes them. Knows nothing of text, connections
or time.
"""

from __future__ import annotations

import bisect
import itertools
import math
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dgn_backends.span import Span
from dgn_backends.tensor import Tensor
from dgnd.routing.exactness import Way
from dgnd.wire.digest import PrefixDigests
from dgnd.wire.messages import Frame, History, HopKey, Sampling, StepFrame

#: A chunk of a prompt has at least so many positions, where there are so many: fewer use the weights badly.
LEAST_CHUNK = 32
#: A prompt is cut into so many chunks for each hop after the first. While the first chunk is on its way to
#: the last hop, and the last one behind it, hops rest: 1 / CHUNKS_PER_HOP of the time.
CHUNKS_PER_HOP = 4


def chunk_for(positions: int, hops: int, most: int) -> int:
    """How many positions of a prompt each step has, so that all hops compute at once for most of the time."""
    return min(max(math.ceil(positions / max(CHUNKS_PER_HOP * (hops - 1), 1)), LEAST_CHUNK), most)


@dataclass(frozen=True, slots=True)
class RouteHop:
    """One open hop of a session."""

    hop: int
    peer: str
    span: Span
    relayed: bool = False  #: the edge from this hop to the next goes through the origin
    way: Way | None = None  #: how it computes, as its node said when it was opened


class OriginSession:
    """One generation context.

    `sent` positions have been sent to hop 0 on this branch and route; `tokens` may be longer (what is to be
    sent) but never shorter.
    """

    def __init__(self, origin: str, session: str, model: str) -> None:
        self.id = session
        self.generation = session  #: what logs call the answer that it gives now
        self.origin = origin
        self.model = model
        self.tokens: list[int] = []
        self.generated = 0  #: of all its answers
        self.route: tuple[RouteHop, ...] = ()
        self.route_number = 0
        self.branch = 0
        self.sent = 0
        #: Last units of the hops whose results go on in q8, fixed when the session's first route is laid, so
        #: that an answer goes on with the same numbers; None before that.
        self.encoded: frozenset[int] | None = None
        self.alone_until = 0  #: steps from below this position are computed in batches of their own
        self._window = 0
        self._chunk = LEAST_CHUNK  # positions of a step, fixed when nothing is under way
        self._under_way: deque[int] = deque()  # the ends of the frames whose credits are not back
        self._digests = PrefixDigests(secrets.token_bytes(16))
        self._boundaries = [0]
        self._truncate_to: int | None = None

    def key(self, hop: int) -> HopKey:
        """The key of one of its hops."""
        return HopKey(self.origin, self.id, hop)

    @property
    def head(self) -> RouteHop:
        """The hop that samples."""
        return self.route[-1]

    @property
    def credits(self) -> int:
        """How many frames may be sent now."""
        return self._window - len(self._under_way)

    def credit(self, stop: int) -> bool:
        """The frame that ended at `stop`, and those before it, have gone as far as they go; whether any of
        them had not before."""
        before = len(self._under_way)
        while self._under_way and self._under_way[0] <= stop:
            self._under_way.popleft()
        return len(self._under_way) < before

    # --- changes of the route

    def set_route(self, route: tuple[RouteHop, ...]) -> None:
        """Names the hops from now on. Nothing may be sent before `resume`."""
        self.route = route
        self.route_number += 1
        self._window = 0
        self._under_way.clear()

    def fix_wire(self, wire: str) -> None:
        """On the first route: where hidden states go in `wire` from one node to another. It stays so until
        the route is dropped, whatever hops come and go."""
        if self.encoded is None:
            edges = itertools.pairwise(self.route) if wire == "q8" else ()
            self.encoded = frozenset(a.span.units()[-1] for a, b in edges if a.peer != b.peer)

    def wire_after(self, hop: RouteHop) -> str:
        """How the results of a hop go to the next one."""
        return "q8" if self.encoded and hop.span.units()[-1] in self.encoded else "plain"

    def common(self, lengths: Iterable[int]) -> int:
        """From where steps can go on when the hops that stay have these lengths: an end of a frame that all
        of them know, with at least one position after it; 0 when none stays."""
        shortest = min(lengths, default=0)
        return self._boundary(max(min(shortest, self.sent, len(self.tokens) - 1), 0))

    def fill_ranges(self, common: int, max_chunk: int) -> list[tuple[int, int]]:
        """What hops that are new lack of the positions below `common`, in chunks that end where frames did.

        From now on only these ends count, as the new hops know no others.
        """
        ends = [0]
        for before, end in itertools.pairwise([*self._boundaries, None]):
            assert before is not None
            if before <= common and (end is None or end > common or end - ends[-1] > max_chunk):
                ends.append(before)
        self._boundaries = sorted({end for end in ends if end <= common})
        return list(itertools.pairwise(self._boundaries))

    def fill_step(self, start: int, stop: int) -> Frame:
        """Positions `[start, stop)` for hop 0, which is new and has not got them; of the branch so far."""
        return self._step(start, stop, None, None)

    def resume(self, common: int, window: int, *, new: bool) -> None:
        """All hops hold `common` positions, and nothing is under way. Hops that stay may hold more, so a new
        branch begins, except where all are `new`. `window`: frames that may be under way at once."""
        self._window = window
        self._under_way.clear()
        self.sent = common
        self._truncate_to = None if new else common
        self.branch += not new

    def drop_route(self) -> None:
        """Its hops are gone."""
        self.route = ()
        self.sent = 0
        self.encoded = None

    def set_tokens(self, tokens: Sequence[int]) -> None:
        """Makes `tokens` the ids of the session; what agrees with the ids sent is kept, the rest rolled back.

        At least the last position is left to be sent, so that there is something to sample from.
        """
        common = _common_prefix(self.tokens, tokens)
        self._digests.truncate(common)
        self._digests.extend(tokens[common:])
        self.tokens = list(tokens)
        self._roll_back(min(common, len(tokens) - 1))

    def append(self, token: int) -> None:
        """Adds a generated token."""
        self.generated += 1
        self.tokens.append(token)
        self._digests.extend([token])

    def hops_stopped_at(self, lengths: Iterable[int]) -> None:
        """After a cancel: the hops hold these many positions and nothing is under way; the next frame is of
        a new branch."""
        shortest = min(lengths)
        self._under_way.clear()
        self.branch += 1
        self.sent = self._boundary(min(shortest, self.sent))
        self._truncate_to = self.sent

    def begin_branch(self) -> None:
        """Starts a new branch where nothing changed: the head's hop is to be told the token ids anew
        (penalties)."""
        self.branch += 1
        self._truncate_to = self.sent

    def history(self, answer_start: int) -> Frame:
        """All token ids so far, for the head's hop."""
        message = History(key=self.key(self.head.hop), branch=self.branch, start=0, answer_start=answer_start)
        return Frame(message, Tensor.from_numpy(np.asarray(self.tokens, dtype="<i4"), "i32"))

    def _roll_back(self, length: int) -> None:
        if length >= self.sent:
            return
        self.branch += 1
        self.sent = self._boundary(length)
        self._truncate_to = self.sent

    def _boundary(self, length: int) -> int:
        """The last end of a frame at or below `length`: only there do hops know the prefix digest."""
        cut = bisect.bisect_right(self._boundaries, length)
        del self._boundaries[cut:]
        return self._boundaries[-1]

    @property
    def unsent(self) -> int:
        """Positions that wait to be sent."""
        return len(self.tokens) - self.sent

    def next_step(self, sampling: Sampling, max_chunk: int, allowed: bytes | None = None) -> Frame | None:
        """The next frame for hop 0; None when all is sent or no credit is left.

        `allowed`: tokens that may follow the last position, packed; None for all. The last step asks for a
        token. It never has a single position behind other chunks, so that it can't overtake them on the
        stream for tokens.
        """
        if not self.unsent or not self.credits:
            return None
        if not self._under_way:
            self._chunk = chunk_for(self.unsent, len(self.route), max_chunk)
        count = min(self.unsent, self._chunk)
        if count > 1 and self.unsent - count == 1:
            count -= 1
        start, stop = self.sent, self.sent + count
        truncate_to, self._truncate_to = self._truncate_to, None
        self.sent = stop
        self._under_way.append(stop)
        self._boundaries.append(stop)
        if stop < len(self.tokens):
            return self._step(start, stop, None, truncate_to)
        return self._step(start, stop, sampling, truncate_to, allowed)

    def _step(
        self,
        start: int,
        stop: int,
        sample: Sampling | None,
        truncate_to: int | None,
        allowed: bytes | None = None,
    ) -> Frame:
        message = StepFrame(
            key=self.key(self.route[0].hop),
            branch=self.branch,
            route=self.route_number,
            start=start,
            count=stop - start,
            digest_start=self._digests.at(start),
            digest_end=self._digests.at(stop),
            truncate_to=truncate_to,
            sample=sample,
            alone=start < self.alone_until,
            allowed=allowed,
        )
        ids = np.asarray(self.tokens[start:stop], dtype="<i4")
        return Frame(message, Tensor.from_numpy(ids, "i32"))


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
