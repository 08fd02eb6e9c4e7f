"""`POST /v1/chat/completions`: the answer in one, or as a stream of server-sent events."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

import msgspec

from dgnd.control import api
from dgnd.http.desk import Desk
from dgnd.http.exchange import Exchange
from dgnd.http.forms import answered, json_answer
from dgnd.http.openai import answers
from dgnd.http.openai.logprobs import chat_logprobs
from dgnd.http.openai.params import chat_params
from dgnd.http.openai.requests import ChatRequest
from dgnd.http.openai.stream import EventStream, finish_reason, usage
from dgnd.http.reading import read_body


async def chat(exchange: Exchange, desk: Desk) -> None:
    """One request."""
    request = read_body(await exchange.body(), ChatRequest)
    asked = chat_params(request)
    maker = _Maker(
        identity=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=request.model,
        with_usage=bool(request.stream_options and request.stream_options.include_usage),
    )
    if request.stream:
        stream = EventStream(exchange, maker, len(asked))
        await stream.finish(await answered(exchange, desk, asked, stream.delta))
        return
    results = await answered(exchange, desk, asked)
    completion = answers.ChatCompletion(
        id=maker.identity,
        created=maker.created,
        model=maker.model,
        choices=[
            answers.ChatChoice(
                index,
                answers.AnswerMessage(result.text),
                finish_reason(result),
                chat_logprobs(result.logprobs) if request.logprobs else None,
            )
            for index, result in enumerate(results)
        ],
        usage=usage(results, len(asked)),
    )
    await json_answer(exchange, completion)


@dataclass(frozen=True, slots=True)
class _Maker:
    """The events of one response."""

    identity: str
    created: int
    model: str
    with_usage: bool

    def begin(self, index: int) -> object:
        """Who speaks."""
        return self._chunk([answers.ChunkChoice(index, answers.Delta(role="assistant", content=""))])

    def piece(self, index: int, text: str, logprobs: list[api.TokenLogprobs]) -> object:
        """A piece of the message."""
        told = chat_logprobs(logprobs) if logprobs else None
        return self._chunk([answers.ChunkChoice(index, answers.Delta(content=text), None, told)])

    def end(self, index: int, reason: answers.FinishReason) -> object:
        """Why the message ends."""
        return self._chunk([answers.ChunkChoice(index, answers.Delta(), reason)])

    def counts(self, usage: answers.Usage) -> object | None:
        """The counts, if they were asked for."""
        return self._chunk([], usage) if self.with_usage else None

    def _chunk(self, choices: list[answers.ChunkChoice], usage: answers.Usage | None = None) -> object:
        return answers.ChatChunk(
            id=self.identity,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage if self.with_usage else msgspec.UNSET,
        )
