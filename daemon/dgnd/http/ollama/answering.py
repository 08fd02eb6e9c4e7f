"""`POST /api/chat` and `POST /api/generate`: the answer in one, or line by line as JSON."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from dgnd.control import api
from dgnd.http.calls import CallReader, tool_style
from dgnd.http.desk import Desk
from dgnd.http.exchange import Exchange
from dgnd.http.forms import answered, json_answer
from dgnd.http.ollama import answers
from dgnd.http.ollama.names import known_name
from dgnd.http.ollama.params import chat_params, generate_params
from dgnd.http.ollama.requests import Asked, ChatRequest, GenerateRequest
from dgnd.http.reading import read_body
from dgnd.text.tool_calls import Call

LINES = "application/x-ndjson"


def line(item: object) -> bytes:
    """One line of a response."""
    return msgspec.json.encode(item) + b"\n"


async def chat(exchange: Exchange, desk: Desk) -> None:
    """The next message of a conversation."""
    request = read_body(await exchange.body(), ChatRequest)
    params = chat_params(request, await known_name(request.model, desk))

    def made(text: str, calls: Sequence[Call], facts: dict[str, Any]) -> object:
        message = answers.AnswerMessage(
            text,
            tool_calls=[answers.ToolCall(answers.CalledFunction(*call)) for call in calls] or msgspec.UNSET,
        )
        return answers.ChatLine(message=message, **facts)

    await _answer(exchange, desk, request, params, made)


async def generate(exchange: Exchange, desk: Desk) -> None:
    """The answer to one prompt."""
    request = read_body(await exchange.body(), GenerateRequest)
    params = generate_params(request, await known_name(request.model, desk))

    def made(text: str, _calls: Sequence[Call], facts: dict[str, Any]) -> object:
        return answers.TextLine(response=text, **facts)

    await _answer(exchange, desk, request, params, made)


async def _answer(
    exchange: Exchange,
    desk: Desk,
    request: Asked,
    params: api.GenerateParams | None,
    made: Callable[[str, Sequence[Call], dict[str, Any]], object],
) -> None:
    response = _Response(request.model)
    if params is None:  # dgnd loads what its configuration says
        reason = "unload" if request.keep_alive in (0, "0", "0s") else "load"
        await json_answer(exchange, made("", [], response.end(reason)))
        return
    style = await tool_style(desk, params.model or "", params.tools)
    reader = CallReader(style, params.tools)
    if request.stream is False:
        (result,) = await answered(exchange, desk, [params])
        facts = {**response.result(result), "logprobs": _logprobs(result.logprobs)}
        await json_answer(exchange, made(*reader.whole(result.text), facts))
        return

    async def piece(_index: int, text: str, logprobs: list[api.TokenLogprobs]) -> None:
        shown, calls = reader.push(text)
        if shown or calls or logprobs:
            facts = {**response.more(), "logprobs": _logprobs(logprobs)}
            await exchange.piece(LINES, line(made(shown, calls, facts)))

    (result,) = await answered(exchange, desk, [params], piece)
    rest, calls = reader.finish()
    if rest or calls:
        await exchange.piece(LINES, line(made(rest, calls, response.more())))
    await exchange.piece(LINES, line(made("", [], response.result(result))))
    await exchange.end()


@dataclass(frozen=True, slots=True)
class _Response:
    """What each line of one response says beside its text."""

    model: str
    begun: float = field(default_factory=time.monotonic)

    def more(self) -> dict[str, Any]:
        """Of a line that others follow."""
        return {"model": self.model, "created_at": now(), "done": False}

    def end(self, reason: str) -> dict[str, Any]:
        """Of the last line."""
        return {"model": self.model, "created_at": now(), "done": True, "done_reason": reason}

    def result(self, result: api.GenerateResult) -> dict[str, Any]:
        """Of the last line of an answer."""
        return {
            **self.end("length" if result.finish_reason == "length" else "stop"),
            "total_duration": _ns(time.monotonic() - self.begun),
            "load_duration": 0,
            "prompt_eval_count": result.usage.prompt_tokens,
            "prompt_eval_duration": _ns(result.timings.prefill_s),
            "eval_count": result.usage.completion_tokens,
            "eval_duration": _ns(result.timings.decode_s),
        }


def _logprobs(told: Sequence[api.TokenLogprobs]) -> list[answers.Logprob]:
    return [_logprob(each.picked, [_logprob(item) for item in each.likeliest]) for each in told]


def _logprob(one: api.Logprob, likeliest: Sequence[answers.Logprob] = ()) -> answers.Logprob:
    whole = "\N{REPLACEMENT CHARACTER}" not in one.token
    return answers.Logprob(
        one.token, one.logprob, list(one.token.encode()) if whole else None, list(likeliest)
    )


def now() -> str:
    """The time as Ollama writes it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
