"""This node's workers: built, run, ended, and which of them has the KV of which hop.

A model may change workers while it is used: a hop is opened in the model's worker of that moment and stays
there to its end. Knows nothing of hops but their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from dgn_backends.registry import choose_backend
from dgn_backends.span import Span, parse_spans
from dgnd.background import Background
from dgnd.config.schema import ModelSection
from dgnd.models.local import LocalModel
from dgnd.wire.messages import CloseHop, Frame, HopKey, LoadSpans, OpenSequence, WorkDone
from dgnd.workers.handle import WorkerHandle, WorkerHandlers
from dgnd.workers.seal import Seal


@dataclass(frozen=True, slots=True)
class WorkshopHandlers:
    """What the node does with news of workers; the first text is the model. None of these may block."""

    on_frame: Callable[[str, Frame], None]
    on_ready: Callable[[], None]
    on_silent: Callable[[str, str, Collection[HopKey]], None]  #: why, and the hops in that worker
    #: why, the hops that were in that worker, and those of them whose steps it was computing
    on_down: Callable[[str, str, Collection[HopKey], Collection[HopKey]], None]
    on_done: Callable[[str, WorkDone, WorkDone], None]  #: what a worker had done before, and what now


class Workshop:
    """All workers of a node, which run in its `background`. `cache`: where they may keep quantised weights;
    `make`: makes one of them."""

    def __init__(
        self,
        models: Mapping[str, LocalModel],
        cache: Path,
        handlers: WorkshopHandlers,
        background: Background,
        make: Callable[[LoadSpans, WorkerHandlers, Seal], WorkerHandle] = WorkerHandle,
    ) -> None:
        self._models = models
        self._make = make
        self._cache = cache
        self._handlers = handlers
        self._homes: dict[HopKey, WorkerHandle] = {}
        self._running: dict[WorkerHandle, tuple[trio.CancelScope, trio.Event]] = {}
        self._background = background
        self._closed = ""  # why no worker runs
        self.allowance: Callable[[WorkerHandle], int] = lambda _: 0  #: bytes that one that starts may have

    def build(self, model: LocalModel, section: ModelSection, spans: Sequence[Span]) -> WorkerHandle:
        """A worker for `spans` with the settings of `section`, not yet started. Raises BackendUnavailable."""
        backend = choose_backend(section.backend, section.quant, section.device)
        given = self._handlers
        handlers = WorkerHandlers(
            on_frame=given.on_frame,
            on_ready=lambda _: given.on_ready(),
            on_silent=lambda name, why: given.on_silent(name, why, self.hops_of(worker)),
            on_down=lambda name, why, running: given.on_down(name, why, self.hops_of(worker), running),
            on_done=given.on_done,
        )
        request = model.load_request(section, spans, backend, self._cache)
        worker = self._make(request, handlers, model.seal)
        worker.allowance = self.allowance
        return worker

    # --- life

    def start(self, worker: WorkerHandle) -> None:
        """Runs it until `stop`. While the workshop is closed it stays `stopped`."""
        if self._closed:
            worker.stopped(self._closed)
            return
        worker.state, worker.detail = "starting", ""
        scope, gone = trio.CancelScope(), trio.Event()
        self._running[worker] = scope, gone
        self._background.start(self._work, worker, scope, gone)

    async def stop(self, worker: WorkerHandle) -> None:
        """Ends it; its process is gone when this returns."""
        found = self._running.pop(worker, None)
        if found is not None:
            scope, gone = found
            scope.cancel()
            await gone.wait()

    def close(self, why: str) -> None:
        """No worker is started from now on, until `open`; those that run are `stop_all`'s."""
        self._closed = why

    def open(self) -> None:
        """Workers may run again; whoever closed it starts them."""
        self._closed = ""

    async def stop_all(self) -> None:
        """Ends all at once; their processes are gone when this returns."""
        workers = list(self._running)
        async with trio.open_nursery() as nursery:
            for worker in workers:
                nursery.start_soon(self.stop, worker)
        for worker in workers:
            worker.stopped(self._closed)

    async def _work(self, worker: WorkerHandle, scope: trio.CancelScope, gone: trio.Event) -> None:
        try:
            with scope:
                await worker.run()
        finally:
            gone.set()

    # --- hops

    def post(self, model: str, frame: Frame) -> bool:
        """Gives `frame` to the worker that has its hop, a new hop to the worker of `model`; False where there
        is none now."""
        message = frame.message
        key = getattr(message, "key", None)
        assert isinstance(key, HopKey)  # what is sent here speaks of a hop
        if isinstance(message, OpenSequence):
            local = self._models.get(model)
            (span,) = parse_spans(message.span, local.config.n_blocks) if local is not None else (None,)
            home = local.worker_for(span) if local is not None and span is not None else None
            if home is not None:
                self._homes[key] = home
        worker = self._homes.pop(key, None) if isinstance(message, CloseHop) else self._homes.get(key)
        return worker is not None and worker.post(frame)

    def look_after(self, model: str) -> None:
        """Somebody waits for an answer of the model's workers."""
        for worker in self._running:
            if worker.model == model:
                worker.look_after()

    def running(self) -> Iterator[WorkerHandle]:
        """All that were started and not stopped."""
        return iter(list(self._running))

    def hops_of(self, worker: WorkerHandle) -> set[HopKey]:
        """The hops that are in it."""
        return {key for key, home in self._homes.items() if home is worker}

    def keep(self, keys: Collection[HopKey]) -> None:
        """Forgets all hops but these."""
        self._homes = {key: home for key, home in self._homes.items() if key in keys}
