"""Answers as server-sent events: for each a beginning, pieces and an end; then the counts, and `[DONE]`.

Knows nothing of what an event holds; a maker knows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from dgnd.control import api
from dgnd.http.exchange import Exchange
from dgnd.http.openai.answers import FinishReason, Usage

EVENTS = "text/event-stream"
DONE = b"data: [DONE]\n\n"


def event(item: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(item) + b"\n\n"


class Maker(Protocol):
    """Makes the events of one response."""

    def begin(self, index: int) -> object | None:
        """What an answer begins with; None: nothing."""
        ...

    def piece(self, index: int, text: str, logprobs: list[api.TokenLogprobs]) -> object | None:
        """A piece of an answer; None: nothing of it is told yet."""
        ...

    def end(self, index: int, result: api.GenerateResult) -> Sequence[object]:
        """What ends an answer."""
        ...

    def counts(self, usage: Usage) -> object | None:
        """The end of all; None where nobody asked for counts."""
        ...


class EventStream:
    """One response that comes in pieces."""

    def __init__(self, exchange: Exchange, maker: Maker, choices: int) -> None:
        """`choices`: how many answers belong to each prompt."""
        self._exchange, self._maker, self._choices = exchange, maker, choices
        self._begun: set[int] = set()

    async def delta(self, index: int, text: str, logprobs: list[api.TokenLogprobs]) -> None:
        """A piece of an answer; the first one begins the response."""
        events = b""
        if index not in self._begun:
            self._begun.add(index)
            first = self._maker.begin(index)
            events += b"" if first is None else event(first)
        if text or logprobs:
            piece = self._maker.piece(index, text, logprobs)
            events += b"" if piece is None else event(piece)
        if events or not self._exchange.started:
            await self._exchange.piece(EVENTS, events)

    async def waits(self, words: str) -> None:
        """A comment, which clients pass over and which tells whatever is between that the stream lives."""
        await self._exchange.piece(EVENTS, f": {words}\n\n".encode())

    async def finish(self, results: Sequence[api.GenerateResult]) -> None:
        """The end of all answers."""
        events = b""
        for index, result in enumerate(results):
            await self.delta(index, "", [])  # an answer of no tokens has a beginning, too
            events += b"".join(map(event, self._maker.end(index, result)))
        counts = self._maker.counts(usage(results, self._choices))
        events += b"" if counts is None else event(counts)
        await self._exchange.piece(EVENTS, events + DONE)
        await self._exchange.end()


def finish_reason(result: api.GenerateResult) -> FinishReason:
    """Why it ended, in OpenAI's words."""
    return "length" if result.finish_reason == "length" else "stop"


def usage(results: Sequence[api.GenerateResult], choices: int) -> Usage:
    """Each prompt once, and all answers; `choices` of them are to the same prompt."""
    prompt = sum(result.usage.prompt_tokens for result in results[::choices])
    completion = sum(result.usage.completion_tokens for result in results)
    return Usage(prompt, completion, prompt + completion)
