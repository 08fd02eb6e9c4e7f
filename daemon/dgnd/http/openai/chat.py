"""`POST /v1/chat/completions`: the answer in one, or as a stream of server-sent events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from dgnd.control import api
from dgnd.http.calls import CallReader, tool_style
from dgnd.http.desk import Desk
from dgnd.http.exchange import Exchange
from dgnd.http.forms import answered, json_answer
from dgnd.http.openai import answers
from dgnd.http.openai.logprobs import chat_logprobs
from dgnd.http.openai.params import chat_params
from dgnd.http.openai.requests import ChatRequest
from dgnd.http.openai.stream import EventStream, finish_reason, usage
from dgnd.http.reading import read_body
from dgnd.text.tool_calls import Call


async def chat(exchange: Exchange, desk: Desk) -> None:
    """One request."""
    request = read_body(await exchange.body(), ChatRequest)
    asked = chat_params(request)
    style = await tool_style(desk, request.model, asked[0].tools)
    maker = _Maker(
        identity=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=request.model,
        with_usage=bool(request.stream_options and request.stream_options.include_usage),
        readers=[CallReader(style, each.tools) for each in asked],
    )
    if request.stream:
        stream = EventStream(exchange, maker, len(asked))
        await stream.finish(await answered(exchange, desk, asked, stream.delta, stream.waits))
        return
    results = await answered(exchange, desk, asked)
    completion = answers.ChatCompletion(
        id=maker.identity,
        created=maker.created,
        model=maker.model,
        choices=[maker.choice(index, result, bool(request.logprobs)) for index, result in enumerate(results)],
        usage=usage(results, len(asked)),
    )
    await json_answer(exchange, completion)


@dataclass(frozen=True, slots=True)
class _Maker:
    """The events of one response, or its parts where it comes in one."""

    identity: str
    created: int
    model: str
    with_usage: bool
    readers: list[CallReader]  #: one for each answer

    def choice(self, index: int, result: api.GenerateResult, logprobs: bool) -> answers.ChatChoice:
        """A whole answer."""
        text, calls = self.readers[index].whole(result.text)
        return answers.ChatChoice(
            index,
            answers.AnswerMessage(
                text if text or not calls else None,
                tool_calls=[answers.ToolCall(_call_id(), _function(call)) for call in calls] or msgspec.UNSET,
            ),
            self._reason(index, result),
            chat_logprobs(result.logprobs) if logprobs else None,
        )

    def begin(self, index: int) -> object:
        """Who speaks."""
        return self._chunk([answers.ChunkChoice(index, answers.Delta(role="assistant", content=""))])

    def piece(self, index: int, text: str, logprobs: list[api.TokenLogprobs]) -> object | None:
        """A piece of the message; None where it is held back, as it may be a call."""
        return self._told(index, *self.readers[index].push(text), logprobs)

    def end(self, index: int, result: api.GenerateResult) -> Sequence[object]:
        """What was held back, and why the message ends."""
        rest = self._told(index, *self.readers[index].finish(), [])
        reason = self._reason(index, result)
        last = self._chunk([answers.ChunkChoice(index, answers.Delta(), reason)])
        return [last] if rest is None else [rest, last]

    def counts(self, usage: answers.Usage) -> object | None:
        """The counts, if they were asked for."""
        return self._chunk([], usage) if self.with_usage else None

    def _reason(self, index: int, result: api.GenerateResult) -> answers.FinishReason:
        reason = finish_reason(result)
        return "tool_calls" if reason == "stop" and self.readers[index].called else reason

    def _told(
        self, index: int, text: str, calls: Sequence[Call], logprobs: list[api.TokenLogprobs]
    ) -> object | None:
        if not text and not calls and not logprobs:
            return None
        before = self.readers[index].called - len(calls)
        made = [
            answers.ToolCallDelta(before + number, _call_id(), _function(call))
            for number, call in enumerate(calls)
        ]
        told = chat_logprobs(logprobs) if logprobs else None
        delta = answers.Delta(content=text if text or not made else None, tool_calls=made)
        return self._chunk([answers.ChunkChoice(index, delta, None, told)])

    def _chunk(self, choices: list[answers.ChunkChoice], usage: answers.Usage | None = None) -> object:
        return answers.ChatChunk(
            id=self.identity,
            created=self.created,
            model=self.model,
            choices=choices,
            usage=usage if self.with_usage else msgspec.UNSET,
        )


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex}"


def _function(call: Call) -> answers.CalledFunction:
    return answers.CalledFunction(call.name, msgspec.json.encode(call.arguments).decode())
