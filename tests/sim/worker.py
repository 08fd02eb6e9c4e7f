"""A worker without a process: the real scheduler, pace and span worker, whose time is virtual.

It can die at any moment, with what it had computed and not yet said, or freeze; it is started again as
`dgnd.workers.handle.WorkerHandle`, whose shape it has, starts processes again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import trio

from dgnd.errors import BackendError, DgnError
from dgnd.wire.messages import Frame, HopKey, LoadedSpan, LoadSpans, StepFrame, WorkerStats
from dgnd.worker.joined import hops_of, positions
from dgnd.worker.pace import Pace
from dgnd.worker.runner import SpanWorker
from dgnd.worker.scheduler import Scheduler
from dgnd.worker.speed import Speed
from dgnd.workers.handle import WorkerHandlers

_FIRST_DELAY_S, _LONGEST_DELAY_S, _STEADY_S = 0.2, 60.0, 10.0
_LOOK_S, _TICK_S, _SILENT_S = 2.0, 0.1, 30.0
_STATS_S = 2.0


class SimWorker:
    """See the module. `kill` and `freeze` are the simulation's."""

    def __init__(
        self, request: LoadSpans, handlers: WorkerHandlers, rng: random.Random, note: Callable[..., None]
    ) -> None:
        self.request = request
        self.model = request.model
        self.state, self.detail = "starting", ""
        self.pid: int | None = None
        self.spans: tuple[LoadedSpan, ...] = ()
        self.stats = WorkerStats()
        self.fault: DgnError | None = None
        self.private_bytes = self.private_weights = 0
        self.apart = False
        self.frozen = False
        self.slower = 1.0  #: times as long as usual
        self._handlers = handlers
        self._rng = rng
        self._note = note
        self._thawed = trio.Event()
        self._killed = trio.Event()
        self._inbox: trio.MemorySendChannel[Frame] | None = None
        self._nursery: trio.Nursery | None = None
        self._running: frozenset[HopKey] = frozenset()  # whose steps are computed, or were at the last end
        self._signs = 0  # of life
        self._looked_after = False
        self._computes: SpanWorker | None = None

    @property
    def left_over(self) -> int:
        """Sequences that are open, and bytes of KV that are held."""
        return self._computes.sequence_count() + self._computes.budget.held if self._computes else 0

    @property
    def at_work(self) -> bool:
        """Whether steps are being computed."""
        return self.ready and bool(self._running)

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def weights_bytes(self) -> int:
        return sum(span.weights_bytes for span in self.spans)

    # --- what happens to it

    def kill(self) -> None:
        """kill -9."""
        self._killed.set()

    def freeze(self, frozen: bool) -> None:
        """SIGSTOP and SIGCONT."""
        self.frozen = frozen
        if not frozen:
            if self.state == "silent":
                self.state = "ready"
                self._handlers.on_ready(self.model)
            self._thawed.set()
            self._thawed = trio.Event()

    # --- as WorkerHandle

    def signs(self) -> object:
        return self.detail, self.frozen or trio.current_time()

    def post(self, frame: Frame) -> bool:
        if self._inbox is None:
            return False
        self._inbox.send_nowait(frame)
        return True

    def look_after(self) -> None:
        if self._nursery is not None and self.ready and not self._looked_after:
            self._looked_after = True
            self._nursery.start_soon(self._look)

    async def _look(self) -> None:
        signs = self._signs
        for _ in range(int(_LOOK_S / _TICK_S)):
            await trio.sleep(_TICK_S)
            if self._signs > signs or not self.frozen:
                break
        else:
            self.state = "silent"
            self._handlers.on_silent(self.model, "neither answers nor computes: stopped, or hung")
        self._looked_after = False

    async def run(self) -> None:
        delay = _FIRST_DELAY_S
        while True:
            started = trio.current_time()
            why = await self._run_once()
            if self.ready and trio.current_time() - started > _STEADY_S:
                delay = _FIRST_DELAY_S
            self.state, self.detail, self.pid = "restarting", why, None
            self.spans, self.stats = (), WorkerStats()
            self._note("worker down", self.request.spans, why)
            self._handlers.on_down(self.model, why, self._running)
            await trio.sleep(delay)
            delay = min(delay * 2, _LONGEST_DELAY_S)

    async def _run_once(self) -> str:
        self.state, self.detail, self.pid = "loading", "", 1
        self._killed, self._running = trio.Event(), frozenset()
        send, receive = trio.open_memory_channel[Frame](math.inf)
        self._inbox = send
        why = "killed by SIGKILL"
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._live, receive)
                await self._killed.wait()
                nursery.cancel_scope.cancel()
            self._nursery, self._looked_after = None, False
            await trio.sleep(self._rng.uniform(0.0, 0.02))  # until the process is reaped
        finally:
            self._inbox = None
        return why

    async def _live(self, receive: trio.MemoryReceiveChannel[Frame]) -> None:
        await trio.sleep(self._rng.uniform(0.3, 1.5))
        await self._while_frozen()
        worker = SpanWorker(self.request, lambda done, total: None)
        self.spans, self.state, self._computes = worker.loaded(), "ready", worker
        self.stats = WorkerStats(kv_budget=worker.budget.total)
        self._handlers.on_ready(self.model)
        speed = Speed()
        self._nursery.start_soon(self._tell, worker, speed)
        scheduler, pace = Scheduler(), Pace()
        while True:
            if not len(scheduler):
                self._put(scheduler, await receive.receive())
            await self._while_frozen()
            while receive.statistics().current_buffer_used:
                self._put(scheduler, receive.receive_nowait())
            batch = scheduler.take(pace.budget)
            begun = trio.current_time()
            self._running = frozenset(hops_of(batch))
            answers = worker.run(batch)
            took = self._rng.uniform(0.001, 0.003) + self._rng.uniform(0.0001, 0.0004) * positions(batch)
            took *= self.slower
            await trio.sleep(took)
            await self._while_frozen()
            if isinstance(batch[0].message, StepFrame):
                works, waiting = worker.works(batch), scheduler.beside(batch)
                speed.observe(works, begun, trio.current_time(), waiting)
            pace.observe(positions(batch), took)
            self._running = frozenset()
            await trio.sleep(self._rng.uniform(0.0, 0.0003))  # until its writer has written them
            for answer in answers:
                self._signs += 1
                self._handlers.on_frame(self.model, answer)

    async def _tell(self, worker: SpanWorker, speed: Speed) -> None:
        while True:
            await trio.sleep(_STATS_S)
            if not self.frozen:
                figures, budget = speed.said(trio.current_time()), worker.budget
                self.stats = WorkerStats(
                    kv_budget=budget.total,
                    kv_busy=budget.busy_bytes,
                    step_ms=figures.step_ms,
                    prompt_ms=figures.prompt_ms,
                    queue=figures.queue,
                )

    async def _while_frozen(self) -> None:
        while self.frozen:
            with trio.move_on_after(_SILENT_S) as patience:
                await self._thawed.wait()
            if patience.cancelled_caught:
                self._killed.set()  # as the daemon kills one that hangs

    def _put(self, scheduler: Scheduler, frame: Frame) -> None:
        key = getattr(frame.message, "key", None)
        if not isinstance(key, HopKey):
            raise BackendError(f"{type(frame.message).__name__} is no frame of a hop")
        scheduler.put(key, frame)
