"""Conversations to token ids, in a model's template, so that what users typed stays text.

Where no message holds the text of a control token, the rendered text is encoded as it is, as transformers
does. Otherwise those texts are hidden behind placeholders while the template runs. Then the control tokens of
the result are counted against those of harmless messages; where they differ (a normaliser made one, or a
message and the template joined into one), whole messages are hidden. Knows nothing of sessions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dgnd.control.api import ChatMessage
from dgnd.errors import BadRequest, ContextExceeded
from dgnd.text.jinja_sandbox import ChatTemplate, TemplateRefused
from dgnd.text.nested import as_templates_have_it, changed, texts_in
from dgnd.text.special_text import Placeholders, token_pattern
from dgnd.text.tokenizer import Tokenizer, check_text

_HARMLESS = "x"
#: Texts before which a continuation is encoded, so that no tokenizer takes it for the beginning of a text.
_ANCHORS = ("a", "\n", ".", "0")

Render = Callable[[Sequence[str]], str]  # contents of the messages to text
ToIds = Callable[[str, Mapping[str, str]], list[int]]  # text and its placeholders to ids


class ChatEncoder:
    """One model's conversations. `control`: texts of the tokens that no message may contain as tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        variables: Mapping[str, str],
        control: frozenset[str],
    ) -> None:
        self._tokenizer, self._template, self._variables = tokenizer, template, variables
        self._pattern = token_pattern(control)
        unk = tokenizer.unk_id
        self._control_ids = {i for i, text in tokenizer.added.items() if text in control and i != unk}

    def encode(self, messages: Sequence[ChatMessage], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Ids of the conversation and of the prompt for an answer; `tools`: that the model may call."""
        if not messages:
            raise BadRequest("there are no messages")
        most = self._tokenizer.most
        if most is not None and len(messages) > most:  # each has a token at least
            raise ContextExceeded(
                f"the conversation has {len(messages)} messages, the model's context {most} tokens; "
                "shorten it, or begin a new one",
                context=most,
            )
        roles = [message.role for message in messages]
        contents = [message.content for message in messages]
        more = [as_templates_have_it(message) for message in messages]
        if not tools and not any(more):
            return self._encode(lambda texts: self._render(roles, texts), contents, self._tokenizer_ids)
        texts = texts_in([*tools, *more])
        check_text("\n".join([*contents, *texts]))
        places = Placeholders([*contents, *texts], self._pattern)
        hidden_tools, hidden_more = (changed(each, places.hide) for each in (list(tools), more))
        return self._encode(
            lambda contents: self._render(roles, contents, hidden_more, hidden_tools),
            contents,
            lambda rendered, meaning: self._tokenizer_ids(rendered, {**places.meaning, **meaning}),
            reserved="".join([*texts, *places.meaning]),
        )

    def encode_text(self, text: str, around: bool) -> list[int]:
        """Ids of bare text, with nothing in it special; `around`: with what the tokenizer puts around it."""
        check_text(text)
        expected = self._count(self._tokenizer.encode(_HARMLESS, add_special_tokens=around))
        if not self._pattern.search(text):
            ids = self._tokenizer.encode(text, add_special_tokens=around)
            if self._count(ids) == expected:
                return ids
        places = Placeholders([text], self._pattern)
        return self._tokenizer.aliases.encode(places.new(text), places.meaning, add_special_tokens=around)

    def encode_turn(self, text: str, system: str | None) -> list[int] | None:
        """Ids that close an answer and ask for the next one: what the template writes after an earlier
        answer.

        None when the template doesn't write earlier answers out, or refuses such a conversation.
        """
        if system:
            try:
                ids = self._turn(["system", "user"], [system, text])
            except TemplateRefused:
                ids = None
            if ids is not None:
                return ids
            text = f"{system}\n\n{text}"
        try:
            return self._turn(["user"], [text])
        except TemplateRefused:
            return None

    def _turn(self, roles: Sequence[str], contents: list[str]) -> list[int] | None:
        answer = Placeholders(contents, self._pattern).new("the answer that is in the context already")
        found = True

        def render(texts: Sequence[str]) -> str:
            nonlocal found
            full = self._render(["user", "assistant", *roles], [_HARMLESS, answer, *texts])
            _before, seen, after = full.rpartition(answer)
            found = found and bool(seen)
            return after

        ids = self._encode(render, contents, self._continuation_ids, reserved=answer)
        return ids if found else None

    def _render(
        self,
        roles: Sequence[str],
        contents: Sequence[str],
        more: Sequence[Mapping[str, Any]] = (),
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        messages: list[dict[str, Any]] = [
            {"role": role, "content": text} for role, text in zip(roles, contents, strict=True)
        ]
        for message, fields in zip(messages, more, strict=False):
            message.update(fields)
        return self._template.render(messages, self._variables, tools)

    def _encode(self, render: Render, contents: list[str], to_ids: ToIds, reserved: str = "") -> list[int]:
        check_text("\n".join(contents))
        expected = self._count(
            to_ids(render([_HARMLESS if content.strip() else content for content in contents]), {})
        )
        places = Placeholders([*contents, reserved], self._pattern)
        ids = to_ids(render([places.hide(content) for content in contents]), places.meaning)
        if self._count(ids) == expected:
            return ids
        places = Placeholders([*contents, reserved], self._pattern)
        hidden = [places.new(content) if content.strip() else content for content in contents]
        return to_ids(render(hidden), places.meaning)

    def _tokenizer_ids(self, rendered: str, meaning: Mapping[str, str]) -> list[int]:
        if meaning:
            return self._tokenizer.aliases.encode(rendered, meaning)
        return self._tokenizer.encode(rendered)

    def _continuation_ids(self, rendered: str, meaning: Mapping[str, str]) -> list[int]:
        """Ids of text that goes on after an answer, so without the space that some put before a text."""
        if self._pattern.match(rendered):
            return self._tokenizer_ids(rendered, meaning)
        for anchor in _ANCHORS:
            before = self._tokenizer_ids(anchor, meaning)
            ids = self._tokenizer_ids(anchor + rendered, meaning)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._tokenizer_ids(rendered, meaning)

    def _count(self, ids: Sequence[int]) -> Counter[int]:
        return Counter(token_id for token_id in ids if token_id in self._control_ids)
