"""What a worker computes next: decode steps first, then one chunk of a prompt. Sans-IO.

Each hop has a queue whose order is kept; hops take turns, and so do origins, so nobody waits for more than one
chunk of somebody else. Knows nothing of backends, threads or sockets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from dgnd.wire.messages import Cancel, CloseHop, Frame, History, HopKey, OpenSequence, StepFrame

HopFrame = OpenSequence | StepFrame | History | Cancel | CloseHop


def is_decode(frame: Frame) -> bool:
    """Whether the frame is a step of one position that asks for a token."""
    message = frame.message
    return isinstance(message, StepFrame) and message.count == 1 and message.sample is not None


class Scheduler:
    """Frames that wait, by hop.

    `take` returns either one frame that is not a step (open, history, cancel, close), a batch of decode steps of
    different hops, or one chunk.
    """

    def __init__(self, max_batch: int = 32) -> None:
        self._max_batch = max_batch
        self._queues: dict[HopKey, deque[Frame]] = {}
        self._turns: deque[str] = deque()  # origins, the next to be served first
        self._ready: dict[str, deque[HopKey]] = {}  # hops with waiting frames, by origin, next first

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def put(self, key: HopKey, frame: Frame) -> None:
        """Appends a frame to its hop's queue. A cancel or close first drops the hop's waiting steps."""
        if isinstance(frame.message, Cancel | CloseHop):
            self._drop_steps(key)
        queue = self._queues.setdefault(key, deque())
        queue.append(frame)
        if len(queue) == 1:
            if key.origin not in self._ready:
                self._ready[key.origin] = deque()
                self._turns.append(key.origin)
            self._ready[key.origin].append(key)

    def take(self) -> list[Frame]:
        """The next batch; empty when nothing waits."""
        for key in self._hops():
            if not isinstance(self._queues[key][0].message, StepFrame):
                return [self._pop(key)]
        decodes = [key for key in self._hops() if is_decode(self._queues[key][0])][: self._max_batch]
        if decodes:
            return [self._pop(key) for key in decodes]
        for key in self._hops():
            return [self._pop(key)]
        return []

    def _hops(self) -> Iterator[HopKey]:
        """Hops with waiting frames: one of each origin in turn, then the second of each, and so on."""
        lists = [list(self._ready[origin]) for origin in self._turns]
        for depth in range(max(map(len, lists), default=0)):
            for hops in lists:
                if depth < len(hops):
                    yield hops[depth]

    def _pop(self, key: HopKey) -> Frame:
        queue = self._queues[key]
        frame = queue.popleft()
        hops = self._ready[key.origin]
        hops.remove(key)
        self._turns.remove(key.origin)
        if queue:
            hops.append(key)
        else:
            del self._queues[key]
        if hops:
            self._turns.append(key.origin)
        else:
            del self._ready[key.origin]
        return frame

    def _drop_steps(self, key: HopKey) -> None:
        queue = self._queues.get(key)
        if queue is None:
            return
        kept = deque(frame for frame in queue if not isinstance(frame.message, StepFrame))
        if kept:
            self._queues[key] = kept
            return
        del self._queues[key]
        hops = self._ready[key.origin]
        hops.remove(key)
        if not hops:
            del self._ready[key.origin]
            self._turns.remove(key.origin)
