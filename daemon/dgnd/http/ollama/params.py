"""A request of Ollama's form as parameters of the engine; None where only a model is to be loaded. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from dgnd.control import api
from dgnd.errors import BadRequest
from dgnd.http.ollama.requests import Asked, ChatRequest, GenerateRequest, Message, Options

#: What top_p = 0 means: the likeliest token alone.
_LEAST_TOP_P = 1e-9


def chat_params(request: ChatRequest, model: str) -> api.GenerateParams | None:
    """Raises BadRequest for what can't be done here."""
    _refuse_common(request)
    messages = [_message(message, index) for index, message in enumerate(request.messages or ())]
    if not messages:
        return None
    return msgspec.structs.replace(_params(request, model, messages=messages), tools=request.tools or [])


def generate_params(request: GenerateRequest, model: str) -> api.GenerateParams | None:
    """Raises BadRequest for what can't be done here."""
    _refuse_common(request)
    _refuse(bool(request.suffix), "suffix: text can't be filled in, only continued")
    _refuse(bool(request.template), "template: the model's own is used; with raw = true, none")
    _refuse(bool(request.context), "context: it is not supported; /api/chat takes a conversation")
    _refuse(bool(request.images), "images: only text is understood")
    if not request.prompt:
        return None
    if request.raw:
        return _params(request, model, prompt=request.prompt, raw=True)
    return _params(request, model, prompt=request.prompt, system=request.system or None)


def _params(
    request: Asked,
    model: str,
    messages: list[api.ChatMessage] | None = None,
    prompt: str | None = None,
    system: str | None = None,
    raw: bool = False,
) -> api.GenerateParams:
    options = request.options or Options()
    wanted = options.num_predict
    return api.GenerateParams(
        model=model,
        messages=messages,
        prompt=prompt,
        system=system,
        raw=raw,
        max_tokens=wanted if wanted is not None and wanted > 0 else None,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=None if options.top_p is None else max(options.top_p, _LEAST_TOP_P),
        min_p=options.min_p,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        json_schema=_schema(request.format),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        seed=None if options.seed is None else options.seed % 2**64,
        stop=[options.stop] if isinstance(options.stop, str) else list(options.stop or ()),
    )


def _schema(wanted: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if isinstance(wanted, dict):
        return wanted
    _refuse(wanted not in (None, "", "json"), 'format: "json", or a JSON schema')
    return {"type": "object"} if wanted == "json" else None


def _message(message: Message, index: int) -> api.ChatMessage:
    _refuse(bool(message.images), f"messages[{index}].images: only text is understood")
    calls = [api.ToolCall(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    _refuse(bool(calls) and message.role != "assistant", f"messages[{index}]: only an assistant calls tools")
    return api.ChatMessage(
        message.role,
        message.content or "",
        calls,
        name=message.tool_name or "" if message.role == "tool" else "",
    )


def _refuse_common(request: Asked) -> None:
    _refuse(request.think not in (None, False), f"{request.model} does not support thinking")


def _refuse(refused: bool, why: str) -> None:
    if refused:
        raise BadRequest(why)
