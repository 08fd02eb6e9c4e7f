"""The origin's engine: requests for text in, tokens driven through a route, text out as it comes.

One generation reads as: resolve the model, turn the request into token ids, answer it. Knows nothing of
libp2p or of JSON-RPC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import trio

from dgnd.config.schema import SessionsConfig
from dgnd.control import api
from dgnd.control.service import DeltaSink, WaitSink
from dgnd.errors import BadRequest, ContextExceeded, DgnError, Draining, NotFound, ShuttingDown
from dgnd.metrics.counts import Counts
from dgnd.models.local import LocalModel
from dgnd.origin.answering import AnswerHost, Answering, Sinks
from dgnd.origin.clocks import Clocks
from dgnd.origin.conversation import Conversation, ConversationBook, Turn
from dgnd.origin.forming import Forming, make_forming, wanted_form
from dgnd.origin.generation import Answer, requested_sampling
from dgnd.origin.handover import hand_over
from dgnd.sessions.driver import SessionDriver
from dgnd.sessions.driver_host import DriverHost
from dgnd.sessions.memory_line import MemoryLine
from dgnd.sessions.navigator import Navigator
from dgnd.sessions.recovery import Filler
from dgnd.sessions.session import OriginSession
from dgnd.wire.messages import Frame, HopKey

#: Prompts that are turned into token ids at once; others wait. A long one takes seconds, and memory.
_READING = trio.CapacityLimiter(4)


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
            result = await self._converse(model, params, Sinks(on_delta, on_wait), cancelled, clocks)
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
        sinks: Sinks,
        cancelled: trio.Event,
        clocks: Clocks,
    ) -> api.GenerateResult:
        """As `generate`, in the session that is asked for, or one that ends with it."""
        with self.conversations.use(params.session, self._new_conversation, model) as conversation:
            try:
                turn = await self._turn(conversation, params)
                conversation.cut_off = None
                host = self._answer_host(conversation)
                answering = Answering(host, conversation, turn, params, sinks, clocks)
                return await answering.run(cancelled)
            finally:
                conversation.driver.waits = None
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
        prompt = await trio.to_thread.run_sync(
            conversation.prompt_ids, params, abandon_on_cancel=True, limiter=_READING
        )
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
        after = () if chat else prompt
        answer = Answer(model.text, stop, params.stop_ids, limit, bool(params.tools), after)
        generation = self.conversations.new_id() if params.session else conversation.driver.session.id
        return Turn(generation, prompt, sampling, answer, form)

    async def _form(self, model: LocalModel, params: api.GenerateParams) -> Forming | None:
        """The form that the answer must have, if any."""
        make = wanted_form(params, model.text, model.config.vocab_size)
        return None if make is None else await make_forming(make)

    def _answer_host(self, conversation: Conversation) -> AnswerHost:
        model = conversation.model

        def others() -> bool:
            return any(
                item.busy and item.model is model and not self.line.waits(item.driver.session.id)
                for item in self.conversations
                if item is not conversation
            )

        return AnswerHost(
            navigator=self.navigator,
            line=self.line,
            count=self.counts.model(model.name),
            recover_s=self.settings.recover_s,
            filler=self.filler if self.settings.fill_gaps else None,
            others=others,
            peer_name=self.host.peer_name,
        )

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
