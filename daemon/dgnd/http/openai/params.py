"""A request of OpenAI's form as parameters of the engine. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from dgnd.control import api
from dgnd.errors import BadRequest
from dgnd.http.openai.requests import (
    MAX_CHOICES,
    ChatRequest,
    ManyTokenIds,
    Message,
    ResponseFormat,
    Settings,
    TextRequest,
    Texts,
    TokenIds,
    ToolChoice,
)

#: What OpenAI's API takes where a request for bare text does not say.
DEFAULT_TEXT_TOKENS = 16
MAX_TEXTS = 8 * MAX_CHOICES
#: The schema of whatever is a JSON object.
ANY_OBJECT: dict[str, Any] = {"type": "object"}
#: What top_p = 0 means: the likeliest token alone.
_LEAST_TOP_P = 1e-9


def chat_params(request: ChatRequest) -> list[api.GenerateParams]:
    """One for each answer. Raises BadRequest for what can't be done here."""
    _refuse("functions", bool(request.functions), "it is not supported; ask with tools")
    _refuse(
        "modalities",
        request.modalities is not None and set(request.modalities) != {"text"},
        "only text is known",
    )
    _refuse("top_logprobs", bool(request.top_logprobs and not request.logprobs), "it needs logprobs = true")
    params = common_params(request, request.max_completion_tokens or request.max_tokens)
    told = (request.top_logprobs or 0) if request.logprobs else None
    params = msgspec.structs.replace(params, messages=_messages(request.messages), logprobs=told)
    params = msgspec.structs.replace(params, json_schema=_schema(request.response_format))
    params = with_tools(params, request)
    return choices(params, request)


def text_params(request: TextRequest) -> tuple[list[str], list[api.GenerateParams]]:
    """What each answer begins with (`echo`), and its parameters, the answers to one prompt after each other.

    Raises BadRequest for what can't be done here.
    """
    _refuse("suffix", bool(request.suffix), "text can't be filled in, only continued")
    _refuse("best_of", request.best_of not in (None, 1, request.n), "it is not supported; ask for n")
    params = common_params(request, request.max_tokens or DEFAULT_TEXT_TOKENS)
    params = msgspec.structs.replace(params, raw=True, logprobs=request.logprobs)
    prompts = _prompts(request.prompt)
    _refuse(
        "prompt",
        len(prompts) * (request.n or 1) > MAX_TEXTS,
        f"{len(prompts)} prompts with {request.n or 1} answers each; {MAX_TEXTS} answers at most",
    )
    ids = [each for each in prompts if not isinstance(each, str)]
    _refuse("echo", bool(request.echo and ids), "a prompt of token ids can't be echoed")
    echoes: list[str] = []
    asked: list[api.GenerateParams] = []
    for prompt in prompts:
        kind = {"prompt": prompt} if isinstance(prompt, str) else {"token_ids": prompt}
        answers = choices(msgspec.structs.replace(params, **kind), request)
        asked += answers
        echoes += [prompt if request.echo and isinstance(prompt, str) else ""] * len(answers)
    return echoes, asked


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    """One text, several, the token ids of one, or those of several."""
    if isinstance(prompt, str):
        return [prompt]
    for kind in (Texts, TokenIds, ManyTokenIds):
        try:
            found: Any = msgspec.convert(prompt, type=kind)
        except msgspec.ValidationError:
            continue
        return [found] if isinstance(found[0], int) else found
    raise BadRequest(
        "prompt: a text, an array of texts, token ids, or an array of their arrays", setting="prompt"
    )


def common_params(request: Settings, max_tokens: int | None) -> api.GenerateParams:
    """What does not depend on the kind of prompt."""
    _refuse("logit_bias", bool(request.logit_bias), "it is not supported")
    stop = request.stop
    return api.GenerateParams(
        model=request.model,
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=None if request.top_p is None else max(request.top_p, _LEAST_TOP_P),
        top_k=request.top_k,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        seed=None if request.seed is None else request.seed % 2**64,
        stop=[] if stop is None else [stop] if isinstance(stop, str) else stop,
    )


def with_tools(params: api.GenerateParams, request: ChatRequest) -> api.GenerateParams:
    """With the tools that may be called, if any."""
    choice = request.tool_choice
    required = choice == "required" or isinstance(choice, ToolChoice)
    if choice == "none" or not request.tools:
        _refuse("tool_choice", required, "there are no tools")
        return params
    return msgspec.structs.replace(
        params,
        tools=request.tools,
        tool_choice="required" if required else "auto",
        tool_name=choice.function.name if isinstance(choice, ToolChoice) else None,
        parallel_tool_calls=request.parallel_tool_calls is not False,
    )


def _schema(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return ANY_OBJECT
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise BadRequest("response_format.json_schema.schema: it is required", setting="response_format")
    return wanted.json_schema.schema


def choices(params: api.GenerateParams, request: Settings) -> list[api.GenerateParams]:
    """`n` of them, that differ in their seeds."""
    seed = params.seed
    return [
        msgspec.structs.replace(params, seed=None if seed is None else (seed + index) % 2**64)
        for index in range(request.n or 1)
    ]


def _messages(messages: Sequence[Message]) -> list[api.ChatMessage]:
    return [
        api.ChatMessage(
            role="system" if message.role == "developer" else message.role,
            content=_text(message, f"messages[{index}].content"),
            tool_calls=_calls(message, f"messages[{index}].tool_calls"),
            tool_call_id=message.tool_call_id or "",
            name=message.name or "" if message.role == "tool" else "",
        )
        for index, message in enumerate(messages)
    ]


def _calls(message: Message, where: str) -> list[api.ToolCall]:
    calls = message.tool_calls or []
    _refuse(where, bool(calls) and message.role != "assistant", "only an assistant calls tools")
    found = []
    for index, call in enumerate(calls):
        try:
            arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            place = f"{where}[{index}].function.arguments"
            raise BadRequest(f"{place}: it is no JSON object", setting=place) from None
        found.append(api.ToolCall(call.function.name, arguments, call.id))
    return found


def _text(message: Message, where: str) -> str:
    if message.content is None:
        _refuse(where, message.role != "assistant", "a message needs text")
        return ""
    if isinstance(message.content, str):
        return message.content
    texts = []
    for part in message.content:
        _refuse(where, part.type != "text", f"a part is {part.type!r}; only text is understood")
        _refuse(where, part.text is None, "a part of type 'text' needs its text")
        texts.append(part.text or "")
    return "".join(texts)


def _refuse(param: str, refused: bool, why: str) -> None:
    if refused:
        raise BadRequest(f"{param}: {why}", setting=param)
