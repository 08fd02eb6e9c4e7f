"""Another worker for a model that is in use: loaded beside the old one where memory allows, which then hands
its hops over and ends. Knows nothing of configurations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from dgn_backends.span import Span, format_spans
from dgnd.config.schema import ModelSection
from dgnd.drain import Drain
from dgnd.hop import Hop
from dgnd.hops import HopServer
from dgnd.leaving import Leaving
from dgnd.models import LocalModel
from dgnd.system_memory import available_bytes
from dgnd.waiting import wait_while
from dgnd.workers import WorkerHandle
from dgnd.workshop import Workshop

log = logging.getLogger("dgnd.replacing")

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a model is to have loaded here. `weights_bytes`: what that takes, as planned."""

    section: ModelSection
    spans: tuple[Span, ...]
    weights_bytes: int


@dataclass(slots=True)
class Replacing:
    """`tell`: says to peers what is offered now, ahead of what is posted after it. `drain` knows how long
    hops have to be handed over."""

    workshop: Workshop
    hops: HopServer
    leaving: Leaving
    tell: Callable[[], None]
    drain: Drain

    async def replace(self, model: LocalModel, wanted: Wanted) -> str:
        """Gives `model` the worker that is wanted; returns why the old one stays, empty if it does not."""
        old = model.worker
        new = self.workshop.build(model, wanted.section, wanted.spans) if wanted.spans else None
        if old is not None and new is not None and wanted.weights_bytes < available_bytes():
            self.workshop.start(new)
            why = await _loaded(new)
            if why:
                await self.workshop.stop(new)
                return f"{format_spans(wanted.spans)} of {model.name} can't be loaded: {why}"
            self._switch(model, new, wanted)
            await self._retire(old)
            return ""
        if old is not None:
            self.leaving.models.add(model.name)
            self.tell()
            await self._retire(old)
            self.leaving.models.discard(model.name)
        self._switch(model, new, wanted)
        if new is not None:
            self.workshop.start(new)
        return ""

    def _switch(self, model: LocalModel, new: WorkerHandle | None, wanted: Wanted) -> None:
        model.worker, model.section, model.spans = new, wanted.section, wanted.spans
        self.tell()

    async def _retire(self, old: WorkerHandle) -> None:
        """Has its hops handed over, and ends it."""
        why = "its blocks are given up or loaded anew"
        self.hops.ask_to_leave(self._hops_in(old), why)
        await wait_while(lambda: self._hops_in(old), self.drain.drain_s)
        self.hops.close(self._hops_in(old), why)
        await self.workshop.stop(old)
        log.info("worker of %s with %s has ended", old.model, ",".join(old.request.spans))

    def _hops_in(self, worker: WorkerHandle) -> Sequence[Hop]:
        hops = self.hops.hops
        return [hops[key] for key in self.workshop.hops_of(worker) if key in hops]


async def _loaded(worker: WorkerHandle) -> str:
    """Waits until it serves; returns why it will not."""
    while not worker.ready:
        if worker.state in ("restarting", "failed"):
            return worker.detail
        await trio.sleep(_POLL_S)
    return ""
