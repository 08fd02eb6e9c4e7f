"""What a worker computes next: decode steps first, then one chunk of a prompt. Sans-IO.

Each hop has a queue whose order is kept. Origins take turns, and so do the hops of one, apart for each kind
of work: who is served a decode step loses no turn for a chunk. Decode steps and chunks alternate while both
wait, and a flood of small frames lets a step pass now and then, so nobody waits for more than one chunk, one
batch and a few small frames of somebody else. Knows nothing of backends, threads or sockets.
"""

from __future__ import annotations

from collections import deque
from itertools import zip_longest
from typing import Literal

from dgnd.wire.messages import Cancel, CloseHop, Frame, History, HopKey, OpenSequence, StepFrame

HopFrame = OpenSequence | StepFrame | History | Cancel | CloseHop
Kind = Literal["small", "decode", "chunk"]

#: Frames that are no steps, taken one after the other before a waiting step has its turn.
SMALL_IN_A_ROW = 32


def kind_of(frame: Frame) -> Kind:
    """A step of one position that asks for a token is `decode`, any other step a `chunk`, the rest is
    `small`."""
    message = frame.message
    if not isinstance(message, StepFrame):
        return "small"
    return "decode" if message.count == 1 and message.sample is not None else "chunk"


class Scheduler:
    """Frames that wait, by hop.

    `take` returns either one frame that is not a step (open, history, cancel, close), a batch of decode
    steps of different hops, or one chunk.
    """

    def __init__(self, max_batch: int = 32) -> None:
        self._max_batch = max_batch
        self._queues: dict[HopKey, deque[Frame]] = {}
        self._clock = 0
        self._since: dict[HopKey, int] = {}  # when a hop's first frame became the first
        self._served: dict[tuple[Kind, str], int] = {}  # when an origin last had its turn; origins are few
        self._small = 0  # taken in a row
        self._batches = 0  # taken since the last chunk

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def put(self, key: HopKey, frame: Frame) -> None:
        """Appends a frame to its hop's queue. A cancel or close first drops the hop's waiting steps."""
        if isinstance(frame.message, Cancel | CloseHop):
            self._drop_steps(key)
        if key not in self._queues:
            self._queues[key] = deque()
            self._since[key] = self._tick()
        self._queues[key].append(frame)

    def take(self) -> list[Frame]:
        """The next batch; empty when nothing waits."""
        small, decodes, chunks = self._order("small"), self._order("decode"), self._order("chunk")
        if small and (self._small < SMALL_IN_A_ROW or not (decodes or chunks)):
            self._small += 1
            return [self._pop("small", small[0])]
        self._small = 0
        if decodes and not (chunks and self._batches):
            self._batches += 1
            return [self._pop("decode", key) for key in decodes[: self._max_batch]]
        self._batches = 0
        return [self._pop("chunk", key) for key in chunks[:1]]

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
