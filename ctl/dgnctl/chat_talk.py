"""A conversation as values: what was said and answered, its token ids, how the next answer is asked for.

Pure: knows no daemon, terminal or file. The token ids are those that dgnd told; None where they are to be
made anew from the messages, as for another model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import msgspec

from dgnd.control.api import ChatMessage, GenerateParams, GenerateResult
from dgnd.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Exchange:
    """A message and its answer. `begin`: how many token ids were before them; None: not known."""

    said: str
    answer: str
    begin: int | None


class Talk:
    """One conversation. `params`: all of the next request but what is said, with the system message."""

    def __init__(self, params: GenerateParams) -> None:
        self.params = params
        self.exchanges: list[Exchange] = []
        self.ids: list[int] | None = []
        self.earlier = False  #: the ids begin with something whose words are not known
        self._says_system = False  #: in the middle of the conversation, as it can't be read again

    @property
    def fresh(self) -> bool:
        """Nothing was said yet."""
        return not self.exchanges and not self.ids

    def copy(self) -> Talk:
        """To come back to."""
        other = copy.copy(self)
        other.exchanges = list(self.exchanges)
        return other

    def messages(self) -> list[ChatMessage]:
        """All of it, as far as the words are known."""
        found = [ChatMessage("system", self.params.system)] if self.params.system else []
        for each in self.exchanges:
            found += [ChatMessage("user", each.said), ChatMessage("assistant", each.answer)]
        return found

    def request(self, text: str, session: str) -> GenerateParams:
        """What asks for the answer to `text`; where `ids` are known, `session` must hold them."""
        if self.ids is None:
            messages = [*self.messages(), ChatMessage("user", text)]
            return msgspec.structs.replace(self.params, messages=messages, session=session, system=None)
        system = self.params.system if self.fresh or self._says_system else None
        return msgspec.structs.replace(self.params, prompt=text, session=session, system=system)

    def answered(self, text: str, result: GenerateResult) -> None:
        """The answer to `text`, which may have been stopped."""
        begin = None if self.ids is None else len(self.ids)
        self.exchanges.append(Exchange(text, result.text, begin))
        self.ids = [*result.prompt_token_ids, *result.token_ids]
        self._says_system = False

    def take_back(self) -> Exchange:
        """Forgets the last exchange, and returns it.

        Raises:
            BadRequest: there is none.
        """
        if not self.exchanges:
            raise BadRequest("nothing was said yet that could be asked again; say something first")
        last = self.exchanges.pop()
        if not self.exchanges and not self.earlier:
            self.ids = []
        else:
            self.ids = None if self.ids is None or last.begin is None else self.ids[: last.begin]
        return last

    def clear(self) -> None:
        """Starts anew, with the same settings."""
        self.exchanges, self.ids, self.earlier, self._says_system = [], [], False, False

    def go_on_from(self, ids: list[int]) -> None:
        """Something was said of which only the token ids are known."""
        self.clear()
        self.ids, self.earlier = list(ids), bool(ids)

    def set_system(self, text: str | None) -> None:
        """The whole conversation is read again under it; where its words are not known, it is said next."""
        self.params = msgspec.structs.replace(self.params, system=text)
        if self.earlier:
            self._says_system = text is not None
        elif self.exchanges:
            self.ids = None

    def set_model(self, name: str) -> None:
        """Another one goes on, which reads it all again.

        Raises:
            BadRequest: it has token ids of this one whose words are not known.
        """
        if self.earlier:
            raise BadRequest(
                "this conversation began with token ids, which another model can't read; clear it"
            )
        self.params = msgspec.structs.replace(self.params, model=name)
        if self.exchanges:
            self.ids = None
