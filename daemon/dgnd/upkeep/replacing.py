"""Another worker for a model that is in use: loaded beside the old one where memory allows, which then hands
its hops over and ends. Knows nothing of configurations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from dgn_backends.quant_plan import loaded_bytes
from dgn_backends.span import Span, format_spans
from dgnd.config.schema import ModelSection
from dgnd.hosting.hop import Hop
from dgnd.hosting.leaving import Leaving
from dgnd.hosting.server import HopServer
from dgnd.models.local import LocalModel
from dgnd.upkeep.drain import Drain
from dgnd.upkeep.workshop import Workshop
from dgnd.waiting import wait_while
from dgnd.workers.handle import WorkerHandle

log = logging.getLogger("dgnd.replacing")

_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a model is to have loaded here; `spans` None: what it has."""

    section: ModelSection
    spans: tuple[Span, ...] | None


@dataclass(slots=True)
class Replacing:
    """`tell`: says to peers what is offered now, ahead of what is posted after it. `drain` knows how long
    hops have to be handed over."""

    workshop: Workshop
    hops: HopServer
    leaving: Leaving
    tell: Callable[[], None]
    drain: Drain
    room: Callable[[], int]  #: bytes that the weights of one more worker may take
    one_at_a_time: trio.Lock = field(default_factory=trio.Lock)

    async def replace(self, model: LocalModel, wanted: Wanted) -> str:
        """Gives `model` the worker that is wanted; returns why the old one stays, empty if it does not.

        One after the other, whoever asks: what memory is available is known only when the one before is done.
        """
        async with self.one_at_a_time:
            model.coming = model.spans if wanted.spans is None else wanted.spans
            self.tell()
            try:
                return await self._replace(model, wanted.section, model.coming)
            finally:
                if model.coming is not None:
                    model.coming = None
                    self.tell()

    async def _replace(self, model: LocalModel, section: ModelSection, spans: tuple[Span, ...]) -> str:
        old = model.worker
        new = self.workshop.build(model, section, spans) if spans else None
        needed = loaded_bytes(section.quant, model.config, spans)
        if old is not None and new is not None and needed < self.room():
            self.workshop.start(new)
            why = await loaded(new)
            if why:
                await self.workshop.stop(new)
                return f"{format_spans(spans)} of {model.name} can't be loaded: {why}"
            self._switch(model, new, section, spans)
            await self._retire(old)
            return ""
        if old is not None:
            self.leaving.models.add(model.name)
            self.tell()
            await self._retire(old)
            self.leaving.models.discard(model.name)
        self._switch(model, new, section, spans)
        if new is not None:
            self.workshop.start(new)
        return ""

    def _switch(
        self, model: LocalModel, new: WorkerHandle | None, section: ModelSection, spans: tuple[Span, ...]
    ) -> None:
        model.worker, model.section, model.spans = new, section, spans
        model.coming = None
        self.tell()

    async def _retire(self, old: WorkerHandle) -> None:
        """Has its hops handed over, and ends it."""
        why = "its blocks are given up or loaded anew"
        self.hops.ask_to_leave(self.hops_in(old), why)
        await wait_while(lambda: self.hops_in(old), self.drain.drain_s)
        self.hops.close(self.hops_in(old), why)
        await self.workshop.stop(old)
        log.info("worker of %s with %s has ended", old.model, ",".join(old.request.spans))

    def hops_in(self, worker: WorkerHandle) -> Sequence[Hop]:
        """The hops of this node that run in `worker`."""
        hops = self.hops.hops
        return [hops[key] for key in self.workshop.hops_of(worker) if key in hops]


async def loaded(worker: WorkerHandle, needless: Callable[[], str] = lambda: "") -> str:
    """Waits until it serves; returns why it will not, or what `needless` says."""
    while not worker.ready:
        if worker.state in ("restarting", "failed", "stopped"):
            return worker.detail
        if why := needless():
            return why
        await trio.sleep(_POLL_S)
    return ""
