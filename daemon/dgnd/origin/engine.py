"""The origin's engine: requests for text in, tokens driven through a route, text out as it comes.

One generation reads as: resolve the model, turn the request into token ids, get a route, ask for token after
token, match stops. Knows nothing of libp2p or of JSON-RPC.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import trio

from dgnd.config.schema import SessionsConfig
from dgnd.control import api
from dgnd.errors import (
    BadRequest,
    Cancelled,
    ContextExceeded,
    DgnError,
    Draining,
    Inexact,
    NotFound,
    NotReady,
    PeerGone,
    ShuttingDown,
    WorkerDied,
)
from dgnd.logs.fields import about
from dgnd.metrics.counts import Counts
from dgnd.models.local import LocalModel
from dgnd.origin.clocks import Clocks
from dgnd.origin.conversation import Conversation, ConversationBook, Turn, WaitSink
from dgnd.origin.forming import Forming, make_forming, wanted_form
from dgnd.origin.generation import Answer, requested_sampling
from dgnd.origin.handover import hand_over
from dgnd.sessions.driver import SessionDriver, Waits
from dgnd.sessions.driver_host import DriverHost
from dgnd.sessions.memory_line import MemoryLine, lacks_memory
from dgnd.sessions.navigator import Navigator
from dgnd.sessions.recovery import Filler, Recovery
from dgnd.sessions.session import OriginSession
from dgnd.wire.messages import Frame, HopKey

log = logging.getLogger("dgnd.engine")

DeltaSink = Callable[[str, list[int], list[api.TokenLogprobs]], Awaitable[None]]
#: Why a hop could not be opened though it was offered: others may be asked at once.
_GONE = (Draining, PeerGone, WorkerDied)
#: An answer is taken to have as many tokens at first, if it may: what a route should have room for.
EXPECTED_TOKENS = 256


@dataclass(slots=True)
class EngineSettings:
    """Limits of the origin's side."""

    idle_s: float = 600.0
    max_sessions: int = 64
    recover_s: float = 10.0
    fill_gaps: bool = False

    @classmethod
    def of(cls, sessions: SessionsConfig) -> EngineSettings:
        """As configured."""
        return cls(sessions.idle_s, sessions.max_sessions, sessions.recover_s, sessions.fill_gaps)


@dataclass(slots=True)
class Engine:
    """All sessions that this node is the origin of."""

    models: Mapping[str, LocalModel]
    navigator: Navigator
    host: DriverHost
    settings: EngineSettings
    stopping: bool = False
    draining: bool = False  #: no new answer is begun
    filler: Filler | None = None  #: loads what nobody serves, where that is wanted
    conversations: ConversationBook = field(default_factory=ConversationBook)
    counts: Counts = field(default_factory=Counts)
    line: MemoryLine = field(default_factory=lambda: MemoryLine(64, 120.0))

    # --- frames

    def on_frame(self, sender: str, frame: Frame) -> None:
        """A frame that speaks of one of this node's own sessions."""
        key = getattr(frame.message, "key", None)
        conversation = self.conversations.get(key.session) if isinstance(key, HopKey) else None
        if conversation is not None:
            conversation.driver.deliver(sender, frame)
            hand_over(conversation, self.navigator)

    def on_offers(self) -> None:
        """What is offered has changed: others may now serve what is about to leave."""
        for conversation in self.conversations:
            hand_over(conversation, self.navigator)

    def on_peer_down(self, peer: str, why: str) -> None:
        """Sessions that run through the peer can't go on with these hops."""
        for conversation in self.conversations:
            conversation.driver.peer_down(peer, why)

    # --- requests

    def model(self, name: str | None) -> LocalModel:
        """The model asked for; without a name the only one."""
        if name is None:
            if not self.models:
                raise NotFound("no model is configured: add [models.NAME] and [[blocks]] to dgn.toml")
            if len(self.models) > 1:
                raise BadRequest(f"several models are configured, name one of them: {', '.join(self.models)}")
            return next(iter(self.models.values()))
        model = self.models.get(name)
        if model is None:
            raise NotFound(f"no model {name!r} is configured; there is: {', '.join(self.models) or 'none'}")
        return model

    async def generate(
        self,
        params: api.GenerateParams,
        on_delta: DeltaSink,
        cancelled: trio.Event,
        on_wait: WaitSink | None = None,
    ) -> api.GenerateResult:
        """One answer; `on_wait` is told in words while it waits for memory. Raises DgnError for everything
        that the caller should know."""
        clocks = Clocks(received=trio.current_time())
        if self.stopping:
            raise ShuttingDown("the daemon is stopping")
        if self.draining:
            raise Draining("this node is drained and begins no answers; ask another one")
        model = self.model(params.model)
        count = self.counts.model(model.name)
        try:
            result = await self._converse(model, params, on_delta, on_wait, cancelled, clocks)
        except DgnError as error:
            count.answers[error.kind] += 1
            raise
        count.prompt_tokens += result.usage.prompt_tokens
        count.answers[result.finish_reason] += 1
        return result

    async def _converse(
        self,
        model: LocalModel,
        params: api.GenerateParams,
        on_delta: DeltaSink,
        on_wait: WaitSink | None,
        cancelled: trio.Event,
        clocks: Clocks,
    ) -> api.GenerateResult:
        """As `generate`, in the session that is asked for, or one that ends with it."""
        with self.conversations.use(params.session, self._new_conversation, model) as conversation:
            try:
                turn = await self._turn(conversation, params)
                conversation.cut_off, conversation.on_wait = None, on_wait
                return await self._answer(conversation, turn, params, on_delta, cancelled, clocks)
            finally:
                conversation.driver.waits = conversation.on_wait = None
                self.line.leave(conversation.driver.session.id)
                self.navigator.market.bookings.end(conversation.driver.session.id)
                if params.session is None:
                    conversation.driver.close()
                else:
                    conversation.driver.let_go()

    def _new_conversation(self, session: str, model: LocalModel) -> Conversation:
        self.conversations.make_room(self.settings.max_sessions)
        origin = OriginSession(self.host.identity.peer_id, session, model.name)
        return Conversation(SessionDriver(origin, self.host, self.settings.idle_s), model)

    async def _turn(self, conversation: Conversation, params: api.GenerateParams) -> Turn:
        """The prompt's ids with an empty answer, or the turn that is gone on with."""
        if params.resume:
            if conversation.cut_off is None:
                raise NotFound(f"session {params.session!r} has no answer to go on with; ask anew")
            return conversation.cut_off
        model = conversation.model
        sampling = requested_sampling(params, model.sampling)
        # In a thread: a template or a tokenizer may take seconds, and the daemon must go on answering.
        prompt = await trio.to_thread.run_sync(conversation.prompt_ids, params, abandon_on_cancel=True)
        context = model.config.max_positions
        if len(prompt) > context:
            raise ContextExceeded(
                f"the prompt has {len(prompt)} tokens, the context of {model.name} is {context}; "
                "shorten it, or begin a new conversation",
                prompt_tokens=len(prompt),
                context=context,
            )
        room = context - len(prompt)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        chat = params.token_ids is None and not params.raw
        stop = [*params.stop, *(model.text.stop_texts if chat else ())]
        form = await self._form(model, params)
        answer = Answer(model.text, stop, params.stop_ids, limit, marks=bool(params.tools))
        generation = self.conversations.new_id() if params.session else conversation.driver.session.id
        return Turn(generation, prompt, sampling, answer, form)

    async def _form(self, model: LocalModel, params: api.GenerateParams) -> Forming | None:
        """The form that the answer must have, if any."""
        make = wanted_form(params, model.text, model.config.vocab_size)
        return None if make is None else await make_forming(make)

    async def _answer(
        self,
        conversation: Conversation,
        turn: Turn,
        params: api.GenerateParams,
        on_delta: DeltaSink,
        cancelled: trio.Event,
        clocks: Clocks,
    ) -> api.GenerateResult:
        model, driver = conversation.model, conversation.driver
        prompt, answer = turn.prompt, turn.answer
        driver.session.generation = turn.generation
        recovery = Recovery(
            self.navigator,
            driver,
            model,
            self.settings.recover_s,
            self.filler if self.settings.fill_gaps else None,
        )

        async def wait_for_memory(error: DgnError) -> None:
            await self._wait_for_memory(conversation, error, begun=bool(answer.token_ids))

        recovery.wait_for_memory = wait_for_memory
        driver.exact = params.exact
        driver.exactly = answer.exactness.line if params.exact and answer.token_ids else None
        if driver.exact and driver.session.encoded:
            driver.close()  # what came over the wire so is in the KV
        driver.positions = len(prompt) + min(answer.limit, EXPECTED_TOKENS)

        async def work() -> None:
            if not answer.done:
                first = self.line.error(model.name)
                if first is not None:  # who comes later does not take what they wait for
                    await wait_for_memory(first)
                driver.set_tokens([*prompt, *answer.token_ids])
                try:
                    await self.navigator.ensure(driver, model, params.wait)
                except DgnError as error:
                    # A hop that has just lost what it offered says that it is not ready: as good as gone.
                    refused = isinstance(error, NotReady) and error is driver.broken
                    if not (isinstance(error, _GONE) or refused or lacks_memory(error)):
                        raise
                    await recovery.go_on(error)
                answer.end_within(driver.room_for(len(prompt)))
                driver.tell_generation()
                clocks.prefill = trio.current_time()
                self._log_begun(driver.session, len(prompt))
                await self._generate(conversation, turn, recovery, on_delta, clocks)

        try:
            await _until(cancelled, work)
        except BaseException as error:
            if isinstance(error, DgnError) and error.retryable and answer.token_ids:
                conversation.cut_off = turn
            # Its kind alone: texts may quote the prompt.
            kind = error.kind if isinstance(error, DgnError) else type(error).__name__
            _about(driver.session, f"failed after {len(answer.token_ids)} tokens: {kind}")
            driver.close()  # its hops are in the middle of something; the next turn begins from the token ids
            raise
        interrupted = not answer.done
        if interrupted and not clocks.prefill:
            conversation.cut_off = turn if params.resume else None
            driver.close()  # the route may be half laid
            raise Cancelled("cancelled before the answer began")
        if driver.half_laid:  # an answer that was mended was cancelled
            driver.close()
        elif params.session is not None:
            with trio.CancelScope(shield=True):
                await driver.end_turn(interrupted)
        conversation.tokens = [*prompt, *answer.token_ids]
        route = self.route_of(driver.session)
        rest = answer.finish("cancelled" if interrupted else "length")
        if rest:
            await on_delta(rest, [], [])
        _about(driver.session, f"ended: {answer.finish_reason}, {len(answer.token_ids)} tokens")
        result = answer.result(prompt, route, clocks.timings())
        return msgspec.structs.replace(result, generation=turn.generation)

    def _log_begun(self, session: OriginSession, prompt_tokens: int) -> None:
        if log.isEnabledFor(logging.INFO):
            route = " > ".join(f"{hop.name or hop.peer} {hop.span}" for hop in self.route_of(session))
            _about(session, f"begun with {session.model}, {prompt_tokens} tokens of prompt, by {route}")

    async def _generate(
        self,
        conversation: Conversation,
        turn: Turn,
        recovery: Recovery,
        on_delta: DeltaSink,
        clocks: Clocks,
    ) -> None:
        driver, session = conversation.driver, conversation.driver.session
        prompt, sampling, answer = turn.prompt, turn.sampling, turn.answer
        count = self.counts.model(conversation.model.name)
        route_number = -1  # of the last token
        _refuse_inexact(driver, answer)
        if sampling.needs_history:
            driver.tell_history(len(prompt))
        while not answer.done:
            try:
                picked = await driver.next_token(sampling, turn.allowed)
                token = picked.token_id
                if not 0 <= token < conversation.model.config.vocab_size:
                    raise driver.blamed(session.head, f"sent token id {token}, which is in no vocabulary")
                if turn.form is not None and not turn.form.takes(token):
                    what = f"sent token id {token}, which the answer's form does not allow"
                    raise driver.blamed(session.head, what)
            except DgnError as error:
                await recovery.go_on(error)
                count.mends += 1
                _refuse_inexact(driver, answer)
                if sampling.needs_history:
                    driver.tell_history(len(prompt))
                continue
            first = not clocks.first
            count.token(clocks.token(), first=first)
            if driver.waits is not None or self.line.waits(session.id):
                driver.waits = None
                self.line.leave(session.id)
            if route_number != session.route_number:
                route_number = session.route_number
                pure = driver.lineage.pure and not session.encoded
                answer.exactness.through(driver.line, pure=pure, begun=bool(answer.token_ids))
                driver.exactly = driver.line if driver.exact else None
            session.append(token)
            shown = answer.push(token)
            if turn.form is not None and not answer.done:
                await turn.form.push(token)
                if turn.form.complete:
                    answer.complete()
            if not answer.done and driver.broken is None:
                driver.send_steps(sampling, turn.allowed)  # the hops compute on while the client is told
            await on_delta(shown, [token], [] if sampling.logprobs is None else answer.tell(picked))

    async def _wait_for_memory(self, conversation: Conversation, error: DgnError, *, begun: bool) -> None:
        """Returns when it is this answer's turn to try. Raises NoRoomNow."""
        driver, model = conversation.driver, conversation.model

        def tell(what: DgnError, deadline: float) -> None:
            driver.waits = Waits(what, deadline)

        def others() -> bool:
            return any(
                item.busy and item.model is model and not self.line.waits(item.driver.session.id)
                for item in self.conversations
                if item is not conversation
            )

        def news(words: str) -> None:
            if conversation.on_wait is not None:
                conversation.on_wait(words)

        session = driver.session.id
        await self.line.wait(model.name, session, error, begun=begun, tell=tell, news=news, others=others)

    def route_of(self, session: OriginSession) -> list[api.RouteHop]:
        """A session's route as reported."""
        return [
            api.RouteHop(peer=hop.peer, name=self.host.peer_name(hop.peer), span=str(hop.span))
            for hop in session.route
        ]

    # --- sessions

    def export(self, session: str) -> api.SessionTokens:
        """The token ids of a session."""
        conversation = self.conversations.get(session)
        if conversation is None:
            raise NotFound(f"there is no session {session!r}; see: dgnctl cache list")
        return api.SessionTokens(
            session=session, model=conversation.model.name, token_ids=list(conversation.tokens)
        )

    def import_(self, params: api.SessionImportParams) -> None:
        """Gives a session its token ids; they are computed when next needed."""
        model = self.model(params.model)
        bad = next((i for i in params.token_ids if not 0 <= i < model.config.vocab_size), None)
        if bad is not None:
            raise BadRequest(
                f"token id {bad} is not in the vocabulary of {model.name}, 0-{model.config.vocab_size - 1}"
            )
        if len(params.token_ids) > model.config.max_positions:
            raise ContextExceeded(
                f"{len(params.token_ids)} tokens, the context of {model.name} is {model.config.max_positions}"
            )
        with self.conversations.use(params.session, self._new_conversation, model) as conversation:
            conversation.tokens = list(params.token_ids)

    def clear(self, session: str | None) -> int:
        """Forgets one session, or all idle ones; raises NotFound, or BadRequest for one that is answering."""
        return self.conversations.clear(session)

    def sweep(self) -> None:
        """Forgets the KV of sessions idle for long; their token ids stay, so they come back by replay."""
        self.conversations.free_idle(trio.current_time() - self.settings.idle_s)


def _about(session: OriginSession, what: str) -> None:
    """A line of the log about an answer; never with a word of it, or of its prompt."""
    log.info("generation %s %s", session.generation, what, extra=about(session.generation, session.id))


def _refuse_inexact(driver: SessionDriver, answer: Answer) -> None:
    """Where an exact answer is wanted and the line as it is can't give one. How nodes compute is seen to when
    the route is chosen; what is left is what comes out when they compute again."""
    begun = bool(answer.token_ids)
    if driver.exact and not answer.exactness.would_hold(driver.line, pure=driver.lineage.pure, begun=begun):
        raise Inexact(
            "a hop was lost, and this backend's results depend on what else it computes: "
            "the answer can't be exact; ask without --exact"
        )


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
