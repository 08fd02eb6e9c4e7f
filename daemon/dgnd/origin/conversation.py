"""Named sessions at their origin: the token ids said so far, and who may use them when.

Knows nothing of routes or frames; the driver inside each conversation does.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from dgnd.control import api
from dgnd.errors import BadRequest, NoRoomNow, NotFound
from dgnd.models.local import LocalModel
from dgnd.origin.forming import Forming
from dgnd.origin.generation import Answer
from dgnd.sessions.driver import SessionDriver
from dgnd.wire.messages import Sampling
from dgnd.words import counted

#: Named sessions whose token ids are remembered; some kilobytes each.
MAX_NAMED = 1024


@dataclass(frozen=True, slots=True)
class Turn:
    """What is answered, and the answer as far as it is."""

    generation: str  #: what the logs of all nodes call it
    prompt: list[int]
    sampling: Sampling
    answer: Answer
    form: Forming | None = None  #: that the answer must have

    @property
    def allowed(self) -> bytes | None:
        """The tokens that may come next, packed; None: all."""
        return None if self.form is None else self.form.allowed


@dataclass(slots=True)
class Conversation:
    """One session. `tokens` are the ids that count as said: they change when a turn has ended well."""

    driver: SessionDriver
    model: LocalModel
    tokens: list[int] = field(default_factory=list)
    cut_off: Turn | None = None  #: the last turn, if nodes were lacking in the middle of its answer
    busy: bool = False
    last_used: float = field(default_factory=trio.current_time)

    def prompt_ids(self, params: api.GenerateParams) -> list[int]:
        """The token ids that a request asks to continue."""
        text = self.model.text
        if params.token_ids is not None:
            ids = list(params.token_ids)
        elif params.messages is not None:
            ids = text.encode_chat(params.messages, params.tools)
        else:
            assert params.prompt is not None  # checked by dgnd.control.checks
            ids = self._turn(params.prompt, params)
        if not ids:
            raise BadRequest("the prompt has no tokens; say something")
        bad = next((i for i in ids if not 0 <= i < self.model.config.vocab_size), None)
        if bad is not None:
            raise BadRequest(f"token id {bad} is not in the vocabulary of {self.model.name}")
        return ids

    def _turn(self, prompt: str, params: api.GenerateParams) -> list[int]:
        text = self.model.text
        if params.raw:
            ids = text.encode_raw(prompt)
            if self.tokens and ids[:1] == [text.bos_token_id]:
                ids = ids[1:]
            return [*self.tokens, *ids]
        if self.tokens:
            return [*self.tokens, *text.encode_turn(self.tokens, prompt, params.system)]
        messages = [api.ChatMessage(role="user", content=prompt)]
        if params.system is not None:
            messages.insert(0, api.ChatMessage(role="system", content=params.system))
        return text.encode_chat(messages)


class ConversationBook:
    """All sessions of this origin, by name; those without a name end with their request."""

    def __init__(self) -> None:
        self._by_name: dict[str, Conversation] = {}
        self._numbers = itertools.count(1)
        self._prefix = secrets.token_hex(4)

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(list(self._by_name.values()))

    def get(self, name: str) -> Conversation | None:
        """The session of that name."""
        return self._by_name.get(name)

    def new_id(self) -> str:
        """A name that no other session or answer has, of this origin or another."""
        return f"{self._prefix}-{next(self._numbers)}"

    @contextmanager
    def use(
        self, name: str | None, new: Callable[[str, LocalModel], Conversation], model: LocalModel
    ) -> Iterator[Conversation]:
        """The session for one request, made if it isn't there. Raises BadRequest when it is busy."""
        key = name if name is not None else self.new_id()
        conversation = self._by_name.get(key)
        if conversation is not None and conversation.busy:
            raise BadRequest(f"session {key!r} is answering another request; wait or cancel that")
        if conversation is None or conversation.model is not model:
            if conversation is not None:
                conversation.driver.close()
            conversation = new(key, model)
            self._by_name[key] = conversation
        conversation.busy = True
        try:
            yield conversation
        finally:
            conversation.busy = False
            conversation.last_used = trio.current_time()
            if name is None:
                self._by_name.pop(key, None)

    def clear(self, name: str | None) -> int:
        """Forgets one session or all idle ones; returns how many."""
        if name is None:
            names = [key for key, conversation in self._by_name.items() if not conversation.busy]
        elif name not in self._by_name:
            raise NotFound(f"there is no session {name!r}; see: dgnctl cache list")
        elif self._by_name[name].busy:
            raise BadRequest(f"session {name!r} is answering; cancel that first")
        else:
            names = [name]
        for key in names:
            self._by_name.pop(key).driver.close()
        return len(names)

    def forget(self, model: LocalModel) -> None:
        """The model is no longer served: its sessions end, also those that are answering."""
        for name, item in list(self._by_name.items()):
            if item.model is model:
                if item.busy:
                    item.driver.fail(NotFound(f"model {model.name} is no longer configured"))
                else:
                    item.driver.close()
                del self._by_name[name]

    def make_room(self, max_sessions: int) -> None:
        """Before a new session: frees the KV of the one idle for longest, which comes back by replay.

        Raises NoRoomNow when all are answering. Token ids are forgotten only beyond MAX_NAMED sessions.
        """
        idle = sorted((item.last_used, name) for name, item in self._by_name.items() if not item.busy)
        holding = [name for _, name in idle if self._by_name[name].driver.session.route]
        busy = len(self._by_name) - len(idle)
        if busy >= max_sessions:
            many = f"{counted(busy, 'session')} {'is' if busy == 1 else 'are'} answering"
            raise NoRoomNow(f"{many}, of {max_sessions} at most; ask again later")
        if holding and busy + len(holding) >= max_sessions:
            self._by_name[holding[0]].driver.close()
        if idle and len(self._by_name) >= MAX_NAMED:
            self.clear(idle[0][1])

    def free_idle(self, before: float) -> None:
        """Frees the hops of sessions not used since; their token ids stay."""
        for conversation in self:
            if (
                not conversation.busy
                and conversation.last_used < before
                and conversation.driver.session.route
            ):
                conversation.driver.close()
