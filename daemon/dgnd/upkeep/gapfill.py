"""This node loads blocks itself that one of its answers lost and nobody else serves, and gives them back.

They lie in a worker of their own beside the model's, for this node's own answers alone; answers that lack the
same blocks share it. Knows nothing of sessions but their hops; when to ask is for
`dgnd.sessions.recovery`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import trio

from dgn_backends.errors import ModelError
from dgn_backends.span import format_units, span_of_units, spans_of_units
from dgnd.background import Background
from dgnd.errors import DgnError
from dgnd.models.local import Filling, LocalModel
from dgnd.models.sizes import read_sizes
from dgnd.peers.offers import OfferBook
from dgnd.upkeep.replacing import Replacing, loaded
from dgnd.upkeep.workshop import Workshop
from dgnd.waiting import wait_while
from dgnd.words import format_bytes
from dgnd.workers.handle import WorkerHandle

log = logging.getLogger("dgnd.gapfill")

_LOOK_S = 0.2
#: Blocks that no answer runs through or has asked for for so long are given back. An answer asks again and
#: again, but not while it opens hops, which may take 10 s.
_WANTED_S = 15.0
#: What could not be loaded is not tried again for so long.
_AGAIN_S = 30.0


@dataclass(slots=True)
class _Gap:
    """Blocks of a model that were asked for, and how loading them goes."""

    units: frozenset[int]
    asked: float  #: when, at last
    moved: float  #: when it moved at last, or when `problem` was found
    problem: str = ""  #: why they can't be loaded
    exact: bool = False  #: whether others have them only if they compute in the same way


@dataclass(slots=True)
class GapFill:
    """One node's. `changed`: what this node has for its own answers is different now; `room`: bytes that
    weights may take."""

    offers: OfferBook
    workshop: Workshop
    replacing: Replacing
    background: Background
    changed: Callable[[], None]
    room: Callable[[int], int]
    _gaps: dict[str, list[_Gap]] = field(default_factory=dict)  # by model; each gap has other units

    def ask(
        self, model: LocalModel, units: Collection[int], patience_s: float, *, exact: bool
    ) -> float | None:
        """An answer waits for `units` of the model, which nobody serves: loading them begins, unless it is
        under way. Returns when that moved at last; None where they can't be loaded, see `problem`.

        A load that does not move for `patience_s` is given up. `exact`: the answer takes others' blocks only
        where they compute in the same way."""
        gaps, now = self._gaps.setdefault(model.name, []), trio.current_time()
        gaps[:] = [gap for gap in gaps if not gap.problem or now - gap.moved < _AGAIN_S]
        new = frozenset(units).difference(*(gap.units for gap in gaps))
        if new:
            gap = _Gap(new, now, now, self._hindrance(model, new))
            gaps.append(gap)
            if not gap.problem:
                self.background.start(self._fill, model, gap, patience_s)
        found = [gap for gap in gaps if gap.units & set(units)]
        for gap in found:
            gap.asked, gap.exact = now, gap.exact or exact
        return None if any(gap.problem for gap in found) else min((gap.moved for gap in found), default=None)

    def problem(self, model: LocalModel, units: Collection[int]) -> str:
        """Why some of `units` can't be loaded here; empty if nothing is known."""
        gaps = [gap for gap in self._gaps.get(model.name, []) if gap.problem and gap.units & set(units)]
        n_blocks = model.config.n_blocks
        return "; ".join(
            f"this node can't load {format_units(gap.units, n_blocks)} itself: {gap.problem}" for gap in gaps
        )

    def _hindrance(self, model: LocalModel, units: frozenset[int]) -> str:
        """What is known before it is tried."""
        try:
            sizes = read_sizes(model.path, model.config, model.section.quant)
        except ModelError as error:
            return error.message
        absent = units - sizes.present
        if absent:
            return f"the files of {format_units(absent, model.config.n_blocks)} are not in {model.path}"
        needed, room = sizes.of(units), self.room(0)
        if needed > room:
            return (
                f"that takes {format_bytes(needed)}, and weights may take {format_bytes(room)} of the "
                "free memory"
            )
        return ""

    # --- a gap from its being asked for to its being given back

    async def _fill(self, model: LocalModel, gap: _Gap, patience_s: float) -> None:
        spans = spans_of_units(gap.units, model.config.n_blocks)
        what = f"{format_units(gap.units, model.config.n_blocks)} of {model.name}"
        try:
            worker = self.workshop.build(model, model.section, spans)
        except DgnError as error:
            gap.problem = error.message
            return
        log.info("%s is loaded here for an answer that lost it: nobody serves it", what)
        filling = Filling(worker)
        model.fillings.append(filling)
        self.workshop.start(worker)
        try:
            why = await self._loaded(model, gap, worker, patience_s) or await self._unneeded(
                model, gap, filling
            )
        finally:
            model.fillings.remove(filling)
            if not gap.problem:
                self._gaps[model.name].remove(gap)
            with trio.CancelScope(shield=True):
                await self.workshop.stop(worker)
        log.info("%s is given back: %s", what, why)
        self.changed()

    async def _loaded(self, model: LocalModel, gap: _Gap, worker: WorkerHandle, patience_s: float) -> str:
        """Waits until the worker serves; returns why it will not or need not."""
        signs: object = None

        def needless() -> str:
            nonlocal signs
            now, before, signs = trio.current_time(), signs, worker.signs()
            gap.moved = gap.moved if signs == before else now
            if now - gap.moved > patience_s:
                gap.problem = f"loading it did not move for {patience_s:g} s"
            return gap.problem or self._why_unneeded(model, gap, None)

        why = await loaded(worker, needless)
        if why and not worker.ready and worker.state in ("restarting", "failed", "stopped"):
            gap.problem, gap.moved = why, trio.current_time()
        return why

    async def _unneeded(self, model: LocalModel, gap: _Gap, filling: Filling) -> str:
        """Waits until nobody needs the worker any more; returns why."""
        hops_in = self.replacing.hops_in
        while True:
            await trio.sleep(_LOOK_S)
            why = self._why_unneeded(model, gap, filling)
            if why and hops_in(filling.worker):  # others have the blocks, and take the hops over
                filling.leaving = True
                self.replacing.hops.ask_to_leave(hops_in(filling.worker), why)
                await wait_while(
                    lambda: hops_in(filling.worker) and self._why_unneeded(model, gap, filling),
                    self.replacing.drain.drain_s,
                )
                filling.leaving = False
            if why and not hops_in(filling.worker):
                return why

    def _why_unneeded(self, model: LocalModel, gap: _Gap, filling: Filling | None) -> str:
        n_blocks, me = model.config.n_blocks, self.offers.me
        way = None
        if filling is not None and gap.exact:
            first = min(gap.units)
            way = self.offers.way(model, me, span_of_units(range(first, first + 1), n_blocks))
        others = [
            offer
            for offer in self.offers.offers(model)
            if offer.peer != me and (way is None or self.offers.way(model, offer.peer, offer.span) == way)
        ]
        if gap.units <= {unit for offer in others for unit in offer.span.units()}:
            return "others serve it again"
        used = filling is not None and self.replacing.hops_in(filling.worker)
        late = trio.current_time() - gap.asked > _WANTED_S
        return "no answer needs it any more" if late and not used else ""
