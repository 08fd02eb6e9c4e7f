"""`POST /v1/chat/completions`: the answer in one, or as a stream of server-sent events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from dgnd.control import api
from dgnd.http.desk import Desk
from dgnd.http.exchange import Exchange
from dgnd.http.forms import JSON, answered
from dgnd.http.openai import answers
from dgnd.http.openai.errors import read_request
from dgnd.http.openai.params import chat_params
from dgnd.http.openai.requests import ChatRequest

EVENTS = "text/event-stream"
DONE = b"data: [DONE]\n\n"


def event(item: object) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(item) + b"\n\n"


async def chat(exchange: Exchange, desk: Desk) -> None:
    """One request."""
    request = read_request(await exchange.body(), ChatRequest)
    asked = chat_params(request)
    stream = _Stream(
        exchange,
        identity=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=request.model,
        with_usage=bool(request.stream_options and request.stream_options.include_usage),
        begun=[False] * len(asked),
    )
    if request.stream:
        results = await answered(exchange, desk, asked, stream.delta)
        await stream.finish(results)
        return
    results = await answered(exchange, desk, asked)
    completion = answers.ChatCompletion(
        id=stream.identity,
        created=stream.created,
        model=request.model,
        choices=[
            answers.ChatChoice(index, answers.AnswerMessage(result.text), finish_reason(result))
            for index, result in enumerate(results)
        ],
        usage=usage(results),
    )
    await exchange.whole(200, JSON, msgspec.json.encode(completion), {})


@dataclass(slots=True)
class _Stream:
    """One response that comes in pieces."""

    exchange: Exchange
    identity: str
    created: int
    model: str
    with_usage: bool
    begun: list[bool]  #: for each answer, whether its first piece was sent

    async def delta(self, index: int, text: str, _ids: list[int]) -> None:
        """A piece of an answer."""
        events = b"" if self.begun[index] else self._event(index, answers.Delta(role="assistant", content=""))
        self.begun[index] = True
        if text:
            events += self._event(index, answers.Delta(content=text))
        if events:
            await self.exchange.piece(EVENTS, events)

    async def finish(self, results: Sequence[api.GenerateResult]) -> None:
        """The end of all answers."""
        for index, result in enumerate(results):
            await self.delta(index, "", [])  # an answer of no tokens has a beginning, too
            await self.exchange.piece(EVENTS, self._event(index, answers.Delta(), finish_reason(result)))
        last = b""
        if self.with_usage:
            last = event(answers.ChatChunk(
                id=self.identity, created=self.created, model=self.model, choices=[], usage=usage(results)
            ))  # fmt: skip
        await self.exchange.piece(EVENTS, last + DONE)
        await self.exchange.end()

    def _event(self, index: int, delta: answers.Delta, finish: answers.FinishReason | None = None) -> bytes:
        return event(
            answers.ChatChunk(
                id=self.identity,
                created=self.created,
                model=self.model,
                choices=[answers.ChunkChoice(index, delta, finish)],
                usage=None if self.with_usage else msgspec.UNSET,
            )
        )


def finish_reason(result: api.GenerateResult) -> answers.FinishReason:
    """Why it ended, in OpenAI's words."""
    return "length" if result.finish_reason == "length" else "stop"


def usage(results: Sequence[api.GenerateResult]) -> answers.Usage:
    """The prompt once, and all answers."""
    prompt = results[0].usage.prompt_tokens
    completion = sum(result.usage.completion_tokens for result in results)
    return answers.Usage(prompt, completion, prompt + completion)
