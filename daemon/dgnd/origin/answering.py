"""One request's answer: a route for it, token after token, mended where a hop is lost, told to who asked.

Knows nothing of other requests, but that they may hold the memory that this one waits for.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import trio

from dgnd.control import api
from dgnd.control.service import DeltaSink, WaitSink
from dgnd.errors import Cancelled, DgnError, Draining, Inexact, NotReady, PeerGone, WorkerDied
from dgnd.logs.fields import about
from dgnd.metrics.counts import ModelCounts
from dgnd.origin.clocks import Clocks
from dgnd.origin.conversation import Conversation, Turn
from dgnd.sessions.driver import Waits
from dgnd.sessions.memory_line import MemoryLine, lacks_memory
from dgnd.sessions.navigator import Navigator
from dgnd.sessions.recovery import Filler, Recovery
from dgnd.sessions.session import OriginSession

log = logging.getLogger("dgnd.engine")

#: Why a hop could not be opened though it was offered: others may be asked at once.
_GONE = (Draining, PeerGone, WorkerDied)
#: An answer is taken to have as many tokens at first, if it may: what a route should have room for.
EXPECTED_TOKENS = 256


@dataclass(frozen=True, slots=True)
class AnswerHost:
    """What an answer needs of its node."""

    navigator: Navigator
    line: MemoryLine
    count: ModelCounts
    recover_s: float
    filler: Filler | None  #: where lost blocks may be loaded here
    others: Callable[[], bool]  #: whether other answers with the model go on, and will make room
    peer_name: Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Sinks:
    """Who asked for an answer, and is told of it."""

    on_delta: DeltaSink
    on_wait: WaitSink | None = None  #: what the answer waits for, in words


class Answering:
    """The answer to `turn`; `run` once."""

    def __init__(
        self,
        host: AnswerHost,
        conversation: Conversation,
        turn: Turn,
        params: api.GenerateParams,
        sinks: Sinks,
        clocks: Clocks,
    ) -> None:
        self._host, self._conversation, self._turn = host, conversation, turn
        self._params, self._sinks, self._clocks = params, sinks, clocks
        self._driver, self._answer = conversation.driver, turn.answer
        self._recovery = Recovery(
            host.navigator,
            conversation.driver,
            conversation.model,
            host.recover_s,
            host.filler,
            self._wait_for_memory,
        )

    async def run(self, cancelled: trio.Event) -> api.GenerateResult:
        """Until it ends, or is cancelled with what there is. Raises DgnError; the turn may then be gone on
        with, if nodes were lacking."""
        driver, answer = self._driver, self._answer
        driver.session.generation = self._turn.generation
        self._ask_for_exactness()
        driver.positions = len(self._turn.prompt) + min(answer.limit, EXPECTED_TOKENS)
        try:
            await _until(cancelled, self._work)
        except BaseException as error:
            if isinstance(error, DgnError) and error.retryable and answer.token_ids:
                self._conversation.cut_off = self._turn
            # Its kind alone: texts may quote the prompt.
            kind = error.kind if isinstance(error, DgnError) else type(error).__name__
            self._log(f"failed after {len(answer.token_ids)} tokens: {kind}")
            driver.close()  # its hops are in the middle of something; the next turn begins from the token ids
            raise
        interrupted = not answer.done
        if interrupted and not self._clocks.prefill:
            self._conversation.cut_off = self._turn if self._params.resume else None
            driver.close()  # the route may be half laid
            raise Cancelled("cancelled before the answer began")
        await self._end_turn(interrupted)
        self._conversation.tokens = [*self._turn.prompt, *answer.token_ids]
        route = route_of(driver.session, self._host.peer_name)
        rest = answer.finish("cancelled" if interrupted else "length")
        if rest:
            await self._sinks.on_delta(rest, [], [])
        self._log(f"ended: {answer.finish_reason}, {len(answer.token_ids)} tokens")
        result = answer.result(self._turn.prompt, route, self._clocks.timings())
        return msgspec.structs.replace(result, generation=self._turn.generation)

    def _ask_for_exactness(self) -> None:
        driver, answer = self._driver, self._answer
        driver.exact = self._params.exact
        driver.exactly = answer.exactness.line if driver.exact and answer.token_ids else None
        if driver.exact and driver.session.encoded:
            driver.close()  # what came over the wire so is in the KV

    async def _end_turn(self, interrupted: bool) -> None:
        if self._driver.half_laid:  # an answer that was mended was cancelled
            self._driver.close()
        elif self._params.session is not None:
            with trio.CancelScope(shield=True):
                await self._driver.end_turn(interrupted)

    async def _work(self) -> None:
        if self._answer.done:
            return
        await self._get_route()
        self._answer.end_within(self._driver.room_for(len(self._turn.prompt)))
        self._driver.tell_generation()
        self._clocks.prefill = trio.current_time()
        self._log_begun()
        await self._generate()

    async def _get_route(self) -> None:
        driver, model = self._driver, self._conversation.model
        first = self._host.line.error(model.name)
        if first is not None:  # who comes later does not take what they wait for
            await self._wait_for_memory(first)
        driver.set_tokens([*self._turn.prompt, *self._answer.token_ids])
        try:
            await self._host.navigator.ensure(driver, model, self._params.wait)
        except DgnError as error:
            # A hop that has just lost what it offered says that it is not ready: as good as gone.
            refused = isinstance(error, NotReady) and error is driver.broken
            if not (isinstance(error, _GONE) or refused or lacks_memory(error)):
                raise
            await self._recovery.go_on(error)

    async def _generate(self) -> None:
        """Token after token. The hops compute the next one while the client is told of the last."""
        driver, turn, answer = self._driver, self._turn, self._answer
        route_number = -1  # of the last token
        self._prepare_route()
        while not answer.done:
            try:
                picked = await driver.next_token(turn.sampling, turn.allowed)
                self._check(picked.token_id)
            except DgnError as error:
                await self._recovery.go_on(error)
                self._host.count.mends += 1
                self._prepare_route()
                continue
            self._note_token()
            if route_number != driver.session.route_number:
                route_number = driver.session.route_number
                self._note_line()
            driver.session.append(picked.token_id)
            shown = answer.push(picked.token_id)
            if turn.form is not None and not answer.done:
                await turn.form.push(picked.token_id)
                if turn.form.complete:
                    answer.complete()
            if not answer.done and driver.broken is None:
                driver.send_steps(turn.sampling, turn.allowed)
            logprobs = [] if turn.sampling.logprobs is None else answer.tell(picked)
            await self._sinks.on_delta(shown, [picked.token_id], logprobs)

    def _prepare_route(self) -> None:
        """What a route must know, and be, before it is asked for a token."""
        self._refuse_inexact()
        if self._turn.sampling.needs_history:
            self._driver.tell_history(len(self._turn.prompt))

    def _refuse_inexact(self) -> None:
        """Where an exact answer is wanted and the line as it is can't give one. How nodes compute is seen to
        when the route is chosen; what is left is what comes out when they compute again."""
        driver, answer = self._driver, self._answer
        pure, begun = driver.lineage.pure, bool(answer.token_ids)
        if driver.exact and not answer.exactness.would_hold(driver.line, pure=pure, begun=begun):
            raise Inexact(
                "a hop was lost, and this backend's results depend on what else it computes: "
                "the answer can't be exact; ask without --exact"
            )

    def _check(self, token: int) -> None:
        """Whether the head may have picked that token. Raises ProtocolError that blames it."""
        form = self._turn.form
        if not 0 <= token < self._conversation.model.config.vocab_size:
            what = "is in no vocabulary"
        elif form is not None and not form.takes(token):
            what = "the answer's form does not allow"
        else:
            return
        raise self._driver.blamed(self._driver.session.head, f"sent token id {token}, which {what}")

    def _note_token(self) -> None:
        first = not self._clocks.first
        self._host.count.token(self._clocks.token(), first=first)
        session = self._driver.session.id
        if self._driver.waits is not None or self._host.line.waits(session):
            self._driver.waits = None
            self._host.line.leave(session)

    def _note_line(self) -> None:
        """Tokens come through another line than before."""
        driver, answer = self._driver, self._answer
        pure = driver.lineage.pure and not driver.session.encoded
        answer.exactness.through(driver.line, pure=pure, begun=bool(answer.token_ids))
        driver.exactly = driver.line if driver.exact else None

    async def _wait_for_memory(self, error: DgnError) -> None:
        """Returns when it is this answer's turn to try. Raises NoRoomNow."""

        def tell(what: DgnError, deadline: float) -> None:
            self._driver.waits = Waits(what, deadline)

        await self._host.line.wait(
            self._conversation.model.name,
            self._driver.session.id,
            error,
            begun=bool(self._answer.token_ids),
            tell=tell,
            news=self._sinks.on_wait or (lambda _words: None),
            others=self._host.others,
        )

    def _log_begun(self) -> None:
        if log.isEnabledFor(logging.INFO):
            route = " > ".join(
                f"{self._host.peer_name(hop.peer)} {hop.span}" for hop in self._driver.session.route
            )
            model, n_tokens = self._conversation.model.name, len(self._turn.prompt)
            self._log(f"begun with {model}, {n_tokens} tokens of prompt, by {route}")

    def _log(self, what: str) -> None:
        """A line about the answer; never with a word of it, or of its prompt."""
        generation = self._turn.generation
        log.info("generation %s %s", generation, what, extra=about(generation, self._driver.session.id))


def route_of(session: OriginSession, peer_name: Callable[[str], str]) -> list[api.RouteHop]:
    """A session's route as reported."""
    return [
        api.RouteHop(peer=hop.peer, name=peer_name(hop.peer), span=str(hop.span)) for hop in session.route
    ]


async def _until(event: trio.Event, work: Callable[[], Awaitable[None]]) -> None:
    """Does `work`, giving it up when `event` is set. Raises its DgnError as it is, in no group."""
    failed: DgnError | None = None
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            await work()
        except DgnError as error:
            failed = error
        nursery.cancel_scope.cancel()
    if failed is not None:
        raise failed
