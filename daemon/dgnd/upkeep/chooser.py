"""This node chooses blocks itself, for models with `span = "auto"`: looks now and then what others have, and
changes what is loaded where the policy says so.

What is chosen and when is `dgnd.upkeep.autospan`'s, how it is loaded `dgnd.upkeep.replacing`'s. Static rows
never get here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import trio

from dgn_backends.errors import ModelError
from dgn_backends.span import format_units, span_of_units
from dgnd.errors import DgnError
from dgnd.models.blocksmap import AutoRow, BlocksMap
from dgnd.models.local import LocalModel
from dgnd.models.sizes import Sizes, read_sizes
from dgnd.peers.names import Names
from dgnd.peers.offers import OfferBook
from dgnd.upkeep.autospan import choose, may_choose, missing, patience_s, worth_changing
from dgnd.upkeep.replacing import Replacing, Wanted
from dgnd.words import format_bytes

log = logging.getLogger("dgnd.chooser")

_LOOK_S = 0.5


@dataclass(slots=True)
class _Watch:
    """What is known of one model's choice."""

    row: AutoRow
    sizes: Sizes | None = None
    since: float | None = None  #: when it was first to be chosen
    tried: bool = False  #: a choice was tried with this row ...
    settled: bool = False  #: ... and made
    gap: frozenset[int] = frozenset()
    gap_since: float = 0.0


@dataclass(slots=True)
class Chooser:
    """One node's. `rows` are set by the configuration."""

    models: Mapping[str, LocalModel]
    offers: OfferBook
    names: Names
    replacing: Replacing
    room: Callable[[int], int]  #: bytes that weights may take, beside those given up
    _watches: dict[str, _Watch] = field(default_factory=dict)
    _rows: trio.Event = field(default_factory=trio.Event)  # there are some

    def set_rows(self, blocks: BlocksMap) -> None:
        """Takes the rows of a configuration; where one has changed, that model is chosen anew."""
        for name, model in self.models.items():
            model.auto = name in blocks.auto
            model.why = model.why if model.auto else ""
        self._watches = {
            name: old if old is not None and old.row.max_bytes == row.max_bytes else _Watch(row)
            for name, row in blocks.auto.items()
            for old in [self._watches.get(name)]
        }
        if self._watches:
            self._rows.set()
        else:
            self._rows = trio.Event()

    @property
    def waits(self) -> bool:
        """Whether a first choice is still to be made, which may take seconds."""
        return any(not watch.tried for watch in self._watches.values())

    def notes(self) -> list[str]:
        """For `status`: what was chosen and why, and what would change it."""
        lines = [f"{name} {model.why}" for name, model in self.models.items() if model.auto and model.why]
        for name, watch in self._watches.items():
            model = self.models.get(name)
            if model is None or not watch.gap:
                continue
            gap = format_units(watch.gap, model.config.n_blocks)
            lasts_s = trio.current_time() - watch.gap_since
            patience = patience_s(self.offers.me, self.offers.choosers(model))
            lines.append(
                f"{name}: nobody has had {gap} for {lasts_s:.0f} s; after {patience:.0f} s this node changes "
                "its choice, if that helps"
            )
        return lines

    async def run(self) -> None:
        """Looks again and again."""
        while True:
            for name in list(self._watches):
                watch, model = self._watches.get(name), self.models.get(name)
                if watch is not None and model is not None and model.manifest is not None:
                    await self._look(watch, model)
            await self._rows.wait()
            await trio.sleep(_LOOK_S)

    async def _look(self, watch: _Watch, model: LocalModel) -> None:
        plans = self.offers.plans(model)
        counts = Counter(unit for units in plans.values() for unit in units)
        others = [counts[unit] for unit in range(model.config.n_blocks + 2)]
        have = frozenset(unit for span in model.spans for unit in span.units())
        now = trio.current_time()
        if not watch.settled:
            choosers = self.offers.choosers(model)
            undecided = [peer for peer, decided in choosers.items() if not decided]
            away = sum(peer.id not in self.offers.heard for peer in self.names.peers.values())
            watch.since = now if watch.since is None else watch.since
            if not may_choose(self.offers.me, now - watch.since, away, undecided):
                model.why = "is about to choose: waits for what others have"
                return
            await self._choose(watch, model, others, have)
            return
        gap = missing(others, have)
        if gap != watch.gap:
            watch.gap, watch.gap_since = gap, now
        if gap and now - watch.gap_since >= patience_s(self.offers.me, self.offers.choosers(model)):
            watch.gap_since = now  # whatever comes of it, the next look is as patient
            await self._choose(watch, model, others, have)

    async def _choose(
        self, watch: _Watch, model: LocalModel, others: list[int], have: frozenset[int]
    ) -> None:
        n_blocks = model.config.n_blocks
        watch.tried = True
        try:
            sizes = watch.sizes = watch.sizes or read_sizes(model.path, model.config, model.section.quant)
        except ModelError as error:
            model.why = f"chose nothing: {error.message}"
            return
        most = self._most(watch.row, model)
        units = choose(sizes, most, others, have)
        if units is None:
            model.why = f"chose nothing: {_nothing_fits(sizes, most)}"
            return
        stays = set(units) == have
        if watch.settled and (stays or not worth_changing(sizes, others, have, units)):
            return
        watch.settled, watch.gap = True, missing(others, units)
        model.why = _why(units, others, n_blocks)
        if stays:
            return
        text = format_units(units, n_blocks)
        log.info("model %s: %s", model.name, model.why)
        spans = (span_of_units(units, n_blocks),)
        try:
            why_not = await self.replacing.replace(model, Wanted(model.section, spans))
        except DgnError as error:
            why_not = error.message
        if why_not:
            model.why = f"chose {text}, and stays with what it had: {why_not}"
            log.error("model %s: %s", model.name, model.why)

    def _most(self, row: AutoRow, model: LocalModel) -> int:
        """Bytes of weights that the model may have here."""
        if row.max_bytes is not None:
            return row.max_bytes
        return self.room(model.worker.weights_bytes if model.worker is not None else 0)


def _nothing_fits(sizes: Sizes, most: int) -> str:
    if not sizes.present:
        return "none of its weight files are here"
    least = format_bytes(min(sizes.of_unit[unit] for unit in sizes.present))
    return f"it may take {format_bytes(most)} of weights now, and the smallest part needs {least}"


def _why(units: Collection[int], others: list[int], n_blocks: int) -> str:
    """In words, what was lacking."""
    fewest = min(others[unit] for unit in units)
    lacked = format_units([unit for unit in units if others[unit] == fewest], n_blocks)
    had = "nobody else" if fewest == 0 else f"only {fewest} other node{'s' * (fewest > 1)}"
    return f"chose {format_units(units, n_blocks)} itself, since {had} had {lacked}"
