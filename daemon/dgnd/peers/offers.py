"""Who offers which spans of which model now: this node's loaded spans and what connected peers said.

Also what this node says of itself in Hello. Knows nothing of sessions or of how to choose a route.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping

import msgspec

from dgn_backends.manifest import Manifest as TensorManifest
from dgn_backends.span import Span, format_spans, format_units, parse_spans
from dgnd.hosting.leaving import Leaving
from dgnd.models.local import LocalModel
from dgnd.peers.told import Offered, Told
from dgnd.peers.trust import ManifestBook
from dgnd.routing.exactness import Way
from dgnd.routing.figures import EXPIRY_S, told_trips
from dgnd.routing.links import Links
from dgnd.routing.search import Offer, missing_units
from dgnd.wire.codec import PROTOCOL_VERSIONS
from dgnd.wire.messages import Frame, Hello, Manifest, ModelOffer, Offers, SpanOffer
from dgnd.wire.plain_text import line

log = logging.getLogger("dgnd.offers")

#: Between two lines about offers of one peer that can't be read; they may come at any rate.
COMPLAIN_S = 60.0


class OfferBook:
    """The live side of the BlocksMap."""

    def __init__(
        self, me: str, name: str, software: str, models: Mapping[str, LocalModel], now: Callable[[], float]
    ) -> None:
        """`now`: monotonic seconds."""
        self.me = me
        self.manifests = ManifestBook(me)
        self.heard: dict[str, Hello] = {}
        self.round_trips: Callable[[], Mapping[str, float]] = dict  #: to connected peers, in ms
        self.leaving = Leaving()  #: of mine
        self.away = ""  #: why this node offers nothing for now, in words
        self.parting: set[str] = set()  #: peers that this node is about to let go
        self._name = name
        self._software = software
        self._models = models
        self._now = now
        self._heard_at: dict[str, float] = {}
        self._told: dict[str, tuple[Hello, Told]] = {}  # what was read of `heard`, with what it was read from
        self._complained: dict[str, float] = {}  # about offers that can't be read, by peer

    # --- what I say

    def hello(self) -> Hello:
        """What this node is and offers, now."""
        return Hello(
            versions=PROTOCOL_VERSIONS,
            software=self._software,
            name=self._name,
            offers=tuple(self._my_offer(model) for model in self._models.values()),
            peers=tuple(self.heard),
            trips=told_trips(self.round_trips()),
            away=self.away,
        )

    def _my_offer(self, model: LocalModel) -> ModelOffer:
        manifest = model.manifest
        return ModelOffer(
            model=model.name,
            n_blocks=model.config.n_blocks,
            config_digest="" if manifest is None else manifest.config_digest,
            tokenizer_digest=None if manifest is None else manifest.tokenizer_digest,
            manifest_digest=None if manifest is None or not manifest.complete else manifest.digest,
            spans=model.span_offers(leaving=self.leaving.refuses(model.name, own=False)),
            planned=self._planned(model),
            auto=model.auto,
        )

    def _planned(self, model: LocalModel) -> str:
        leaves = model.coming is None and self.leaving.refuses(model.name, own=False)
        return "" if leaves else format_spans(model.planned_spans())

    def manifest_frames(self) -> list[Frame]:
        """My manifests, as a new peer is told them."""
        return [
            Frame(
                Manifest(
                    model=model.name,
                    config_digest=model.manifest.config_digest,
                    tokenizer_digest=model.manifest.tokenizer_digest,
                    tensors=dict(model.manifest.tensors),
                    complete=model.manifest.complete,
                )
            )
            for model in self._models.values()
            if model.manifest is not None
        ]

    # --- what I hear

    def peer_up(self, peer: str, hello: Hello) -> None:
        """A peer said Hello."""
        self.heard[peer] = hello
        self._heard_at[peer] = self._now()

    def peer_says(self, peer: str, offers: Offers) -> None:
        """A connected peer's offers changed."""
        hello = self.heard.get(peer)
        if hello is not None:
            self.heard[peer] = msgspec.structs.replace(
                hello, offers=offers.offers, peers=offers.peers, trips=offers.trips, away=offers.away
            )
            self._heard_at[peer] = self._now()

    def peer_down(self, peer: str) -> None:
        """A peer is gone, and its word with it."""
        self.heard.pop(peer, None)
        self._heard_at.pop(peer, None)
        self._told.pop(peer, None)
        self.manifests.forget(peer)

    def peer_manifest(self, peer: str, message: Manifest) -> None:
        """A peer showed the digests of its files; of a model that this node doesn't have, nothing is kept."""
        if message.model not in self._models:
            return
        manifest = TensorManifest(
            config_digest=message.config_digest,
            tokenizer_digest=message.tokenizer_digest,
            tensors=dict(message.tensors),
            complete=message.complete,
        )
        self.manifests.put(peer, message.model, manifest)

    # --- what follows

    def offers(self, model: LocalModel) -> list[Offer]:
        """Spans that can be routed through now: mine, and those of peers whose weights agree with mine; not
        what is about to leave."""
        found = [] if self.leaving.refuses(model.name, own=True) else self._spans(self.me, model)
        for peer in self.heard:
            if peer not in self.parting and self.manifests.usable(peer, model.name):
                found += self._spans(peer, model)
        return found

    def _spans(self, peer: str, model: LocalModel) -> list[Offer]:
        offered, fresh = self._offered(peer, model), self._is_fresh(peer)
        if offered.problem and self._now() >= self._complained.get(peer, -math.inf) + COMPLAIN_S:
            self._complained[peer] = self._now()
            log.warning("offer of %s for %s is not used: %s", peer, model.name, line(offered.problem))
        return [
            Offer(peer, span, item.step_ms, item.prefill_ms, item.queue, item.free_kv_positions)
            for span, said in offered.spans
            if not said.leaving
            for item in [said if fresh else _unmeasured(said)]
        ]

    def _offered(self, peer: str, model: LocalModel) -> Offered:
        """What a node offers of the model, this one too."""
        n_blocks = model.config.n_blocks
        if peer == self.me:
            mine = self.said(peer, model.name)
            return Offered(tuple((span, item) for item in mine for span in parse_spans(item.span, n_blocks)))
        hello = self.heard.get(peer)
        return Offered() if hello is None else self._told_in(peer, hello).read(model.name, n_blocks)

    def _told_in(self, peer: str, hello: Hello) -> Told:
        found = self._told.get(peer)
        if found is None or found[0] is not hello:
            found = self._told[peer] = (hello, Told(hello.offers))
        return found[1]

    def said(self, peer: str, model: str) -> list[SpanOffer]:
        """What a node offers of a model, this one too; without figures that count no more."""
        if peer == self.me:
            mine = self._models.get(model)
            return [] if mine is None else [*mine.span_offers(), *mine.filled_offers()]
        hello = self.heard.get(peer)
        offer = self._told_in(peer, hello).models.get(model) if hello is not None else None
        items = offer.spans if offer is not None else ()
        return list(items) if self._is_fresh(peer) else [_unmeasured(item) for item in items]

    def _is_fresh(self, peer: str) -> bool:
        """Whether the figures that a node said last still count."""
        return peer == self.me or self._now() - self._heard_at.get(peer, -EXPIRY_S) < EXPIRY_S

    def way(self, model: LocalModel, peer: str, span: Span) -> Way | None:
        """How `peer` computes `span`, also if it is about to leave; None where it is not offered now."""
        return self._offered(peer, model).way(span)

    def away_peers(self) -> dict[str, str]:
        """Why connected peers offer nothing for now, in their words; this node too."""
        away = {peer: hello.away for peer, hello in self.heard.items() if hello.away}
        return {**away, self.me: self.away} if self.away else away

    def is_leaving(self, model: LocalModel, peer: str) -> bool:
        """Whether a peer is about to leave with something of the model."""
        return any(item.leaving for item in self.said(peer, model.name))

    def plans(self, model: LocalModel) -> dict[str, frozenset[int]]:
        """For each connected peer with my `model`, the units that it has or is about to have."""
        return {
            peer: self._offered(peer, model).planned
            for peer, _ in self._of_peers(model)
            if self.manifests.quarrel(peer, model.name) is None and peer not in self.parting
        }

    def choosers(self, model: LocalModel) -> dict[str, bool]:
        """The connected peers that choose their blocks of the model themselves, and whether they have."""
        return {peer: bool(offer.planned) for peer, offer in self._of_peers(model) if offer.auto}

    def _of_peers(self, model: LocalModel) -> Iterator[tuple[str, ModelOffer]]:
        for peer, hello in self.heard.items():
            offer = self._told_in(peer, hello).models.get(model.name)
            if offer is not None:
                yield peer, offer

    def missing(self, model: LocalModel) -> str:
        """What nobody reachable serves, in the config's notation; empty when a route exists."""
        n_blocks = model.config.n_blocks
        return format_units(missing_units(self.offers(model), n_blocks), n_blocks)

    def links(self) -> Links:
        """What is known of the links between nodes now."""
        said = {peer: hello.trips for peer, hello in self.heard.items() if self._is_fresh(peer)}
        return Links(self.me, self.round_trips(), said, self.live())

    def live(self) -> dict[str, tuple[str, ...]]:
        """For each connected peer, whom it says to be connected with."""
        return {peer: hello.peers for peer, hello in self.heard.items()}

    def problems(self, name_of: Callable[[str], str]) -> list[str]:
        """What keeps connected peers' blocks from being used, and models that no one can vouch for; one line
        each."""
        lines = []
        for model in self._models.values():
            if model.problem:
                lines.append(model.problem)
            elif model.manifest is None:
                lines.append(f"model {model.name} is being verified: making digests of its files")
            everyone = [self.me, *self.heard]
            conflict = self.manifests.conflict(model.name, everyone)
            if conflict is not None:
                lines.append(conflict_text(model.name, conflict, name_of))
            if model.manifest is not None and self.manifests.whole_digest(model.name) is None:
                lines.append(f"model {model.name} is unverified: no node here has all its files")
        return lines


def _unmeasured(item: SpanOffer) -> SpanOffer:
    return msgspec.structs.replace(item, step_ms=None, prefill_ms=None, queue=0.0)


def conflict_text(model: str, conflict: tuple[str, str, str], name_of: Callable[[str], str]) -> str:
    """The one line about two nodes that hold different files under one name."""
    a, b, what = conflict
    nodes = f"{name_of(a)} and {name_of(b)}"
    return f"model {model} differs between {nodes}: {what}; copy the same files to both and restart dgnd"
