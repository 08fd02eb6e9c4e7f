"""What a worker computes next: decode steps and chunks of prompts together, under a budget of positions.
Sans-IO.

Each hop has a queue whose order is kept. Origins take turns, and so do the hops of one, apart for each kind
of work: who is served a decode step loses no turn for a chunk. A batch takes the decode steps that wait, then
chunks for as long as the budget lasts, at least one; those of one hop that follow each other go together
where it is the last hop, as nobody waits for the first of them. A step that is to be alone has a batch of its
own when its turn comes. A flood of small frames lets a batch pass now and then. So nobody waits for more than
one budget or one chunk of somebody else's prompt, and a few small frames. Knows nothing of backends, threads
or sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

from dgnd.wire.messages import Cancel, CloseHop, EndTurn, Frame, History, HopKey, OpenSequence, StepFrame
from dgnd.worker.joined import hops_of, step_of
from dgnd.worker.pace import MOST

HopFrame = OpenSequence | StepFrame | History | Cancel | EndTurn | CloseHop
Kind = Literal["small", "decode", "chunk"]

#: Frames that are no steps, taken one after the other before a waiting step has its turn.
SMALL_IN_A_ROW = 32
#: A hop that was the only one served in this many batches is alone: nobody is known to wait, and it gets the
#: budget several times.
ALONE_FOR = 8
ALONE_TIMES = 4


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

    `take` returns either one frame that is not a step, or a batch of steps: decode steps of different hops,
    then chunks, of which those of one hop follow each other without a gap.
    """

    def __init__(self, max_batch: int = 32) -> None:
        self._max_batch = max_batch
        self._queues: dict[HopKey, deque[Frame]] = {}
        self._clock = 0
        self._since: dict[HopKey, int] = {}  # when a hop's first frame became the first
        self._served: dict[tuple[Kind, str], int] = {}  # when an origin last had its turn; origins are few
        self._small = 0  # taken in a row
        self._last: set[HopKey] = set()  # hops with the head: nobody waits for their chunks
        self._recent: deque[frozenset[HopKey]] = deque(maxlen=ALONE_FOR)  # whose steps the last batches held

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def beside(self, batch: Sequence[Frame]) -> int:
        """How many hops wait that have no step in `batch`."""
        return len(self._queues.keys() - hops_of(batch))

    def is_gathered(self) -> bool:
        """Whether every hop of the last batch of steps waits again."""
        return not self._recent or all(key in self._queues for key in self._recent[-1])

    def put(self, key: HopKey, frame: Frame) -> None:
        """Appends a frame to its hop's queue. A cancel or close first drops the hop's waiting steps."""
        if isinstance(frame.message, Cancel | CloseHop):
            self._drop_steps(key)
        if isinstance(frame.message, OpenSequence) and frame.message.span.endswith("head"):
            self._last.add(key)
        elif isinstance(frame.message, CloseHop):
            self._last.discard(key)
        if key not in self._queues:
            self._queues[key] = deque()
            self._since[key] = self._tick()
        self._queues[key].append(frame)

    def take(self, budget: int = MOST) -> list[Frame]:
        """The next batch, of about `budget` positions; empty when nothing waits."""
        small, decodes, chunks = self._order("small"), self._order("decode"), self._order("chunk")
        if small and (self._small < SMALL_IN_A_ROW or not decodes + chunks):
            self._small += 1
            return [self._pop("small", small[0])]
        self._small = 0
        batch = self._outcast("decode", decodes) or self._outcast("chunk", chunks) or self._mixed(budget)
        if batch:
            self._recent.append(frozenset(step_of(frame).key for frame in batch))
        return batch

    def _outcast(self, kind: Kind, order: list[HopKey]) -> list[Frame]:
        """The step whose turn it is, if it is one that is to be alone."""
        return [self._pop(kind, order[0])] if order and self._first(order[0]).alone else []

    def _mixed(self, budget: int) -> list[Frame]:
        """Decode steps, and chunks as far as `budget` positions go."""
        budget *= ALONE_TIMES if self._is_alone() else 1
        decodes = [key for key in self._order("decode") if not self._first(key).alone]
        batch = [self._pop("decode", key) for key in decodes[: self._max_batch]]
        return batch + self._chunks(budget, len(batch), set(decodes))

    def _first(self, key: HopKey) -> StepFrame:
        return step_of(self._queues[key][0])

    def _chunks(self, budget: int, used: int, decoding: set[HopKey]) -> list[Frame]:
        """Chunks for a batch that holds `used` positions already; one at least, if one waits. A hop that has
        a decode step in the batch gives no chunk."""
        taken: dict[HopKey, list[Frame]] = {}
        while True:
            for key in self._order("chunk"):
                message = self._first(key)
                if key in decoding or message.alone or (taken and used + message.count > budget):
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
