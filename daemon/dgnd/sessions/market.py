"""What sessions of this origin can be given now: what nodes offer, without who is passed over, and with the
answers that this node began just now.

Words why there is nothing. Knows nothing of how a route is opened, or of which answers must be exact.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from dgnd.errors import BlocksMissing, ManifestMismatch, ModelError, NotReady
from dgnd.models.local import LocalModel
from dgnd.peers.names import Names
from dgnd.peers.offers import OfferBook, conflict_text
from dgnd.routing.bookings import Bookings
from dgnd.routing.exactness import Line, Way
from dgnd.routing.search import Asked, Hop, Offer, find_route, missing_units
from dgnd.routing.suspects import Suspects
from dgnd.sessions.driver import SessionDriver
from dgnd.sessions.session import RouteHop


@dataclass(frozen=True, slots=True)
class Market:
    """As one origin sees it."""

    offers: OfferBook
    names: Names
    suspects: Suspects
    bookings: Bookings

    def way(self, model: LocalModel, hop: Hop | RouteHop) -> Way | None:
        """How a hop computes: what was said when it was opened."""
        return hop.way if isinstance(hop, RouteHop) else self.offers.way(model, hop.peer, hop.span)

    def lives(self, driver: SessionDriver, model: LocalModel, hop: RouteHop) -> bool:
        """Whether a hop of the session has what it was sent, answers, and is still offered."""
        return (
            hop.hop in driver.sound
            and hop.hop not in driver.dead
            and hop.peer not in self.suspects
            and self.offers.way(model, hop.peer, hop.span) is not None
        )

    def usable(
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

    def offered(
        self,
        driver: SessionDriver,
        model: LocalModel,
        exactly: Line | None,
        held: Collection[int] = (),
        *,
        anybody: bool = True,
    ) -> list[Offer]:
        """What is usable for a session."""
        return self.booked(driver, model, self.usable(model, exactly, held, anybody=anybody))

    def booked(self, driver: SessionDriver, model: LocalModel, offers: Sequence[Offer]) -> list[Offer]:
        """The offers with the answers that this node began just now."""
        session = driver.session.id
        return [
            replace(offer, queue=offer.queue + self.bookings.beside(session, model.name, offer.peer))
            for offer in offers
        ]

    def asked(self, driver: SessionDriver, model: LocalModel) -> Asked:
        """What a route for a session is searched for, with what is known of links now."""
        config, links, session = model.config, self.offers.links(), driver.session.id
        return Asked(model.name, config.n_blocks, links, session, driver.positions, config.unit_weights)

    def find(
        self, driver: SessionDriver, model: LocalModel, exactly: Line | None, *, anybody: bool = True
    ) -> tuple[Hop, ...]:
        """The best route now for a session; `anybody` as in `usable`. Raises ModelError, BackendUnavailable,
        NotReady, BlocksMissing or ManifestMismatch."""
        if model.problem:
            raise ModelError(model.problem)
        if model.manifest is None:
            raise NotReady(f"model {model.name} is being verified: making digests of its files")
        try:
            offers = self.offered(driver, model, exactly, anybody=anybody)
            route = find_route(self.asked(driver, model), offers)
        except BlocksMissing:
            self.refuse_conflict(model, [self.offers.me, *self.offers.heard])
            worker = model.worker
            if worker is not None and worker.fault is not None:
                raise type(worker.fault)(
                    f"model {model.name} can't be loaded here: {worker.fault.message}"
                ) from None
            if worker is not None and not worker.ready:
                away = self.offers.away  # paused: waiting for the worker alone helps nobody
                detail = f"the node is {away}; 'dgnctl resume' ends that" if away else worker.detail
                why = f" ({detail})" if detail else ""
                raise NotReady(f"model {model.name} is {worker.state} here{why}") from None
            raise
        self.refuse_conflict(model, [hop.peer for hop in route])
        return route

    def missing_units(self, model: LocalModel, exactly: Line | None = None) -> frozenset[int]:
        """What nobody reachable serves now, or not `exactly` so."""
        return missing_units(self.usable(model, exactly), model.config.n_blocks)

    def refuse_conflict(self, model: LocalModel, nodes: list[str]) -> None:
        """Raises ManifestMismatch where two of the nodes have other weights."""
        conflict = self.offers.manifests.conflict(model.name, nodes)
        if conflict is not None:
            raise ManifestMismatch(conflict_text(model.name, conflict, self.names.of))
