"""Which route a session takes now, and getting it opened: between what is offered and a session's driver.

Words why there is none. Knows nothing of token ids or text.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import trio

from dgnd.driver import SessionDriver
from dgnd.errors import BlocksMissing, DgnError, ManifestMismatch, ModelError, NotReady, StaleState
from dgnd.exactness import Line
from dgnd.laying import ModelIdentity, lay_route
from dgnd.mending import mended_line
from dgnd.models import LocalModel
from dgnd.names import Names
from dgnd.offers import OfferBook, conflict_text
from dgnd.routing import Asked, Hop, Offer, edges, find_route, missing_units
from dgnd.session import RouteHop
from dgnd.suspects import Suspects

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Navigator:
    """Routes for sessions of this origin."""

    offers: OfferBook
    names: Names
    suspects: Suspects

    async def ensure(self, driver: SessionDriver, model: LocalModel, wait_s: float) -> None:
        """Keeps the session's hops if they can be used, else opens new ones, waiting as long as is asked.

        Raises what `open` raises.
        """
        if driver.session.route and driver.broken is None:
            return
        deadline = trio.current_time() + wait_s
        while True:
            try:
                await self.open(driver, model)
                return
            except (NotReady, StaleState):
                if trio.current_time() >= deadline:
                    raise
            await trio.sleep(_POLL_S)

    async def open(self, driver: SessionDriver, model: LocalModel) -> None:
        """Opens the best route now, of which the session's hops that still hold what they were sent stay.

        Raises as `find` does, and what a hop refuses.
        """
        line = self._line(driver, model)
        # Noted now: a hop that dies while the route is laid is offered no more, but computed like this.
        driver.line = {
            unit: way
            for hop in line
            for way in [self.offers.way(model, hop.peer, hop.span)]
            for unit in hop.span.units()
        }
        manifest = model.manifest
        assert manifest is not None  # `_line` made sure
        identity = ModelIdentity(
            name=model.name,
            config_digest=manifest.config_digest,
            manifest_digest=self.offers.manifests.whole_digest(model.name),
            context=model.config.max_positions,
        )
        await lay_route(driver, line, edges(line, self.offers.live(), self.offers.me), identity)

    def _line(self, driver: SessionDriver, model: LocalModel) -> tuple[Hop | RouteHop, ...]:
        """The hops of the next route, those that stay as they are."""
        try:
            return self._mended(driver, model, leaving=False)
        except NotReady:
            if not driver.leaving:
                raise
        # Nobody else has it: what leaves stays as long as it can.
        return self._mended(driver, model, leaving=True)

    def can_spare(self, driver: SessionDriver, model: LocalModel) -> bool:
        """Whether others can take the place of the session's hops that are about to leave."""
        try:
            self._mended(driver, model, leaving=False)
        except DgnError:
            return False
        return True

    def _mended(
        self, driver: SessionDriver, model: LocalModel, *, leaving: bool
    ) -> tuple[Hop | RouteHop, ...]:
        """The hops that live, with others in the gaps; `leaving`: with those that are about to leave."""
        staying = [
            hop
            for hop in driver.session.route
            if self._lives(driver, model, hop) and (leaving or hop.hop not in driver.leaving)
        ]
        if not staying:
            return self.find(model, driver.session.id, exactly=driver.exactly)
        self._refuse_conflict(model, [hop.peer for hop in staying])
        offers = self._usable(model, driver.exactly)
        return mended_line(self.asked(model, driver.session.id), staying, offers)

    def _lives(self, driver: SessionDriver, model: LocalModel, hop: RouteHop) -> bool:
        return (
            hop.hop in driver.sound
            and hop.hop not in driver.dead
            and hop.peer not in self.suspects
            and self.offers.way(model, hop.peer, hop.span) is not None
        )

    def _usable(self, model: LocalModel, exactly: Line | None) -> list[Offer]:
        """Offers of peers that answer, and compute `exactly` so; of peers that don't answer too, where some
        block would be missing without them."""
        offers = [
            offer
            for offer in self.offers.offers(model)
            for way in [self.offers.way(model, offer.peer, offer.span)]
            if exactly is None or all(exactly[unit] == way for unit in offer.span.units())
        ]
        trusted = [offer for offer in offers if offer.peer not in self.suspects]
        return offers if missing_units(trusted, model.config.n_blocks) else trusted

    def asked(self, model: LocalModel, session: str = "", positions: int = 0) -> Asked:
        """What a route for a session of so many positions is searched for, with what is known of links
        now."""
        config = model.config
        return Asked(
            model.name, config.n_blocks, self.offers.links(), session, positions, config.unit_weights
        )

    def find(
        self,
        model: LocalModel,
        session: str = "",
        positions: int = 0,
        avoid: Collection[str] = (),
        exactly: Line | None = None,
    ) -> tuple[Hop, ...]:
        """The best route now for a session of so many positions, without the peers in `avoid`. Raises
        ModelError, BackendUnavailable, NotReady, BlocksMissing or ManifestMismatch."""
        if model.problem:
            raise ModelError(model.problem)
        if model.manifest is None:
            raise NotReady(f"model {model.name} is being verified: making digests of its files")
        try:
            route = find_route(self.asked(model, session, positions), self._usable(model, exactly), avoid)
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

    def missing_units(self, model: LocalModel, exactly: Line | None = None) -> frozenset[int]:
        """What nobody reachable serves now, or not `exactly` so."""
        return missing_units(self._usable(model, exactly), model.config.n_blocks)

    def _refuse_conflict(self, model: LocalModel, nodes: list[str]) -> None:
        conflict = self.offers.manifests.conflict(model.name, nodes)
        if conflict is not None:
            raise ManifestMismatch(conflict_text(model.name, conflict, self.names.of))
