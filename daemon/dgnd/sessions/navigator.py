"""Which route a session takes now, and getting it opened: between what is offered and a session's driver.

Words why there is none. Knows nothing of token ids or text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from dgnd.errors import (
    BlocksMissing,
    DgnError,
    Inexact,
    LimitError,
    NotReady,
    PeerError,
    PeerGone,
    StaleState,
)
from dgnd.logs.fields import about
from dgnd.models.local import LocalModel
from dgnd.routing.exactness import Line, alike
from dgnd.routing.search import Hop, edges, find_route, worth_moving
from dgnd.sessions.driver import SessionDriver, Waits
from dgnd.sessions.exact_routes import find_exact
from dgnd.sessions.laying import ModelIdentity, lay_route
from dgnd.sessions.market import Market
from dgnd.sessions.mending import mended_line
from dgnd.sessions.session import RouteHop

log = logging.getLogger("dgnd.navigator")

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Navigator:
    """Routes for sessions of this origin."""

    market: Market

    async def ensure(self, driver: SessionDriver, model: LocalModel, wait_s: float) -> None:
        """Keeps the session's hops if they can be used and nothing is much better, else opens new ones,
        waiting as long as is asked. To be called between two answers.

        Raises what `open` raises.
        """
        if driver.usable and (not driver.exact or _is_exact(driver)):
            self._leave_for_better(driver, model)
        if driver.usable and (not driver.exact or _is_exact(driver)):
            self._book(driver, model, driver.session.route)
            return
        deadline = trio.current_time() + wait_s
        tries = len(self.market.offers.heard)
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

    def _book(self, driver: SessionDriver, model: LocalModel, line: Sequence[Hop | RouteHop]) -> None:
        self.market.bookings.begin(driver.session.id, model.name, [hop.peer for hop in line])

    def _leave_for_better(self, driver: SessionDriver, model: LocalModel) -> None:
        """Gives up hops of the session if another route is much better. The hops after the first one that
        changes compute again, too, and where that may give other numbers all do: nothing is mixed."""
        route = driver.session.route
        old = [Hop(hop.peer, hop.span) for hop in route]
        asked, exactly = self.market.asked(driver, model), driver.line if driver.exact else None
        try:
            new = find_route(asked, self.market.offered(driver, model, exactly, anybody=False))
        except BlocksMissing:
            return
        offers = self.market.booked(driver, model, self.market.offers.offers(model))
        if not worth_moving(asked, offers, old, new, driver.session.sent):
            return
        places = ", ".join(f"{self.market.names.of(hop.peer)} {hop.span}" for hop in new)
        log.info(
            "session %s moves to %s",
            driver.session.id,
            places,
            extra=about(driver.session.generation, driver.session.id),
        )
        same = next(i for i, hop in enumerate(new) if hop not in old[i : i + 1])
        ways = [self.market.offers.way(model, hop.peer, hop.span) for hop in new[same:]]
        if all(way is not None and way.row_invariant for way in ways) and same:
            driver.leaving |= {hop.hop for hop in route[same:]}
            driver.let_go()
        else:
            driver.close()

    async def open(self, driver: SessionDriver, model: LocalModel) -> None:
        """Opens the best route now, of which the session's hops that still hold what they were sent stay.

        Raises as `Market.find` does, and what a hop refuses.
        """
        line = self._line(driver, model)
        self._book(driver, model, line)
        manifest = model.manifest
        assert manifest is not None  # `_line` made sure
        identity = ModelIdentity(
            name=model.name,
            config_digest=manifest.config_digest,
            manifest_digest=self.market.offers.manifests.whole_digest(model.name),
            context=model.config.max_positions,
            wire="plain" if driver.exact else model.section.wire,
        )
        ways = [self.market.way(model, hop) for hop in line]
        offers = self.market.offers
        await lay_route(driver, line, edges(line, offers.live(), offers.me), ways, identity)

    def _line(self, driver: SessionDriver, model: LocalModel) -> tuple[Hop | RouteHop, ...]:
        """The hops of the next route, those that stay as they are."""
        if not driver.exact or driver.exactly is not None:
            return self._line_as(driver, model, driver.exactly)
        if driver.session.route and _is_exact(driver):
            try:
                return self._line_as(driver, model, driver.line)
            except NotReady:
                pass  # nothing is said yet: all of it may be computed elsewhere
        return find_exact(self.market, driver, model)

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
            if self.market.lives(driver, model, hop) and (leaving or hop.hop not in driver.leaving)
        ]
        if not staying:
            return self.market.find(driver, model, exactly, anybody=anybody)
        staying.sort(key=lambda hop: hop.span.units()[0])
        self.market.refuse_conflict(model, [hop.peer for hop in staying])
        held = {unit for hop in staying for unit in hop.span.units()}
        offers = self.market.offered(driver, model, exactly, held, anybody=anybody)
        return mended_line(self.market.asked(driver, model), staying, offers)


def _is_exact(driver: SessionDriver) -> bool:
    """Whether what the session's hops hold would give an exact answer."""
    return alike(driver.line) and driver.lineage.pure
