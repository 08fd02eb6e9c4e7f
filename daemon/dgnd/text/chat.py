"""Conversations to token ids, in a model's template, so that what users typed stays text.

Where no message holds the text of a special token, the rendered text is encoded as it is, as transformers does.
Otherwise those texts are hidden behind placeholders while the template runs. The special tokens of the result are
counted against those of harmless messages; where they differ (a normaliser made one, or a message and the template
joined into one), all messages are hidden as a whole. Knows nothing of sessions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from dgnd.control.api import ChatMessage
from dgnd.errors import BadRequest, ModelError
from dgnd.text.jinja_sandbox import ChatTemplate
from dgnd.text.special_text import Placeholders, token_pattern
from dgnd.text.tokenizer import MAX_PROMPT_BYTES, Tokenizer, check_text

#: Stands for the answer that is in the context already, when a turn is appended.
_ANSWER = "\U000ffff0"
_HARMLESS = "x"

Render = Callable[[Sequence[str]], str]  # contents of the messages to text


class ChatEncoder:
    """One model's conversations."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, variables: dict[str, str],
                 control_tokens: frozenset[str]) -> None:
        self._tokenizer, self._template, self._variables = tokenizer, template, variables
        self._pattern = token_pattern(control_tokens)
        unk = tokenizer.unk_id
        self._control_ids = {i for i, text in tokenizer.added.items() if text in control_tokens and i != unk}

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Ids of the conversation and of the prompt for an answer."""
        if not messages:
            raise BadRequest("there are no messages")
        contents = [message.content for message in messages]
        return self._encode(lambda texts: self._render([m.role for m in messages], texts), contents)

    def encode_turn(self, text: str, system: str | None) -> list[int]:
        """Ids that close an answer and ask for the next one."""
        roles = ["user", "assistant", *(["system"] if system else []), "user"]
        contents = [*([system] if system else []), text]

        def render(texts: Sequence[str]) -> str:
            full = self._render(roles, [_HARMLESS, _ANSWER, *texts])
            before, found, after = full.rpartition(_ANSWER)
            if not found:
                raise ModelError("no answer in the rendered text")
            return after

        return self._encode(render, contents)

    def _render(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        return self._template.render(messages, self._variables)

    def _encode(self, render: Render, contents: list[str]) -> list[int]:
        check_text("\n".join(contents), MAX_PROMPT_BYTES)
        harmless = render([_HARMLESS if content.strip() else content for content in contents])
        expected = self._control_counts(self._tokenizer.encode(harmless))
        places = Placeholders(contents, self._pattern)
        hidden = [places.hide(content) for content in contents]
        rendered = render(hidden)
        if places.meaning:
            ids = self._tokenizer.aliases.encode(rendered, places.meaning)
        else:
            ids = self._tokenizer.encode(rendered)
        if self._control_counts(ids) == expected:
            return ids
        places = Placeholders(contents, self._pattern)
        rendered = render([places.new(content) if content.strip() else content for content in contents])
        return self._tokenizer.aliases.encode(rendered, places.meaning)

    def _control_counts(self, ids: Sequence[int]) -> Counter[int]:
        return Counter(token_id for token_id in ids if token_id in self._control_ids)
