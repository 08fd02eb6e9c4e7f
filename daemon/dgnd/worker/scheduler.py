"""What a worker computes next: decode steps and chunks of prompts together, under a budget of positions.
Sans-IO.

Each hop has a queue whose order is kept. Origins take turns, and so do the hops of one, apart for each kind
of work: who is served a decode step loses no turn for a chunk. Decode steps and chunks take turns as well,
where both wait: a batch holds all decode steps that wait, and what is short of a prompt, or else chunks, at
least one and as many as the budget allows; but one alone while somebody decodes. Those of one hop that follow
each other go together where it is the last hop, as nobody waits for the first of them. A step that is to be
alone has a batch of its own when its turn comes. A flood of small frames lets a batch pass now and then. So a
decode step waits for no more than one chunk of somebody else's prompt, and is not computed beside a second
one; and a chunk waits for no more than one batch of decode steps. Knows nothing of backends, threads or
sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

from dgnd.wire.messages import (
    AnyMessage,
    Cancel,
    CloseHop,
    EndTurn,
    Frame,
    History,
    HopKey,
    OpenSequence,
    StepFrame,
)
from dgnd.worker.joined import hops_of, step_of
from dgnd.worker.pace import LEAST, MOST

HopFrame = OpenSequence | StepFrame | History | Cancel | EndTurn | CloseHop
Kind = Literal["small", "decode", "chunk"]

#: Frames that are no steps, taken one after the other before a waiting step has its turn.
SMALL_IN_A_ROW = 32
#: A hop that was the only one served in this many batches is alone: nobody is known to wait, and it gets the
#: budget several times.
ALONE_FOR = 8
ALONE_TIMES = 4
#: Somebody decodes who had a step in one of this many batches.
DECODES_FOR = 8


def kind_of(frame: Frame) -> Kind:
    """A step of one position that asks for a token is `decode`, any other step a `chunk`, the rest is
    `small`."""
    message = frame.message
    if not isinstance(message, StepFrame):
        return "small"
    return "decode" if message.count == 1 and message.sample is not None else "chunk"


def continues(before: StepFrame, after: StepFrame) -> bool:
    """Whether `after`, the next frame of the same hop, can be computed in one step with `before`."""
    return (
        before.sample is None
        and after.truncate_to is None
        and (after.start, after.branch, after.route) == (before.stop, before.branch, before.route)
    )


class Scheduler:
    """Frames that wait, by hop.

    `take` returns either one frame that is not a step, or a batch of steps: decode steps of different hops
    and perhaps short chunks, or chunks, of which those of one hop follow each other without a gap.
    """

    def __init__(self, max_batch: int = 32) -> None:
        self._max_batch = max_batch
        self._queues: dict[HopKey, deque[Frame]] = {}
        self._clock = 0
        self._since: dict[HopKey, int] = {}  # when a hop's first frame became the first
        self._served: dict[tuple[Kind, str], int] = {}  # when an origin last had its turn; origins are few
        self._small = 0  # taken in a row
        self._turn: Kind = "decode"  # whose turn it is where decode steps and chunks wait
        self._since_decode = DECODES_FOR  # batches
        self._last: set[HopKey] = set()  # hops with the head: nobody waits for their chunks
        self._recent: deque[frozenset[HopKey]] = deque(maxlen=ALONE_FOR)  # whose steps the last batches held

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __bool__(self) -> bool:
        return bool(self._queues)

    def beside(self, batch: Sequence[Frame]) -> int:
        """How many hops wait that have no step in `batch`."""
        return len(self._queues.keys() - hops_of(batch))

    def is_gathered(self) -> bool:
        """Whether every hop of the last batch of steps waits again."""
        return not self._recent or all(key in self._queues for key in self._recent[-1])

    def decode_waits(self) -> bool:
        """Whether a decode step has the next turn."""
        return self._turn == "decode" and any(
            kind_of(queue[0]) == "decode" for queue in self._queues.values()
        )

    def put(self, key: HopKey, frame: Frame) -> None:
        """Appends a frame to its hop's queue. A cancel or close first drops the hop's waiting steps."""
        if not isinstance(frame.message, StepFrame):
            self._changes(key, frame.message)
        if key not in self._queues:
            self._queues[key] = deque()
            self._since[key] = self._tick()
        self._queues[key].append(frame)

    def _changes(self, key: HopKey, message: AnyMessage) -> None:
        """What frames that are no steps say of their hop."""
        match message:
            case OpenSequence(span=span) if span.endswith("head"):
                self._last.add(key)
            case Cancel() | CloseHop() | EndTurn():
                if self._recent:
                    self._recent[-1] -= {key}  # it does not come back
                if not isinstance(message, EndTurn):
                    self._drop_steps(key)
                if isinstance(message, CloseHop):
                    self._last.discard(key)

    def take(self, budget: int = MOST) -> list[Frame]:
        """The next batch, of about `budget` positions; empty when nothing waits."""
        if len(self._queues) == 1:  # what a single answer meets at every token
            (key,) = self._queues
            if kind_of(self._queues[key][0]) == "decode":
                return self._taken("decode", [self._pop("decode", key)], chunks_wait=False)
        small, decodes, chunks = self._order("small"), self._order("decode"), self._order("chunk")
        if small and (self._small < SMALL_IN_A_ROW or not decodes + chunks):
            self._small += 1
            return [self._pop("small", small[0])]
        kind: Kind = "decode" if decodes and (self._turn == "decode" or not chunks) else "chunk"
        batch = self._outcast(kind, decodes if kind == "decode" else chunks)
        if not batch:
            batch = self._decodes() if kind == "decode" else self._chunks(self._room(budget), 0, set())
        return self._taken(kind, batch, chunks_wait=bool(chunks))

    def _taken(self, kind: Kind, batch: list[Frame], chunks_wait: bool) -> list[Frame]:
        """`batch` again, after a note of whose turn it was."""
        self._small = 0
        if batch:
            self._turn = "chunk" if kind == "decode" and chunks_wait else "decode"
            self._since_decode = 0 if kind == "decode" else self._since_decode + 1
            self._recent.append(frozenset(step_of(frame).key for frame in batch))
        return batch

    def _outcast(self, kind: Kind, order: list[HopKey]) -> list[Frame]:
        """The step whose turn it is, if it is one that is to be alone."""
        return [self._pop(kind, order[0])] if order and self._first(order[0]).alone else []

    def _decodes(self) -> list[Frame]:
        """The decode steps that wait, and chunks that are as short as they are many."""
        decodes = [key for key in self._order("decode") if not self._first(key).alone]
        batch = [self._pop("decode", key) for key in decodes[: self._max_batch]]
        return batch + self._chunks(LEAST, len(batch), set(decodes))

    def _room(self, budget: int) -> int:
        """Positions that chunks may have in their batch, beyond the first of them."""
        if self._since_decode < DECODES_FOR:
            return 0
        return budget * (ALONE_TIMES if self._is_alone() else 1)

    def _first(self, key: HopKey) -> StepFrame:
        return step_of(self._queues[key][0])

    def _chunks(self, budget: int, used: int, decoding: set[HopKey]) -> list[Frame]:
        """Chunks for a batch that holds `used` positions already; one at least, where it holds none and one
        waits. A hop that has a decode step in the batch gives no chunk."""
        taken: dict[HopKey, list[Frame]] = {}
        while True:
            for key in self._order("chunk"):
                message = self._first(key)
                if key in decoding or message.alone or (used and used + message.count > budget):
                    continue
                if key not in taken or (key in self._last and continues(step_of(taken[key][-1]), message)):
                    break
            else:
                return [frame for frames in taken.values() for frame in frames]
            used += message.count
            taken.setdefault(key, []).append(self._pop("chunk", key))

    def _is_alone(self) -> bool:
        """Whether all that waits and all that was served of late is one hop's."""
        return len(set(self._queues).union(*self._recent)) <= 1

    def _order(self, kind: Kind) -> list[HopKey]:
        """Hops whose first frame is of this kind: one of each origin in turn, then the second of each, and
        so on."""
        hops: dict[str, list[HopKey]] = {}
        for key in sorted(self._queues, key=self._since.__getitem__):
            if kind_of(self._queues[key][0]) == kind:
                hops.setdefault(key.origin, []).append(key)
        origins = sorted(hops, key=lambda origin: self._served.get((kind, origin), 0))
        rounds = zip_longest(*(hops[origin] for origin in origins))
        return [key for turn in rounds for key in turn if key is not None]

    def _pop(self, kind: Kind, key: HopKey) -> Frame:
        frame = self._queues[key].popleft()
        self._served[kind, key.origin] = self._since[key] = self._tick()
        if not self._queues[key]:
            self._forget(key)
        return frame

    def _drop_steps(self, key: HopKey) -> None:
        queue = self._queues.get(key, ())
        kept = deque(frame for frame in queue if not isinstance(frame.message, StepFrame))
        if kept:
            self._queues[key] = kept
        elif queue:
            self._forget(key)

    def _forget(self, key: HopKey) -> None:
        del self._queues[key]
        del self._since[key]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock
