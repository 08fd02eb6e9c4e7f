"""An answer that lost a hop goes on: what can be mended, for how long it is tried, and what is said when
nobody can.

One for each answer. Knows nothing of token ids or text; the navigator knows the routes.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

import trio

from dgn_backends.span import parse_units
from dgnd.errors import (
    BlocksMissing,
    Cancelled,
    DgnError,
    Draining,
    LimitError,
    NoRoomNow,
    NotReady,
    PeerError,
    PeerGone,
    PeerSilent,
    StaleState,
    StepCrashesBackend,
    TicketRefused,
    WorkerDied,
    error_from,
)
from dgnd.logs.fields import about
from dgnd.models.local import LocalModel
from dgnd.sessions.driver import SessionDriver, Waits
from dgnd.sessions.exact_routes import inexact_only
from dgnd.sessions.memory_line import lacks_memory
from dgnd.sessions.navigator import Navigator

log = logging.getLogger("dgnd.recovery")

_POLL_S = 0.05
#: The same where somebody has no room: what is computed again to try is in the way of those who have it.
_FULL_POLL_S = 1.0
_MENDABLE = (PeerGone, PeerSilent, WorkerDied, StaleState, NotReady, TicketRefused, LimitError)
#: For somebody to be back, before lost blocks are loaded here.
_GRACE_S = 1.0
#: Workers that may die over the same step of the same blocks before it is taken for the cause.
DEATHS = 2
#: How often an answer may be mended without a further token.
MOST_MENDS = 16


class Filler(Protocol):
    """Loads blocks here that nobody serves; see `dgnd.upkeep.gapfill`."""

    def ask(
        self, model: LocalModel, units: Collection[int], patience_s: float, *, exact: bool
    ) -> float | None: ...

    def problem(self, model: LocalModel, units: Collection[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class _Death:
    """A worker died while it computed the step that ends at `stop` with the blocks `units`."""

    stop: int
    units: frozenset[int]

    def is_like(self, other: _Death) -> bool:
        """Whether the same may have been the cause."""
        return self.stop == other.stop and (self.units == other.units or bool(self.units & other.units))


@dataclass(slots=True)
class Recovery:
    """`recover_s`: how long somebody is looked for who has the blocks that were lost; 0: not at all.
    `filler`: where this node may load them itself."""

    navigator: Navigator
    driver: SessionDriver
    model: LocalModel
    recover_s: float
    filler: Filler | None = None
    wait_for_memory: Callable[[DgnError], Awaitable[None]] | None = None  #: until it is this answer's turn
    _position: int = -1  # the position whose token was waited for when something failed last
    _mends: int = 0  # since then without a token
    _deaths: list[_Death] = field(default_factory=list)
    _refused: bool = False  # somebody said that the step can't be computed
    _had: dict[int, str] = field(default_factory=dict)  # who served each unit last

    async def go_on(self, error: DgnError) -> None:
        """Lays the route anew after `error`; the tokens so far stand. Raises `error` itself where nobody
        else could do better, StepCrashesBackend, or BlocksMissing with who had them last."""
        if self.wait_for_memory is not None and lacks_memory(error) and not self._spared():
            self.driver.close()  # what it holds is in the way of those that it waits for
            await self.wait_for_memory(error)
            self._position = -1  # that was no fault of anybody's
        handed_over = isinstance(error, Draining)  # what it lost is still there: that needs nobody's patience
        self._count()
        if not self._may_go_on(error) or (self.recover_s <= 0 and not handed_over):
            raise error
        first = error
        deadline = trio.current_time() + self.recover_s
        begun = trio.current_time()
        while True:
            self._note(error)
            try:
                await self.navigator.open(self.driver, self.model)
            except DgnError as again:
                if isinstance(again, BlocksMissing) and not is_mendable(first):
                    raise first from again  # nobody else has what its hop can't compute
                if not self._may_go_on(again):
                    raise
                deadline = max(deadline, self._filled_until(again, begun))
                if trio.current_time() >= deadline and not self.driver.reserve:
                    raise self._given_up(again, first) from again
                error = again
                self.driver.waits = Waits(again, deadline)
            else:
                log.info(
                    "session %s goes on after %.2f s: %s",
                    self.driver.session.id,
                    trio.current_time() - begun,
                    error.message,
                    extra=about(self.driver.session.generation, self.driver.session.id),
                )
                return
            full = isinstance(error, LimitError) and not self._spared()
            await trio.sleep(_FULL_POLL_S if full else _POLL_S)

    def _spared(self) -> bool:
        """Whether others can take the place of what was lost."""
        return self.navigator.can_spare(self.driver, self.model)

    def _count(self) -> None:
        position = len(self.driver.session.tokens)
        if position != self._position:
            self._position, self._mends, self._refused = position, 0, False
            self._deaths.clear()
        self._mends += 1

    def _may_go_on(self, error: DgnError) -> bool:
        if self._mends > MOST_MENDS or self._never_fits(error):
            return False
        return is_mendable(error) or self._elsewhere(error)

    def _elsewhere(self, error: DgnError) -> bool:
        """Whether a hop said that it can't compute the step, and another node has yet to try."""
        if error is not self.driver.broken or isinstance(error, Cancelled) or self._refused:
            return False  # no hop cancels an answer: this node does, as it leaves
        self._refused = True
        return self._spared()

    def _filled_until(self, error: DgnError, begun: float) -> float:
        """Has what is missing loaded here, if it may; until when that is waited for if it moves no more."""
        grace_s = min(_GRACE_S, self.recover_s / 2)
        units = self._lacking(error)
        if self.filler is None or not units or trio.current_time() - begun < grace_s:
            return 0.0
        moved = self.filler.ask(self.model, units, self.recover_s, exact=self.driver.exactly is not None)
        return 0.0 if moved is None else moved + self.recover_s

    def _lacking(self, error: DgnError) -> frozenset[int]:
        """What is missing, but for blocks whose worker here comes back by itself."""
        if not isinstance(error, BlocksMissing):
            return frozenset()
        own = {unit for span in self.model.spans for unit in span.units()}
        return parse_units(str(error.data["missing"]), self.model.config.n_blocks) - own

    def _never_fits(self, error: DgnError) -> bool:
        """Whether it has no room where it runs, will have none, and nobody else serves."""
        never = isinstance(error, LimitError) and not isinstance(error, NoRoomNow)
        return never and not self._spared()

    def _note(self, error: DgnError) -> None:
        """Remembers who had what, and how often a worker died computing this step. From now on the step is
        computed alone, so that others are neither hurt by it nor blamed for it."""
        for hop in self.driver.session.route:
            self._had.update(dict.fromkeys(hop.span.units(), self.driver.host.peer_name(hop.peer)))
        if type(error) is WorkerDied and error.data.get("running", True):
            self.driver.session.alone_until = self._position
            death = self._death(error)
            self._deaths.append(death)
            same = sum(death.is_like(other) for other in self._deaths)
            if same >= DEATHS:
                raise StepCrashesBackend(
                    f"the step up to position {death.stop - 1} was running at {same} deaths of workers, "
                    f"the last one: {error.message}"
                )

    def _death(self, error: WorkerDied) -> _Death:
        stop, span = error.data.get("stop"), str(error.data.get("span", ""))
        units = parse_units(span, self.model.config.n_blocks) if span else frozenset()
        return _Death(stop if isinstance(stop, int) else self._position, units)

    def _given_up(self, error: DgnError, first: DgnError) -> DgnError:
        if isinstance(error, LimitError):
            return error  # with the numbers
        if not isinstance(error, BlocksMissing):
            if error.message == first.message:
                return first
            # What came after it is its consequence: a worker that is not back yet, say.
            return error_from(first.kind, f"{first.message}; since then: {error.message}", dict(first.data))
        lost = self.navigator.market.missing_units(self.model, self.driver.exactly)
        names = sorted({self._had[unit] for unit in lost if unit in self._had})
        had = f"{', '.join(names)} had them last" if names else "nobody had them"
        exactly = " exactly as before" if self.driver.exactly is not None else ""
        others = inexact_only(self.navigator.market, self.model, self.driver.exactly)
        had += f"; {others}" if others else ""
        problem = self.filler.problem(self.model, self._lacking(error)) if self.filler is not None else ""
        had += f"; {problem}" if problem else ""
        text = f"{error.message}{exactly} within {self.recover_s:g} s; {had}; it began with {first.message}"
        return BlocksMissing(text, **error.data)


def is_mendable(error: DgnError) -> bool:
    """Whether other hops, or the same ones a little later, may do what failed."""
    return isinstance(error, _MENDABLE) or type(error) is PeerError
