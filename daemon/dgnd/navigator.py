"""Which route a session takes now, and getting it opened: between what is offered and a session's driver.

Words why there is none. Knows nothing of token ids or text.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import trio

from dgn_backends.span import format_units
from dgnd.bookings import Bookings
from dgnd.driver import SessionDriver, Waits
from dgnd.errors import (
    BlocksMissing,
    DgnError,
    Inexact,
    LimitError,
    ManifestMismatch,
    ModelError,
    NotReady,
    PeerError,
    PeerGone,
    StaleState,
)
from dgnd.exactness import Line, Way, alike, difference, kinds, same_kind
from dgnd.laying import ModelIdentity, lay_route
from dgnd.mending import mended_line
from dgnd.models import LocalModel
from dgnd.names import Names
from dgnd.offers import OfferBook, conflict_text
from dgnd.routing import Asked, Hop, Offer, edges, find_route, missing_units, predicted_ms, worth_moving
from dgnd.session import RouteHop
from dgnd.suspects import Suspects

log = logging.getLogger("dgnd.navigator")

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Navigator:
    """Routes for sessions of this origin."""

    offers: OfferBook
    names: Names
    suspects: Suspects
    bookings: Bookings

    async def ensure(self, driver: SessionDriver, model: LocalModel, wait_s: float) -> None:
        """Keeps the session's hops if they can be used and nothing is much better, else opens new ones,
        waiting as long as is asked. To be called between two answers.

        Raises what `open` raises.
        """
        if driver.usable and (not driver.exact or _is_exact(driver)):
            self._leave_for_better(driver, model)
        if driver.usable and (not driver.exact or _is_exact(driver)):
            self.bookings.begin(driver.session.id, model.name, [hop.peer for hop in driver.session.route])
            return
        deadline = trio.current_time() + wait_s
        tries = len(self.offers.heard)
        while True:
            try:
                await self.open(driver, model)
                return
            except (NotReady, StaleState, Inexact) as error:
                if trio.current_time() >= deadline:
                    raise
                driver.waits = Waits(error, deadline)
            except (LimitError, PeerError) as error:  # who has no room or does not answer is passed over
                if isinstance(error, PeerGone) or tries <= 0 or not self.can_spare(driver, model):
                    raise
                tries -= 1
                continue
            await trio.sleep(_POLL_S)

    def _leave_for_better(self, driver: SessionDriver, model: LocalModel) -> None:
        """Gives up hops of the session if another route is much better. The hops after the first one that
        changes compute again, too, and where that may give other numbers all do: nothing is mixed."""
        route = driver.session.route
        old = [Hop(hop.peer, hop.span) for hop in route]
        asked, exactly = self._asked(driver, model), driver.line if driver.exact else None
        try:
            new = find_route(asked, self._offered(driver, model, exactly, anybody=False))
        except BlocksMissing:
            return
        offers = self._booked(driver, model, self.offers.offers(model))
        if not worth_moving(asked, offers, old, new, driver.session.sent):
            return
        places = ", ".join(f"{self.names.of(hop.peer)} {hop.span}" for hop in new)
        log.info("session %s moves to %s", driver.session.id, places)
        same = next(i for i, hop in enumerate(new) if hop not in old[i : i + 1])
        ways = [self.offers.way(model, hop.peer, hop.span) for hop in new[same:]]
        if all(way is not None and way.row_invariant for way in ways) and same:
            driver.leaving |= {hop.hop for hop in route[same:]}
            driver.let_go()
        else:
            driver.close()

    async def open(self, driver: SessionDriver, model: LocalModel) -> None:
        """Opens the best route now, of which the session's hops that still hold what they were sent stay.

        Raises as `_find` does, and what a hop refuses.
        """
        line = self._line(driver, model)
        self.bookings.begin(driver.session.id, model.name, [hop.peer for hop in line])
        manifest = model.manifest
        assert manifest is not None  # `_line` made sure
        identity = ModelIdentity(
            name=model.name,
            config_digest=manifest.config_digest,
            manifest_digest=self.offers.manifests.whole_digest(model.name),
            context=model.config.max_positions,
            wire="plain" if driver.exact else model.section.wire,
        )
        ways = [self._way(model, hop) for hop in line]
        await lay_route(driver, line, edges(line, self.offers.live(), self.offers.me), ways, identity)

    def _way(self, model: LocalModel, hop: Hop | RouteHop) -> Way | None:
        """How a hop computes: what was said when it was opened."""
        return hop.way if isinstance(hop, RouteHop) else self.offers.way(model, hop.peer, hop.span)

    def _line(self, driver: SessionDriver, model: LocalModel) -> tuple[Hop | RouteHop, ...]:
        """The hops of the next route, those that stay as they are."""
        if not driver.exact or driver.exactly is not None:
            return self._line_as(driver, model, driver.exactly)
        if driver.session.route and _is_exact(driver):
            try:
                return self._line_as(driver, model, driver.line)
            except NotReady:
                pass  # nothing is said yet: all of it may be computed elsewhere
        return self._find_exact(driver, model)

    def _line_as(
        self, driver: SessionDriver, model: LocalModel, exactly: Line | None
    ) -> tuple[Hop | RouteHop, ...]:
        """The same where new hops have to compute `exactly` so."""
        if driver.leaving:
            try:
                return self._mended(driver, model, exactly, leaving=False, anybody=False)
            except NotReady:
                pass
            try:  # nobody else has it: what leaves stays as long as it can
                return self._mended(driver, model, exactly, leaving=True)
            except NotReady:
                pass
        return self._mended(driver, model, exactly, leaving=False)

    def can_spare(self, driver: SessionDriver, model: LocalModel) -> bool:
        """Whether others can take the place of the session's hops that are lost or about to leave, without
        those that are passed over."""
        try:
            self._mended(driver, model, driver.exactly, leaving=False, anybody=False)
        except DgnError:
            return False
        return True

    def _mended(
        self,
        driver: SessionDriver,
        model: LocalModel,
        exactly: Line | None,
        *,
        leaving: bool,
        anybody: bool = True,
    ) -> tuple[Hop | RouteHop, ...]:
        """The hops that live, with others in the gaps; `leaving`: with those that are about to leave.
        `anybody`: also with those that are passed over, where nobody else has the blocks."""
        staying = [
            hop
            for hop in driver.hops
            if self._lives(driver, model, hop) and (leaving or hop.hop not in driver.leaving)
        ]
        if not staying:
            return self._find(driver, model, exactly, anybody=anybody)
        staying.sort(key=lambda hop: hop.span.units()[0])
        self._refuse_conflict(model, [hop.peer for hop in staying])
        held = {unit for hop in staying for unit in hop.span.units()}
        offers = self._offered(driver, model, exactly, held, anybody=anybody)
        return mended_line(self._asked(driver, model), staying, offers)

    def _lives(self, driver: SessionDriver, model: LocalModel, hop: RouteHop) -> bool:
        return (
            hop.hop in driver.sound
            and hop.hop not in driver.dead
            and hop.peer not in self.suspects
            and self.offers.way(model, hop.peer, hop.span) is not None
        )

    def _usable(
        self, model: LocalModel, exactly: Line | None, held: Collection[int] = (), *, anybody: bool = True
    ) -> list[Offer]:
        """Offers of peers that answer and have room, and compute `exactly` so; with `anybody`, of the others
        too where some block would be missing without them, beside those that are `held`."""
        offers = [
            offer
            for offer in self.offers.offers(model)
            for way in [self.offers.way(model, offer.peer, offer.span)]
            if exactly is None or all(exactly[unit] == way for unit in offer.span.units())
        ]
        trusted = [
            offer
            for offer in offers
            if offer.peer not in self.suspects and not self.suspects.passed_over(offer.peer, model.name)
        ]
        lacking = missing_units(trusted, model.config.n_blocks) - set(held)
        return offers if anybody and lacking else trusted

    def _offered(
        self,
        driver: SessionDriver,
        model: LocalModel,
        exactly: Line | None,
        held: Collection[int] = (),
        *,
        anybody: bool = True,
    ) -> list[Offer]:
        """What is usable for a session."""
        return self._booked(driver, model, self._usable(model, exactly, held, anybody=anybody))

    def _booked(self, driver: SessionDriver, model: LocalModel, offers: Sequence[Offer]) -> list[Offer]:
        """The offers with the answers that this node began just now."""
        session = driver.session.id
        return [
            replace(offer, queue=offer.queue + self.bookings.beside(session, model.name, offer.peer))
            for offer in offers
        ]

    def _asked(self, driver: SessionDriver, model: LocalModel) -> Asked:
        """What a route for a session is searched for, with what is known of links now."""
        config, links, session = model.config, self.offers.links(), driver.session.id
        return Asked(model.name, config.n_blocks, links, session, driver.positions, config.unit_weights)

    def _find(
        self, driver: SessionDriver, model: LocalModel, exactly: Line | None, *, anybody: bool = True
    ) -> tuple[Hop, ...]:
        """The best route now for a session; `anybody` as in `_usable`. Raises ModelError, BackendUnavailable,
        NotReady, BlocksMissing or ManifestMismatch."""
        if model.problem:
            raise ModelError(model.problem)
        if model.manifest is None:
            raise NotReady(f"model {model.name} is being verified: making digests of its files")
        try:
            offers = self._offered(driver, model, exactly, anybody=anybody)
            route = find_route(self._asked(driver, model), offers)
        except BlocksMissing:
            self._refuse_conflict(model, [self.offers.me, *self.offers.heard])
            worker = model.worker
            if worker is not None and worker.fault is not None:
                raise type(worker.fault)(
                    f"model {model.name} can't be loaded here: {worker.fault.message}"
                ) from None
            if worker is not None and not worker.ready:
                detail = f" ({worker.detail})" if worker.detail else ""
                raise NotReady(f"model {model.name} is {worker.state} here{detail}") from None
            raise
        self._refuse_conflict(model, [hop.peer for hop in route])
        return route

    def _find_exact(self, driver: SessionDriver, model: LocalModel) -> tuple[Hop, ...]:
        """The best route whose answer is exact. Raises what `_find` raises, and Inexact, which names who
        could serve what is missing, but not so."""
        self._find(driver, model, None)
        asked, offers = self._asked(driver, model), self._offered(driver, model, None)
        ways = {offer: self.offers.way(model, offer.peer, offer.span) for offer in offers}
        for sets in kinds(way for way in ways.values() if way is not None):
            routes = []
            for together in sets:
                usable = [offer for offer in offers if ways[offer] in together]
                if not missing_units(usable, model.config.n_blocks):
                    route = find_route(asked, usable)
                    routes.append((predicted_ms(asked, usable, route) or 0.0, route))
            if routes:
                return min(routes, key=lambda found: found[0])[1]
        raise Inexact(self._no_exact_route(model, offers, ways))

    def _no_exact_route(
        self, model: LocalModel, offers: Sequence[Offer], ways: Mapping[Offer, Way | None]
    ) -> str:
        """Who would have to compute as this node does, or, where it does nothing, as most of the others."""

        def served(way: Way) -> set[int]:
            return {unit for o in offers for unit in o.span.units() if same_kind(ways[o], way)}

        mine = {ways[offer] for offer in offers if offer.peer == self.offers.me}
        known = sorted({way for way in ways.values() if way is not None}, key=repr)
        most = max(known, key=lambda way: (way in mine, len(served(way))), default=None)
        others = "nodes do not say how they compute"
        if most is not None:
            lacking = frozenset(range(model.config.n_blocks + 2)) - served(most)
            others = self._others(model, lacking, dict.fromkeys(lacking, most))
        return (
            f"no exact route for model {model.name}: {others}; "
            "ask without --exact, or give all nodes the same quant and dtype"
        )

    def inexact_only(self, model: LocalModel, exactly: Line | None) -> str:
        """Who serves what nobody serves `exactly` so, and why that does not count; empty if nobody does."""
        return "" if exactly is None else self._others(model, self.missing_units(model, exactly), exactly)

    def _others(self, model: LocalModel, lacking: Collection[int], wanted: Line) -> str:
        said = []
        for offer in self._usable(model, None):
            units = sorted(set(offer.span.units()) & set(lacking))
            way = self.offers.way(model, offer.peer, offer.span)
            should = wanted.get(units[0]) if units else None
            if way is not None and should is not None and way != should:
                blocks = format_units(units, model.config.n_blocks)
                said.append(f"{self.names.of(offer.peer)} has {blocks} with {difference(way, should)}")
        return "; ".join(dict.fromkeys(said))

    def missing_units(self, model: LocalModel, exactly: Line | None = None) -> frozenset[int]:
        """What nobody reachable serves now, or not `exactly` so."""
        return missing_units(self._usable(model, exactly), model.config.n_blocks)

    def _refuse_conflict(self, model: LocalModel, nodes: list[str]) -> None:
        conflict = self.offers.manifests.conflict(model.name, nodes)
        if conflict is not None:
            raise ManifestMismatch(conflict_text(model.name, conflict, self.names.of))


def _is_exact(driver: SessionDriver) -> bool:
    """Whether what the session's hops hold would give an exact answer."""
    return alike(driver.line) and driver.lineage.pure
